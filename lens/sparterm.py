"""SparTerm (arXiv 2010.00768): which vocabulary terms stand for a text (a gate), and how much each counts (importance).

With the states h_i of a text's tokens, E the rows of the language model's head and T, T' two transforms,

    importance_j = sum_i relu(T(h_i) . E_j + b_j),    gate_j = sigmoid(max_i T'(h_i) . E_j + b'_j),

and the embedding is importance times a mask: `literal` keeps the text's own terms, `expansion` the terms whose gate is
above a threshold and which the text does not hold, `enhanced` both. Texts are compared by inner product.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.sparse
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import lens
from lens.chunked import max_pool
from lens.config import LensConfig
from lens.deepct import read_config
from lens.devices import Device, resolve_device
from lens.files import read_tensors
from lens.head import MlmTransform, ResidualTransform
from lens.model import LensModel, build_model, load_model
from lens.text import Kind, TextProcessor, check_texts, token_batches
from lens.vectors import to_csr

# Legend: B texts, T pooled tokens of all texts, D hidden size, K terms: the vocabulary, or its clusters.

CONFIG_FILE, GATE_FILE, IMPORTANCE_FOLDER = "sparterm.json", "gate.safetensors", "importance"
FORMAT_VERSION = 1
CLOSED = -30.0
"""Gate logit of every term of a text without tokens."""
Mode = Literal["literal", "expansion", "enhanced"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class SparTermConfig:
    """The facts of a model beside its importance predictor's, as they stand in sparterm.json."""

    mode: Mode = "enhanced"
    """Terms that stand for a document: its own (`literal`), those that the gate adds (`expansion`), or both."""
    query_mode: Mode = "literal"
    """The same for queries."""
    threshold: float = 0.5
    """The binariser: gate probability above which a term is added."""
    gate_trained: bool = False
    """Whether the gate was trained; without, only `literal` can be used."""

    def __post_init__(self) -> None:
        for field in ("mode", "query_mode"):
            if getattr(self, field) not in MODES:
                raise ValueError(f"{field} must be one of {', '.join(MODES)}; found {getattr(self, field)!r}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, found {self.threshold!r}")


class Terms(NamedTuple):
    """What a model finds in B texts: embeddings (B, K), gate logits (B, K) but in mode literal, own terms (B, K)."""

    embeddings: Tensor
    gate: Tensor | None
    own: Tensor


def mask(mode: Mode, own: Tensor, gate: Tensor | None, threshold: float) -> Tensor:
    """The terms that stand for texts, (B, K) bool, from their own terms and the gate's logits, both (B, K).

    Raises ValueError where the mode needs the gate and there is none.
    """
    if mode == "literal":
        return own
    if gate is None:
        raise ValueError(f"mode={mode!r} needs the gate's logits")
    opened = torch.sigmoid(gate.float()) > threshold
    return opened & ~own if mode == "expansion" else opened | own


def importance(rows: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int], chosen: Tensor) -> Tensor:
    """Sums of relu(logit) over each text's rows, (T, D), (K, D), (K,) -> (B, K) float32, for the `chosen` terms
    (B, K) bool; 0 for all others. For the backward pass a text's logits are computed again."""

    def text(part: Tensor, terms: Tensor) -> Tensor:
        every = len(terms) == len(weight)
        columns = weight if every else weight[terms]
        own_bias = bias if every or bias is None else bias[terms]
        sums = torch.relu(F.linear(part, columns, own_bias)).float().sum(0)
        return sums if every else sums.new_zeros(len(weight)).index_copy(0, terms, sums)

    found = []
    for part, row in zip(torch.split(rows, list(lengths)), chosen, strict=True):
        terms = row.nonzero().squeeze(1)
        if torch.is_grad_enabled():
            found.append(checkpoint(text, part, terms, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(text(part, terms))
    return torch.stack(found) if found else weight.new_zeros(0, len(weight))


class Gate(nn.Module):
    """The gating controller: a transform and a bias (K,) of its own, over the importance predictor's rows.

    Both begin as the importance predictor's, or the transform as the identity where that has none.
    """

    def __init__(self, model: LensModel) -> None:
        super().__init__()
        head = model.head
        known = isinstance(head.transform, MlmTransform)
        self.transform = copy.deepcopy(head.transform) if known else ResidualTransform(model.config.hidden_size)
        bias = torch.zeros(model.config.dimensions) if head.bias is None else head.bias.detach().clone()
        self.bias = nn.Parameter(bias.float())


class SparTermModel(nn.Module):
    """Tokens in, embeddings, gate and own terms out. `importance` is a LensModel with a vocabulary head, or clusters.

    Raises ValueError for a decoder, whose positions describe other tokens than their own, and for a dense head.
    """

    def __init__(self, importance: LensModel, config: SparTermConfig) -> None:
        super().__init__()
        if importance.config.architecture != "encoder" or importance.config.head == "dense":
            raise ValueError(
                f"SparTerm needs an encoder with a vocabulary or clustered head, and {importance.config.base} is "
                f"{importance.config.architecture} with head={importance.config.head}"
            )
        self.importance, self.gate, self.config = importance, Gate(importance), config

    def forward(self, inputs: dict[str, Any], mode: Mode) -> Terms:
        """The terms of texts in a mode; `inputs` are LensModel's arguments (padded or packed)."""
        model, offsets, pooled = self.importance, inputs["pool_offsets"], inputs["pooled"]
        keys = ("input_ids", "attention_mask", "cu_seqlens", "lengths", "pooled")
        states = model.pooled_states(**{key: inputs[key] for key in keys if key in inputs})  # (T, D)
        states = states.to(model.head.weight.dtype)
        lengths = offsets.diff().tolist()
        head = model.head
        tokens = inputs["input_ids"].flatten().index_select(0, pooled)
        owner = torch.repeat_interleave(offsets.diff(), output_size=len(tokens))
        own = self.bag(owner, tokens, len(lengths))
        gate = None
        if mode != "literal":
            rows = self.gate.transform(states, offsets).to(head.weight.dtype)
            gate = max_pool(rows, head.weight, self.gate.bias, lengths).clamp(min=CLOSED)
        chosen = mask(mode, own, None if gate is None else gate.detach(), self.config.threshold)
        rows = head.transform(states, offsets)
        return Terms(importance(rows, head.weight, head.bias, lengths, chosen), gate, own)

    def bag(self, owner: Tensor, tokens: Tensor, count: int) -> Tensor:
        """The bags of `count` texts, (count, K) bool, from token ids (M,) and the texts they belong to (M,)."""
        terms = self.importance.head.labels[tokens].long()
        known = terms >= 0
        found = torch.zeros(count, self.importance.config.dimensions, dtype=torch.bool, device=tokens.device)
        found[owner[known], terms[known]] = True
        return found


class SparTerm:
    """A model with its tokenizer on a device; get one from `SparTerm.build` or `SparTerm.load`.

    It encodes as lens.LENS does, so that eval.scoring.lens_system takes it.
    """

    def __init__(self, model: SparTermModel, tokenizer: Any, device: Device | None = None) -> None:
        self.device = resolve_device(device)
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        self.text = TextProcessor(tokenizer, model.importance.config)

    @property
    def config(self) -> LensConfig:
        """The facts of the importance predictor."""
        return self.model.importance.config

    @classmethod
    def build(
        cls,
        base: str | os.PathLike[str],
        config: SparTermConfig | None = None,
        device: Device | None = None,
        **settings: Any,
    ) -> SparTerm:
        """An untrained model over an encoder (folder or hub id) with its MLM head, or with its word embeddings where it
        has none; `settings` are options of lens.model.build_model. Raises what that raises."""
        settings = {"normalize": False, "bias": True, "pooling": "sum", "prompt": "plain", **settings}
        importance, tokenizer = build_model(os.fspath(base), **settings)
        importance.backbone_is_own = True
        return cls(SparTermModel(importance, config or SparTermConfig()), tokenizer, device)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Device | None = None, **changes: Any) -> SparTerm:
        """Reads a folder that `write` filled; `changes` are fields of SparTermConfig, such as mode="literal".

        Raises FileNotFoundError or ValueError naming the file, and ValueError for a mode that needs the gate of a model
        that was trained without.
        """
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is no SparTerm model folder")
        config = replace(read_config(folder / CONFIG_FILE, FORMAT_VERSION, SparTermConfig), **changes)
        if not config.gate_trained and {config.mode, config.query_mode} != {"literal"}:
            raise ValueError(f"{folder} was trained in mode literal, without its gate: leave the mode literal")
        importance, tokenizer = load_model(folder / IMPORTANCE_FOLDER)
        model = SparTermModel(importance, config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.gate.state_dict().items()}
        tensors = read_tensors(folder / GATE_FILE, shapes)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise ValueError(f"{folder / GATE_FILE} holds NaN or infinite values; the file is damaged")
        model.gate.load_state_dict(tensors)
        return cls(model, tokenizer, device)

    def write(self, folder: Path) -> None:
        """Writes the artifact's files into an existing folder, sparterm.json last."""
        (folder / IMPORTANCE_FOLDER).mkdir()
        self.model.importance.write(folder / IMPORTANCE_FOLDER, self.tokenizer)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.gate.state_dict().items()}
        save_file(state, folder / GATE_FILE, {"format": "pt"})
        content = {"format_version": FORMAT_VERSION, "lens_version": lens.__version__, **asdict(self.model.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def encode_queries(self, texts: Sequence[str], instruction: str | None = None, output: str = "csr") -> Any:
        """`encode` of queries in the query mode."""
        return self.encode(texts, "query", instruction, output)

    def encode_documents(self, texts: Sequence[str], output: str = "csr") -> Any:
        """`encode` of documents in the mode."""
        return self.encode(texts, "document", None, output)

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], kind: Kind = "document", instruction: str | None = None, output: str = "csr"
    ) -> Any:
        """Embeddings (N, K) float32 of N texts, as scipy CSR or numpy array (`csr`, `numpy`).

        Raises TypeError or ValueError naming what is wrong, FloatingPointError for values that are not finite.
        """
        texts = check_texts(texts)
        if output not in ("csr", "numpy"):
            raise ValueError(f"output must be csr or numpy, found {output!r}")
        mode = self.model.config.query_mode if kind == "query" else self.model.config.mode
        tokens = self.text(texts, kind, instruction)
        budget = 1 << (11 if self.device.type == "cpu" else 15)
        parts, order = [], []
        with tqdm(total=len(texts), desc="SparTerm", unit="text", disable=None, leave=False) as bar:
            for rows in token_batches([len(item.ids) for item in tokens], budget):
                inputs = self.text.collate([tokens[row] for row in rows]).inputs(self.device)
                embeddings = self.model(inputs, mode).embeddings
                if not bool(torch.isfinite(embeddings).all()):
                    raise FloatingPointError("embeddings hold NaN or infinite values: train again")
                parts.append(to_csr(embeddings))
                order += rows
                bar.update(len(rows))
        if not parts:
            found = scipy.sparse.csr_matrix((0, self.config.dimensions), dtype=np.float32)
        else:
            restored = np.empty(len(texts), dtype=np.int64)
            restored[order] = np.arange(len(texts))
            found = scipy.sparse.vstack(parts, format="csr")[restored]
        return found if output == "csr" else found.toarray()
