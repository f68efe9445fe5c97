"""What a teacher is, said by its folder alone: a cross-encoder, a prompted language model or a bi-encoder.

A `Teacher` names the distinct things it has to compute for pairs of query and passage (pairs, or texts), loads the
model that computes them (train/rerankers.py), and turns what came back into a score for every pair.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from numpy.typing import NDArray
from scipy import sparse

from lens.backbone import architecture_of, load_config, quiet
from lens.devices import resolve_dtype
from lens.files import read_json, require
from train.rows import brief

# Legend: n pairs, m distinct things that a teacher computes, D dimensions of an embedding.

Kind = Literal["cross", "llm", "mean", "sentence", "lens"]
Scores = NDArray[np.float32]
Item = tuple[str, ...]
"""What a teacher computes one of: (query, passage), (query, passage, instruction) or (text, role, instruction)."""
Compute = Callable[[Sequence[Item]], Any]
"""m items -> m scores, or m embeddings (m, D) as an array or CSR matrix."""

LENGTHS = {"cross": 512, "llm": 1024, "mean": 256}
"""Tokens at which texts are cut unless told otherwise; other kinds know their own length."""
MARKERS = {"lens": "lens.json", "sentence": "modules.json"}
"""Files at the top of models that may hold no config.json there."""
BLOCK = 1 << 16
"""Pairs whose inner products are taken at a time."""


class Pair(NamedTuple):
    """A query and a passage; `symmetric`: the passage carries the instruction too. "" is no instruction."""

    query: str
    passage: str
    instruction: str = ""
    symmetric: bool = False


@dataclass(frozen=True)
class Prompt:
    """How a language model is asked about a pair, and which words, a token each, it may answer.

    The score is the logit of `yes`, less that of `no` where there is one, after the last token of `text`, in which
    {query} and {passage} stand for the pair and {instruction}, optional, for the example's (else `instruction`).
    """

    text: str
    yes: str
    no: str | None
    instruction: str = ""


PROMPTS = {
    "bge": Prompt(
        "A: {query}\nB: {passage}\nGiven a query A and a passage B, determine whether the passage contains an answer "
        "to the query by providing a prediction of either 'Yes' or 'No'.",
        yes="Yes",
        no=None,
    ),
    "qwen3": Prompt(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        yes="yes",
        no="no",
        instruction="Given a web search query, retrieve relevant passages that answer the query",
    ),
}
"""Prompts that released rerankers were trained with: bge-reranker-v2-gemma, Qwen3-Reranker."""
PLACEHOLDER = re.compile(r"\{(query|passage|instruction)\}")


def parse_prompt(value: str, yes: str | None = None, no: str | None = None) -> Prompt:
    """A prompt by its name in PROMPTS, as text, or as @FILE; `yes` and `no` replace its answers, "" for no `no`.

    Raises FileNotFoundError, and ValueError for a text without the placeholders.
    """
    if value in PROMPTS:
        prompt = PROMPTS[value]
    else:
        text = value
        if value.startswith("@"):
            try:
                text = Path(value[1:]).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"--prompt {value}: not UTF-8 text: {error}") from error
        prompt = Prompt(text, "Yes", "No")
        found = PLACEHOLDER.findall(text)
        for name in ("query", "passage", "instruction"):
            if found.count(name) > 1 or (name != "instruction" and name not in found):
                raise ValueError(
                    f"--prompt {value[:60]!r} must hold {{query}} and {{passage}} once each, and {{instruction}} at "
                    f"most once; found {{{name}}} {found.count(name)} times. Named prompts: {', '.join(PROMPTS)}"
                )
    return replace(prompt, yes=yes or prompt.yes, no=prompt.no if no is None else no or None)


@dataclass(frozen=True)
class Options:
    """How teachers compute: lengths in tokens, dtype, tokens of one batch, activation, prompt; None: their own."""

    max_length: int | None = None
    dtype: str | None = None
    batch_tokens: int | None = None
    activation: bool = False
    prompt: Prompt = PROMPTS["bge"]


@dataclass(frozen=True)
class Teacher:
    """A teacher by its kind and folder or hub id, nothing of it loaded."""

    kind: Kind
    path: str
    options: Options

    @property
    def name(self) -> str:
        """As it is named on the command line."""
        return f"{'bi' if self.kind in ('mean', 'sentence') else self.kind}={self.path}"

    @property
    def max_length(self) -> int | None:
        """Tokens at which its input is cut; None: the model's own length."""
        return self.options.max_length or LENGTHS.get(self.kind)

    def items(self, pairs: Sequence[Pair]) -> list[Item]:
        """The distinct things to compute for those pairs, in order of appearance."""
        found: dict[Item, None] = {}
        for pair in pairs:
            found.update(dict.fromkeys(self._items(pair)))
        return list(found)

    def _items(self, pair: Pair) -> tuple[Item, ...]:
        if self.kind == "cross":
            return ((pair.query, pair.passage),)
        if self.kind == "llm":
            asked = "{instruction}" in self.options.prompt.text
            return ((pair.query, pair.passage, pair.instruction if asked else ""),)
        if self.kind == "mean":
            return (pair.query, "", ""), (pair.passage, "", "")
        if self.kind == "sentence":
            return (pair.query, "query", ""), (pair.passage, "document", "")
        return (
            (pair.query, "query", pair.instruction),
            (pair.passage, "document", pair.instruction if pair.symmetric else ""),
        )

    def scores(self, pairs: Sequence[Pair], items: Sequence[Item], computed: Any) -> Scores:
        """Scores (n,) of the pairs from what was computed for their items: (m,) scores or (m, D) embeddings."""
        row = {item: number for number, item in enumerate(items)}
        rows = np.array([[row[item] for item in self._items(pair)] for pair in pairs]).reshape(len(pairs), -1)
        if rows.shape[1] == 1:
            return np.asarray(computed, dtype=np.float32)[rows[:, 0]]
        parts = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(pairs), BLOCK):
            queries, passages = (computed[rows[start : start + BLOCK, side]] for side in (0, 1))  # (BLOCK, D) each
            if sparse.issparse(queries):
                parts.append(np.asarray(queries.multiply(passages).sum(axis=1), dtype=np.float32).ravel())
            else:
                parts.append(np.einsum("nd,nd->n", queries, passages))
        return np.concatenate(parts)

    def load(self, device: torch.device) -> Compute:
        """Reads the model onto a device; raises ValueError naming the teacher, ImportError for what is not there."""
        from train import rerankers

        kinds: dict[str, Callable[[Teacher, torch.device, torch.dtype], Compute]] = {
            "cross": rerankers.cross_encoder,
            "llm": rerankers.PromptedModel,
            "mean": rerankers.mean_pooled,
            "sentence": rerankers.sentence_transformer,
            "lens": rerankers.lens_model,
        }
        dtype = self.options.dtype or (None if self.kind in ("llm", "lens") else "float32")
        try:
            with quiet():
                return kinds[self.kind](self, device, resolve_dtype(dtype, device))
        except ImportError:
            raise
        except Exception as error:  # each library has its own for damaged folders
            raise ValueError(f"teacher {self.name} cannot be used: {brief(error)}") from error

    def facts(self) -> dict[str, Any]:
        """What its scores depend on, for the manifest and to see whether it changed: options and hashes of its files,
        or the commit of a hub id."""
        folder = Path(self.path).expanduser()
        facts: dict[str, Any] = {"model": self.path, "kind": self.kind, "max_length": self.max_length}
        facts |= {"dtype": self.options.dtype, "batch_tokens": self.options.batch_tokens}
        if self.kind == "cross":
            facts["activation"] = "model" if self.options.activation else "none"
        if self.kind == "llm":
            facts["prompt"] = vars(self.options.prompt)
        if folder.is_dir():
            files = sorted(file for file in folder.rglob("*") if file.is_file() and _matters(file.relative_to(folder)))
            facts["sha256"] = {str(file.relative_to(folder)): digest(file) for file in files}
        elif self.kind in MARKERS:
            marker = _holds(self.path, MARKERS[self.kind])
            facts["commit"] = marker.parent.name if marker else None  # .../snapshots/COMMIT/FILE
        else:
            facts["commit"] = getattr(load_config(self.path), "_commit_hash", None)
        return facts


def _matters(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and not path.name.endswith(".md") and not path.parts[0].startswith("checkpoint-")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_teacher(argument: str, options: Options) -> Teacher:
    """The teacher that `cross=PATH`, `llm=PATH`, `bi=PATH`, `lens=PATH` or a bare PATH names, each a folder or hub id.

    A bare PATH is a cross-encoder where its configuration says so, a LENS model where it holds lens.json, else a
    bi-encoder with mean pooling. Raises FileNotFoundError or ValueError, saying what is needed.
    """
    kind, separator, path = argument.partition("=")
    if not separator or Path(argument).exists():
        kind, path = "", argument
    elif kind not in ("cross", "llm", "bi", "lens"):
        raise ValueError(
            f"--model {argument}: {kind!r} is no kind of teacher; write cross=, llm=, bi= or the bare path"
        )
    if not path:
        raise ValueError(f"--model {argument!r} names no folder or hub id")
    lens_model, modules = _holds(path, MARKERS["lens"]), _holds(path, MARKERS["sentence"])
    described = modules and _holds(path, SENTENCE_FILE)
    saved = read_json(described) if described else {}
    sparse_encoder = kind == "bi" and saved.get("model_type") == SPARSE_MODEL
    if kind == "lens" or (lens_model and kind in ("", "bi")) or sparse_encoder:
        if not (lens_model or modules):
            load_config(path)
        return Teacher("lens", path, options)
    if modules and kind == "bi" and saved.get("model_type", SENTENCE_MODEL) == SENTENCE_MODEL:
        require("sentence-transformers", "sentence_transformers")
        return Teacher("sentence", path, options)
    config = load_config(path)
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if kind == "cross" or (kind == "" and (_classifies(architecture) or saved.get("model_type") == CROSS_MODEL)):
        _check_cross_encoder(path, architecture, config, saved)
        return Teacher("cross", path, options)
    if kind == "llm":
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")) or architecture_of(config) != "decoder":
            raise ValueError(
                f"llm={path} is no causal language model ({architecture}): name one, or write cross= or bi="
            )
        return Teacher("llm", path, options)
    return Teacher("mean", path, options)


SENTENCE_FILE = "config_sentence_transformers.json"
SENTENCE_MODEL, SPARSE_MODEL, CROSS_MODEL = "SentenceTransformer", "SparseEncoder", "CrossEncoder"
"""Model types that sentence-transformers writes there."""


def _classifies(architecture: str) -> bool:
    return architecture.endswith("ForSequenceClassification")


def _check_cross_encoder(path: str, architecture: str, config: Any, saved: dict[str, Any]) -> None:
    require("sentence-transformers", "sentence_transformers")
    labels = getattr(config, "num_labels", 1)
    if saved.get("model_type") == CROSS_MODEL and not _classifies(architecture):
        return
    if architecture.endswith("ForCausalLM"):
        raise ValueError(f"cross={path} is a causal language model ({architecture}): write llm={path} and a --prompt")
    if not _classifies(architecture):
        raise ValueError(
            f"cross={path} is no cross-encoder ({architecture}): one for sequence classification with a single label "
            f"is needed; as a bi-encoder it is bi={path}"
        )
    if labels != 1:
        raise ValueError(
            f"{path} is a classifier of {labels} labels: a teacher needs a single one, the relevance (num_labels=1); "
            f"its encoder alone, with mean pooling, is bi={path}"
        )


def _holds(path: str, name: str) -> Path | None:
    """The file of that name in a folder or hub repository, None where there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        return None
    try:
        return Path(hf_hub_download(path, name))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return None
