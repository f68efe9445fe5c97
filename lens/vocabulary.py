"""The LM head of a language model -> weights of a lexical head over the vocabulary.

MLM heads are dense, activation, LayerNorm, decoder in BERT, DistilBERT, RoBERTa, XLM-R, ModernBERT and others, under
different names, with and without biases, with an activation that the configuration names or the code does. What was
read is therefore run beside the model itself, and refused unless both give the same logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lens.backbone import hidden_states
from lens.config import TransformActivation
from lens.head import ACTIVATIONS

# Legend: L tokens, D hidden size, V vocabulary, K clusters.

SUPPORTED = "supported are those of bert, distilbert, roberta, xlm-roberta, modernbert and their like, and decoders"
_NAMES: dict[str, TransformActivation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_PROBE = 8  # tokens
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative
_HALF_TOLERANCE = 0.05


def read_vocabulary_head(
    wrapper: nn.Module, missing: list[str], facts: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The LM head of a loaded language model as LexicalHead weights, and `facts` (LensConfig fields) that go with it.

    Decoders give their LM head. Encoders give the MLM decoder with bias and transform where the checkpoint has them,
    and their word embeddings where it has not (`missing` names absent weights). Of `facts`, `bias` says whether the
    head has one. Raises ValueError for MLM heads of another form and for facts that contradict the head.
    """
    output = wrapper.get_output_embeddings()  # type: ignore[operator]
    state = {"weight": output.weight.detach().float().clone()}
    facts = {**facts, "dimensions": len(output.weight), "hidden_size": output.weight.shape[1]}
    dense, norms = head_modules(wrapper)
    bias_missing = any(key.endswith("bias") for key in missing)
    if not dense or any(key.startswith(tuple(dense)) for key in missing):
        if output.bias is not None and not bias_missing and facts.get("bias", True):
            return {**state, "bias": output.bias.detach()}, {**facts, "bias": True}
        return state, facts
    kind = wrapper.config.model_type  # type: ignore[union-attr]
    linear, norm = next(iter(dense.values())), next(iter(norms.values()), None)
    square = linear.in_features == linear.out_features == output.weight.shape[1]
    if len(dense) != 1 or len(norms) != 1 or norm is None or not square:
        raise ValueError(f"the MLM head of {kind} is not dense, activation, LayerNorm, decoder; {SUPPORTED}")
    parts: dict[str, Any] = {"dense": linear, "norm": norm}
    for name, module in parts.items():
        bias = torch.zeros(len(module.weight), dtype=module.weight.dtype, device=module.weight.device)
        state[f"transform.{name}.weight"] = module.weight.detach()
        state[f"transform.{name}.bias"] = bias if module.bias is None else module.bias.detach()
    if output.bias is not None:
        state["bias"] = output.bias.detach()
    eps = float(norm.eps)
    found = {"transform": "mlm", "transform_eps": eps, "transform_activation": _activation(wrapper, state, eps)}
    for name, value in found.items():
        if facts.get(name, value) != value:
            raise ValueError(f"{name}={facts[name]!r} contradicts the MLM head of {kind}, which has {value!r}")
    facts = {"bias": output.bias is not None, **facts, **found}
    if not facts["bias"]:
        state.pop("bias", None)
    return state, facts


def clustered_transform(
    wrapper: nn.Module, missing: list[str], facts: dict[str, Any], labels: Tensor, centroids: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The transform of a masked LM's head, with a bias (K,) for clusters: the mean of their tokens' biases.

    Where the centroids (K, D) are the means of the head's rows, a cluster's logit is then the mean of its tokens'
    logits; other centroids (whitened, or of unit length) get the transform alone, and so do all where `facts` say
    `bias` false. A checkpoint without an MLM head (`missing` names its weights) gives nothing, and the transform
    begins at random. Raises ValueError as `read_vocabulary_head`, with which `facts` must agree.
    """
    own: dict[str, Any] = {name: facts[name] for name in ("transform_activation", "transform_eps") if name in facts}
    state, found = read_vocabulary_head(wrapper, missing, own)
    if found.get("transform") != "mlm":
        return {}, facts
    kept = {name: tensor for name, tensor in state.items() if name.startswith("transform.")}
    facts = {**facts, **{name: found[name] for name in ("transform_activation", "transform_eps")}}
    if not found["bias"] or not facts.get("bias", True) or len(labels) != len(state["bias"]):
        return kept, facts
    used = labels >= 0
    groups, rows = labels[used].long(), state["weight"].cpu()[used]
    sizes = torch.bincount(groups, minlength=len(centroids)).clamp(min=1)
    means = torch.zeros_like(centroids).index_add_(0, groups, rows) / sizes[:, None]
    tolerance = _TOLERANCE.get(wrapper.get_output_embeddings().weight.dtype, _HALF_TOLERANCE)  # type: ignore[operator]
    if not float((means - centroids).norm()) <= tolerance * float(centroids.norm()):
        return kept, facts
    bias = torch.zeros(len(centroids)).index_add_(0, groups, state["bias"].float().cpu()[used]) / sizes
    return {**kept, "bias": bias}, {**facts, "bias": True}


def head_modules(wrapper: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, nn.LayerNorm]]:
    """The linear layers and the LayerNorms of a language model that lie outside its backbone and its decoder, by
    name."""
    output = wrapper.get_output_embeddings()  # type: ignore[operator]
    inside = set(wrapper.base_model.modules())  # type: ignore[union-attr]
    own = {name: module for name, module in wrapper.named_modules() if module not in inside and module is not output}
    dense = {name: module for name, module in own.items() if isinstance(module, nn.Linear)}
    return dense, {name: module for name, module in own.items() if isinstance(module, nn.LayerNorm)}


@torch.no_grad()
def _activation(wrapper: Any, state: dict[str, Tensor], eps: float) -> TransformActivation:
    """The activation with which a head of these weights gives the model's own logits, among the one that the
    configuration names and GELU; raises ValueError where neither does."""
    config, rows = wrapper.config, wrapper.base_model.get_input_embeddings().weight
    fields = ("hidden_act", "activation", "hidden_activation", "classifier_activation")
    named = [_NAMES[name] for field in fields if (name := getattr(config, field, None)) in _NAMES]
    ids = (torch.arange(_PROBE, device=rows.device)[None] * 7 + 5) % rows.shape[0]
    mask = torch.ones_like(ids)
    states = hidden_states(wrapper.base_model, ids, mask)[0].float()  # (L, D)
    expected = wrapper(input_ids=ids, attention_mask=mask).logits[0].float()  # (L, V)
    part = {name.removeprefix("transform."): tensor.float() for name, tensor in state.items()}
    inner = F.linear(states, part["dense.weight"], part["dense.bias"])
    found: dict[TransformActivation, float] = {}
    for name in dict.fromkeys([*named, "gelu"]):
        normed = F.layer_norm(ACTIVATIONS[name](inner), inner.shape[1:], part["norm.weight"], part["norm.bias"], eps)
        difference = F.linear(normed, part["weight"], part.get("bias")) - expected
        found[name] = float(difference.norm() / expected.norm().clamp(min=1e-12))
    best = min(found, key=lambda name: found[name])
    if not found[best] <= _TOLERANCE.get(rows.dtype, _HALF_TOLERANCE):
        raise ValueError(
            f"the MLM head of {config.model_type} computes something else than dense, activation, LayerNorm, decoder: "
            f"its logits differ by {found[best]:.1%}; {SUPPORTED}"
        )
    return best
