"""Texts laid one after another, without padding, through a backbone; attention never crosses from one to another.

    ids (T,), offsets (B+1,) -> states (T, D)

Flash attention takes the offsets as keyword arguments (cu_seq_lens_q ...), which transformers passes through. For
`sdpa` an attention function of our own takes its place, under the name `lens_packed`; the offsets reach it as the
attention mask, an integer tensor of four dimensions, which transformers hands to every layer as it is. So they survive
gradient checkpointing, threads and torch.compile, and no mask of T x T is ever built. Given any other mask the
function is transformers' own for `sdpa`.

Whether a backbone works so is not believed but probed, once: models with attention code of their own, with ALiBi, with
linear or recurrent layers are told by their states, and are left to padded batches.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lens import dropped
from lens.attention import is_flash
from lens.backbone import bare_model, hidden_states, position_limit
from lens.quantized import exact_rows

try:
    from torch.nn.attention import varlen
except ImportError:  # torch < 2.10
    varlen = None  # type: ignore[assignment]

# Legend: B texts, L tokens of a text, T tokens of all texts, D hidden size, H attention heads, E size of a head.

IMPLEMENTATION = "lens_packed"
UNLIMITED = 1 << 30  # tokens
_PROBED_WINDOW = 512  # tokens: up to here the probe's longest text reaches beyond an attention window
_TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.float64: (1e-3, 1e-4)}  # relative: against padded, between texts
_HALF_TOLERANCE = (0.05, 0.01)
_LIMITS = "_lens_packing_limits"  # where a backbone keeps what was found
_probing = threading.Lock()


def packed_states(backbone: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states (T, D) of packed ids (T,) with the texts' offsets (B+1,) and their lengths (B), on the host.

    They are those of padded batches to rounding, on whatever device, under PEFT, quantised or compiled. Neighbouring
    texts of one length are computed together where there is no kernel for texts of any length. Raises ValueError for
    texts beyond `packing_limit`.
    """
    can_pack(backbone, max(lengths, default=0), required=True)
    return _run(backbone, input_ids, cu_seqlens, lengths)


def packing_limit(backbone: nn.Module) -> int:
    """The longest text in tokens that a backbone can take packed: 0 where it cannot, UNLIMITED where any.

    Found by a probe when first asked for, and kept; a backbone that can is then switched from `sdpa` to `lens_packed`.
    """
    bare: Any = bare_model(backbone)
    with _probing:
        limits = bare.__dict__.setdefault(_LIMITS, {})
        name = getattr(bare.config, "_attn_implementation", None)
        name = "sdpa" if name == IMPLEMENTATION else name
        if name not in limits:
            can = name == "sdpa" or is_flash(name)
            limits[name] = _probe_limit(backbone, switch=name == "sdpa") if can else 0
        if name == "sdpa" and limits[name] and bare.config._attn_implementation == "sdpa":  # set back meanwhile
            bare.set_attn_implementation(IMPLEMENTATION)
        return int(limits[name])


def forget_limits(backbone: nn.Module) -> None:
    """Has `packing_limit` probe anew, as for another device."""
    bare_model(backbone).__dict__.pop(_LIMITS, None)


def can_pack(backbone: nn.Module, longest: int, required: bool = False) -> bool:
    """Whether a backbone can take packed texts of up to `longest` tokens; where not, and `required`, ValueError."""
    limit = packing_limit(backbone)
    if required and longest > limit:
        name = str(getattr(bare_model(backbone).config, "_attn_implementation", None))
        if limit:
            reason = f"its attention window of {limit} tokens is shorter than texts of {longest}"
        elif name in ("sdpa", IMPLEMENTATION) or is_flash(name):
            reason = "its attention does not keep packed texts apart"
        else:
            reason = f"attn_implementation={name!r} cannot take packed texts, sdpa and flash attention can"
        raise ValueError(
            f"packed=True contradicts the backbone {type(bare_model(backbone)).__name__}: {reason}. Leave packed out"
        )
    return longest <= limit


def choose_packed(backbone: nn.Module, longest: int, packed: bool | None, half: bool) -> bool:
    """Whether texts of up to `longest` tokens go packed: as `packed` says; None: where the backbone can and it pays.

    On a GPU it pays with a kernel for texts of any length: flash attention, or torch's own, which works in `half`
    precision and without dropout in the attention. Raises ValueError where `packed` is True and it cannot be.
    """
    if packed is False or (packed is None and not _pays(backbone, half)):
        return False
    return can_pack(backbone, longest, required=packed is True)


def _pays(backbone: nn.Module, half: bool) -> bool:
    config: Any = bare_model(backbone).config
    if next(backbone.parameters()).device.type != "cuda" or is_flash(config._attn_implementation):
        return True
    names = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
    trained = any(parameter.requires_grad for parameter in backbone.parameters())
    return half and not (trained and any(getattr(config, name, 0.0) for name in names))


def _run(backbone: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> Tensor:
    bare: Any = bare_model(backbone)
    if len(input_ids) == 0:  # texts without any token
        weight = next(backbone.parameters())
        return torch.zeros(0, bare.config.hidden_size, dtype=weight.dtype, device=weight.device)
    takes = inspect.signature(bare.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if "position_ids" in takes:
        options["position_ids"] = _positions(bare, input_ids, cu_seqlens)[None]
    offsets, max_length = cu_seqlens.to(torch.int32), max(lengths)
    if is_flash(bare.config._attn_implementation):
        options |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "attention_mask": None}
        options |= {"max_length_q": max_length, "max_length_k": max_length}
    else:
        layout = offsets.expand(1, 1, max_length, -1)
        layout.lengths = lengths  # type: ignore[attr-defined]
        options["attention_mask"] = layout
    states: Tensor = backbone(input_ids=input_ids[None], **options).last_hidden_state
    return states[0]


def _positions(bare: nn.Module, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Positions (T,) that start anew with every text."""
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=len(input_ids))
    padding = getattr(getattr(bare, "embeddings", None), "padding_idx", None)
    if padding is None:
        return torch.arange(len(input_ids), device=input_ids.device) - starts
    # RoBERTa and its relatives count from padding_idx + 1, and only tokens that are not the padding token.
    counted = input_ids != padding
    before = F.pad(counted.cumsum(0), (1, 0))
    positions: Tensor = (before[1:] - before[starts]) * counted + padding
    return positions


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function of AttentionInterface: query (1, H, T, E), key and value (1, heads, T, E) -> (1, T, H, E).

    `attention_mask` (1, 1, max_length, B+1) int32 holds the texts' offsets; with other masks it is transformers' own
    function for `sdpa`. A token sees those of its text, at most `sliding_window` - 1 positions away.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return output
    if any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache")):
        raise ValueError("packed texts go with no position bias, cap, sink or cache in the attention")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if torch.is_autocast_enabled(query.device.type):  # as sdpa is under autocast
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    if _has_kernel(query, value) and dropout == 0:
        reach = -1 if sliding_window is None else sliding_window - 1
        offsets, longest = attention_mask[0, 0, 0], attention_mask.shape[2]
        rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # (T, heads, E)
        window = (reach, 0 if causal else reach)
        kernel: Any = varlen.varlen_attn
        states = kernel(*rows, offsets, offsets, longest, longest, scale=scaling, window_size=window, enable_gqa=True)
        return states[None], None
    return _attend_by_length(module, query, key, value, attention_mask, dropout, scaling, causal, sliding_window), None


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's own flash attention takes these tensors with texts of any length."""
    if (
        varlen is None
        or query.device.type != "cuda"
        or query.dtype not in (torch.float16, torch.bfloat16)
        or torch.version.hip
    ):
        return False
    size = query.shape[3]
    return (
        size == value.shape[3]
        and size % 8 == 0
        and size <= 256
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_length(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Attention (1, T, H, E), neighbouring texts of one length at a time."""
    lengths: Sequence[int] | None = getattr(layout, "lengths", None)  # lost where a model copies its mask
    runs = _runs(layout[0, 0, 0].diff().tolist() if lengths is None else lengths)
    sizes = [count * length for count, length in runs]
    if sum(sizes) != query.shape[2]:
        raise ValueError(f"the offsets of packed texts end at {sum(sizes)}, but there are {query.shape[2]} tokens")
    parts = []
    # Split, not sliced: the gradients of slices would each fill a tensor of the whole's size.
    for (count, length), *states in zip(runs, *(torch.split(x, sizes, 2) for x in (query, key, value)), strict=True):
        if count > 1:  # (1, heads, count * L, E) -> (count, heads, L, E)
            states = [x.unflatten(2, (count, length))[0].transpose(0, 1) for x in states]
        mask = None
        if window is not None and window < length:
            mask = _band(length, window, causal, query.device)
        if 0 < dropout < 1 and query.device.type == "cpu":
            part = dropped.attention(*states, mask, dropout, scaling, causal)
        else:
            part, _ = sdpa_attention_forward(module, *states, mask, dropout, scaling, causal)  # (count, L, H, E)
        parts.append(part.flatten(0, 1))
    return torch.cat(parts)[None]


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(number of texts, their length) of each run of texts of one length, without empty ones."""
    return [(len(list(run)), length) for length, run in groupby(length for length in lengths if length)]


def _band(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """(1, 1, L, L), true where a token sees another."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    near = distance.abs() < window
    return (near & (distance >= 0) if causal else near)[None, None]


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _window(config: Any) -> int:
    """The shortest window or chunk of a configuration in tokens, UNLIMITED without any."""
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([UNLIMITED, *(size for size in found if isinstance(size, int) and size > 0)])


@torch.no_grad()
def _probe_limit(backbone: nn.Module, switch: bool) -> int:
    bare: Any = bare_model(backbone)
    window, positions = _window(bare.config), position_limit(backbone) or UNLIMITED
    reached = window <= _PROBED_WINDOW
    lengths = [min(length, positions) for length in (11, 5, 5, window + 9 if reached else 8)]
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    works = False
    if switch:
        bare.set_attn_implementation(IMPLEMENTATION)
    try:
        with ExitStack() as stack:
            stack.enter_context(exact_rows(bare))
            weight = bare.get_input_embeddings().weight
            if not switch and weight.dtype == torch.float32:
                stack.enter_context(torch.autocast(weight.device.type, torch.bfloat16))  # as training will run it
            works = _same_as_padded(backbone, weight, lengths)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError):
        pass  # attention code of the model's own met something that it does not know
    finally:
        for module, training in modes.items():
            module.training = training
        if switch and not works:
            bare.set_attn_implementation("sdpa")
    if not works:
        return 0
    return UNLIMITED if reached else window


def _same_as_padded(backbone: nn.Module, weight: Tensor, lengths: Sequence[int]) -> bool:
    """Whether texts give the same packed as padded, and a change to one changes nothing in the others."""
    total, rows = sum(lengths), weight.shape[0]
    ids = (torch.arange(total, device=weight.device) * 7 + 5) % rows
    cu_seqlens = torch.tensor([0, *lengths], device=weight.device).cumsum(0)
    texts = torch.split(ids, list(lengths))
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    expected = hidden_states(backbone, pad_sequence(list(texts), batch_first=True), mask)[mask.bool()].double()
    found = _run(backbone, ids, cu_seqlens, lengths).double()
    against_padded, between_texts = _TOLERANCE.get(weight.dtype, _HALF_TOLERANCE)
    if not float((found - expected).norm()) <= against_padded * float(expected.norm()):
        return False
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        inside = torch.zeros(total, dtype=torch.bool, device=ids.device)
        inside[start : start + length] = True
        changed = torch.where(inside, (ids + rows // 2) % rows, ids)
        difference = (_run(backbone, changed, cu_seqlens, lengths).double() - found).norm(dim=1)
        if not float(difference[~inside].norm()) <= between_texts * float(difference[inside].norm()):
            return False
    return True
