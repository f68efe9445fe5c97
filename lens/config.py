"""LensConfig: the frozen facts of a model, as they stand in `lens.json` of its artifact."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

FORMAT_VERSION = 1

Architecture = Literal["decoder", "encoder"]
Head = Literal["clusters", "vocabulary", "dense"]
Transform = Literal["none", "mlm", "residual", "context"]
TransformActivation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Activation = Literal["log1p", "log1p_twice"]
Pooling = Literal["max", "sum", "last"]
Positions = Literal["shifted", "content", "all"]
Prompt = Literal["lens", "plain"]
Truncation = Literal["text", "tail"]
QueryEncoder = Literal["model", "bag"]


@dataclass(frozen=True)
class LensConfig:
    """What a LENS model is: its backbone, attention, head, pooling, prompt and lengths."""

    base: str
    """Backbone: a folder or a hub id. Ignored on loading when the artifact holds backbone weights itself."""
    revision: str | None = None
    """Commit of the backbone on the hub; None for a folder or the newest."""
    architecture: Architecture = "decoder"
    """`decoder`: a causal LM; `encoder`: BERT and its relatives."""
    bidirectional: bool = True
    """Whether a decoder's causal mask is lifted (LENS) or kept (the paper's ablation)."""
    head: Head = "clusters"
    """`clusters`: centroids of the vocabulary; `vocabulary`: the LM head's own rows, as in SPLADE; `dense`: none, the
    embedding is the hidden state of the last pooled position (the paper's dense ablation)."""
    dimensions: int = 0
    """K, the number of embedding dimensions."""
    hidden_size: int = 0
    """D, the width of the backbone's hidden states and of the head's rows."""
    bias: bool = False
    """Whether the head adds a bias (K,) to the logits, as MLM decoders do."""
    transform: Transform = "none"
    """Layer between hidden states and head: `mlm` = dense, activation, LayerNorm as in BERT's MLM head;
    `residual` = x + dense(GELU(dense(LayerNorm(x)))), which starts as the identity; `context` = x + gate * (mean of
    the text's pooled x), for backbones that were trained to hold a text's meaning in that mean."""
    transform_activation: TransformActivation = "gelu"
    """Activation of the `mlm` transform; `gelu_tanh` is GELU's approximation by tanh."""
    transform_eps: float = 1e-12
    """What the `mlm` transform's LayerNorm adds to the variance."""
    activation: Activation = "log1p"
    """What becomes of a logit x: `log1p` = log(1 + relu(x)); `log1p_twice` = log(1 + log(1 + relu(x))), as in
    OpenSearch's models of the third generation (arXiv 2504.14839)."""
    pooling: Pooling = "max"
    """How the positions of a text become one vector; `last` takes the text's final position."""
    positions: Positions = "shifted"
    """Pooled positions: `shifted` = those that predict a content token (causal LMs: output i predicts token i+1),
    `content` = the content tokens themselves (encoders), `all` = every token, special ones too (SPLADE)."""
    prompt: Prompt = "lens"
    """`lens`: <instruct>{instruction}\\n<query>{text}; `plain`: {instruction} {text}. Instructions are never pooled."""
    instruction: str | None = None
    """Instruction of queries when none is given on encoding."""
    query_max_length: int = 512
    """Longest query in tokens, instruction and special tokens included; the text's end is cut."""
    document_max_length: int = 512
    """Longest document in tokens, special tokens included; the text's end is cut."""
    truncation: Truncation = "text"
    """What too long a text loses: `text` = its own end, so that EOS stays; `tail` = whatever stands last, EOS too, as
    in the released LENS code."""
    normalize: bool = True
    """Whether embeddings are L2-normalised (LENS) or left as they are (SPLADE)."""
    query_encoder: QueryEncoder = "model"
    """`model`: queries go through backbone and head, as documents do; `bag`: a query is the bag of its tokens, without
    a backbone (splade-doc, see lens/bag.py): an instruction then changes nothing."""

    def __post_init__(self) -> None:
        for field, kind in _CHOICES.items():
            value = getattr(self, field)
            if value not in get_args(kind):
                raise ValueError(f"{field} must be one of {', '.join(get_args(kind))}; found {value!r}")
        for field in ("bidirectional", "bias", "normalize"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false; found {getattr(self, field)!r}")
        if not isinstance(self.base, str) or not self.base:
            raise ValueError(f"base must name a backbone (a folder or a hub id); found {self.base!r}")
        for field in ("query_max_length", "document_max_length"):
            value = getattr(self, field)
            if type(value) is not int or value < 4:
                raise ValueError(f"{field} must be a whole number of at least 4 tokens; found {value!r}")
        if type(self.hidden_size) is not int or type(self.dimensions) is not int:
            raise ValueError(
                f"hidden_size and dimensions must be whole numbers, found {self.hidden_size!r}, {self.dimensions!r}"
            )
        if self.hidden_size < 1 or self.dimensions < 2:
            raise ValueError(
                f"hidden_size must be at least 1 and dimensions at least 2; found {self.hidden_size} "
                f"and {self.dimensions}"
            )
        if type(self.transform_eps) not in (float, int) or not 0 < self.transform_eps < 1:
            raise ValueError(f"transform_eps must be a number from above 0 to below 1; found {self.transform_eps!r}")
        if self.activation == "log1p_twice" and self.pooling == "sum":
            raise ValueError("activation='log1p_twice' contradicts pooling='sum': take pooling='max'")
        if self.head == "dense":
            other = {"pooling": self.pooling != "last", "transform": self.transform != "none", "bias": self.bias}
            other |= {"activation": self.activation != "log1p", "query_encoder": self.query_encoder != "model"}
            for field in (field for field, contradicts in other.items() if contradicts):
                raise ValueError(
                    f"{field}={getattr(self, field)!r} contradicts head='dense', which takes the last position's state"
                )
            if self.dimensions != self.hidden_size:
                raise ValueError(f"dimensions must be hidden_size={self.hidden_size} with head='dense'")
        if self.architecture == "encoder":
            if not self.bidirectional:
                raise ValueError("bidirectional=False contradicts architecture='encoder': encoders have no causal mask")
            if self.positions == "shifted":
                raise ValueError("positions='shifted' contradicts architecture='encoder': use 'content' or 'all'")

    @property
    def longest(self) -> int:
        """Tokens of the longest text that goes through the backbone."""
        if self.query_encoder == "bag":
            return self.document_max_length
        return max(self.query_max_length, self.document_max_length)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LensConfig:
        """Raises ValueError naming unknown fields (with the nearest known one) and missing ones."""
        check_fields(values, (field.name for field in dataclasses.fields(cls)), "configuration")
        if "base" not in values:
            raise ValueError("configuration lacks the field base")
        return cls(**values)

    def replace(self, **changes: Any) -> LensConfig:
        """A copy with some fields changed; unknown names raise as in `from_dict`."""
        return LensConfig.from_dict({**self.to_dict(), **changes})


_CHOICES = {
    "architecture": Architecture,
    "head": Head,
    "transform": Transform,
    "transform_activation": TransformActivation,
    "activation": Activation,
    "pooling": Pooling,
    "positions": Positions,
    "prompt": Prompt,
    "truncation": Truncation,
    "query_encoder": QueryEncoder,
}


def check_fields(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises ValueError for the first name in `given` that is not in `known`, suggesting the nearest."""
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"unknown field {name!r} in the {what}; {hint}")
