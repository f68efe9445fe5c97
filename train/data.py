"""Rows of training data -> examples -> batches of tokens.

A row has the fields of `cfli/bge-full-data`: `query`, `pos` (list), `neg` (list), `pos_scores` and `neg_scores` (lists
of teacher scores, or null), `prompt` (instruction, or null) and `type`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lens.bag import lay_out
from lens.files import read_tensors
from lens.text import TextProcessor, Tokens, token_batches
from train.config import ALIASES, OWN_NEGATIVES_TYPES, TYPES
from train.sampler import Schedule

# Legend: Q queries of one rank's share of a batch, P passages per query, T tokens of all texts, D hidden size.

Key = tuple[str, Any, str | None]  # text, kind, instruction


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a query, its positives and hard negatives, and their teacher scores where there are any."""

    query: str
    pos: list[str]
    neg: list[str]
    pos_scores: list[float | None] | None
    neg_scores: list[float | None] | None
    prompt: str | None
    type: str

    @property
    def symmetric(self) -> bool:
        """Whether passages carry the instruction too."""
        return self.type in ("symmetric_sts", "symmetric_clustering")

    @property
    def own_negatives_only(self) -> bool:
        """Class and clustering data: another query's passage may share this query's label."""
        return self.type in OWN_NEGATIVES_TYPES


def parse_example(row: Mapping[str, Any], group_size_of: Callable[[str], int] | None = None) -> Example:
    """The example of a row; raises ValueError naming the field that training, in groups of this size, could not use."""
    query, pos, neg = row.get("query"), row.get("pos"), row.get("neg") or []
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"`query` must be a text that is not empty, found {query!r:.80}")
    for name, texts in (("pos", pos), ("neg", neg)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`{name}` must be a list of texts, found {texts!r:.80}")
        if not all(text.strip() for text in texts):
            raise ValueError(f"`{name}` holds an empty text")
    if not pos:
        raise ValueError("`pos` must hold at least one text")
    prompt, kind = row.get("prompt"), row.get("type") or "retrieval"
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in TYPES:
        raise ValueError(f"`type` must be one of {', '.join(TYPES)}; found {kind!r:.80}")
    if group_size_of is not None:
        size = group_size_of(kind)
        if not neg and size > 1:
            raise ValueError(f"`neg` is empty but group_size={size} needs hard negatives: mine some or set it to 1")
        if size == 1 and kind in OWN_NEGATIVES_TYPES:
            raise ValueError(f"`type` {kind} takes own negatives only, and group_size=1 leaves none: raise it")
    scores = []
    for name, texts in (("pos_scores", pos), ("neg_scores", neg)):
        values = row.get(name) or None
        if values is not None and (
            not isinstance(values, list)
            or len(values) != len(texts)
            or not all(
                v is None or (isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e30) for v in values
            )
        ):
            raise ValueError(f"`{name}` must be null or {len(texts)} finite numbers, found {values!r:.80}")
        scores.append(values)
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"`prompt` must be a text or null, found {prompt!r:.80}")
    return Example(query, pos, neg, scores[0], scores[1], prompt or None, kind)


@dataclass(frozen=True, slots=True)
class Group:
    """One query's place in a batch: its example, the chosen positive and negatives, their teacher scores."""

    example: Example
    passages: list[str]  # P, the positive first
    scores: list[float] | None  # P


def choose(example: Example, group_size: int, rng: random.Random) -> Group:
    """Draws one positive and group_size - 1 negatives; too few negatives are repeated before drawing."""
    positive = rng.randrange(len(example.pos))
    wanted = 1 if example.type == "only_1neg" and group_size > 1 else group_size - 1
    picks: list[int] = []
    if wanted:
        pool = list(range(len(example.neg))) * math.ceil(wanted / len(example.neg))
        picks = rng.sample(pool, wanted)
    found: list[float | None] = [None if example.pos_scores is None else example.pos_scores[positive]]
    found += [None if example.neg_scores is None else example.neg_scores[i] for i in picks]
    scores = [score for score in found if score is not None]
    passages = [example.pos[positive], *(example.neg[i] for i in picks)]
    return Group(example, passages, scores if len(scores) == len(found) else None)


class TeacherEmbeddings:
    """A bi-encoder's embeddings of all training texts, as train/score.py writes them.

    The file holds `embeddings` (N, E) float16 and `keys` (N,) int64, the hashes of the texts. Raises ValueError when
    a text of `sources` is missing, or one that is asked for later.
    """

    def __init__(self, path: str | Path, sources: Iterable[Iterable[Example]]) -> None:
        self.path = path
        tensors = read_tensors(path, {"embeddings": (None, None), "keys": (None,)})
        self.embeddings = tensors["embeddings"]
        self.rows = {key: row for row, key in enumerate(tensors["keys"].tolist())}
        for source in sources:
            for example in source:
                for text in (example.query, *example.pos, *example.neg):
                    self._row(text)

    def _row(self, text: str) -> int:
        row = self.rows.get(text_key(text))
        if row is None:
            raise ValueError(f"{self.path} has no embedding of {text[:60]!r}: score the same data again")
        return row

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, E) float32 of the texts."""
        return self.embeddings[[self._row(text) for text in texts]].float()


def _keys(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Numbers of the texts that are no negatives of each query, its positives and itself, (Q, M), padded with -1, and
    of the passages (Q*P,)."""
    own = [torch.tensor([text_key(text) for text in (*g.example.pos, g.example.query)]) for g in groups]
    padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-1)
    return padded, torch.tensor([text_key(passage) for group in groups for passage in group.passages])


def text_key(text: str) -> int:
    """A 63-bit hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Batches(Dataset[dict[str, Any]]):
    """Item `step` is this rank's share of the batch of that step: a pure function of (seed, step).

    With `store` (see train.states) texts become the frozen backbone's hidden states instead of token ids;
    `group_size_of`, a function of the examples' type, takes the place of `group_size`. With `packed`, texts are laid
    one after another without padding.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Example]],
        schedule: Schedule,
        text: TextProcessor,
        group_size: int,
        in_batch_negatives: bool = True,
        rank: int = 0,
        world_size: int = 1,
        store: Any = None,
        teacher: TeacherEmbeddings | None = None,
        group_size_of: Callable[[str], int] | None = None,
        mini_batch_tokens: int | None = None,
        packed: bool = False,
    ) -> None:
        for size in schedule.batch_sizes:
            if size % world_size:
                raise ValueError(f"batch_size={size} must be a multiple of the {world_size} ranks")
        self.sources = sources
        self.schedule = schedule
        self.text = text
        self.group_size = group_size
        self.group_size_of = group_size_of
        self.in_batch_negatives = in_batch_negatives
        self.rank, self.world_size = rank, world_size
        self.store = store
        self.teacher = teacher
        self.mini_batch_tokens = mini_batch_tokens
        self.packed = packed
        self.refreshed: Callable[[int, int, int, Example], Example] | None = None
        """Gives examples the negatives of their batch, see train/refresh.py."""

    def __len__(self) -> int:
        return self.schedule.steps

    def groups(self, step: int) -> list[Group]:
        """The groups of the whole batch of `step`, all ranks together, in order."""
        source, indices = self.schedule.batch(step)
        examples = [self.sources[source][index] for index in indices]
        if self.refreshed is not None:
            refreshed = self.refreshed
            examples = [refreshed(step, source, *pair) for pair in zip(indices, examples, strict=True)]
        size = self.group_size if self.group_size_of is None else self.group_size_of(examples[0].type)
        return [choose(item, size, self.schedule.rng(step, position)) for position, item in enumerate(examples)]

    def __getitem__(self, step: int) -> dict[str, Any]:
        groups = self.groups(step)
        distill = all(group.scores is not None for group in groups)  # one gap switches it off for the whole batch
        share = len(groups) // self.world_size
        groups = groups[self.rank * share : (self.rank + 1) * share]
        teacher = torch.tensor([group.scores for group in groups], dtype=torch.float32) if distill else None
        own_only = groups[0].example.own_negatives_only or not self.in_batch_negatives
        vectors = None
        if self.teacher is not None:
            vectors = (
                self.teacher([group.example.query for group in groups]),
                self.teacher([passage for group in groups for passage in group.passages]),
            )
        queries = [(group.example.query, "query", group.example.prompt) for group in groups]
        passages = [
            (passage, "document", group.example.prompt if group.example.symmetric else None)
            for group in groups
            for passage in group.passages
        ]
        return {
            "keys": _keys(groups),
            "teacher_vectors": vectors,  # ((Q, E), (Q*P, E)) or None
            **self._texts(queries, passages),
            "teacher": teacher,  # (Q, P) or None
            "in_batch": not own_only,
        }

    def _texts(self, queries: list[Key], passages: list[Key]) -> dict[str, Any]:
        """`queries`, `passages` and `mini_batches` as QueryPassageModel takes them."""
        bags = None
        if self.text.config.query_encoder == "bag":
            bags, queries = lay_out(tokenize(self.text, queries)).inputs(), []
        if self.mini_batch_tokens is None:
            found = self._inputs(queries) if bags is None else bags
            return {"queries": found, "passages": self._inputs(passages), "mini_batches": None}
        texts = [*queries, *passages]
        if self.store is not None:
            parts = token_batches(self.store.lengths(texts), self.mini_batch_tokens, self.packed)
            inputs = [self.store.batch([texts[i] for i in part]) for part in parts]
        else:
            tokens = tokenize(self.text, texts)
            parts = token_batches([len(item.ids) for item in tokens], self.mini_batch_tokens, self.packed)
            inputs = [self._collate([tokens[i] for i in part]) for part in parts]
        places = torch.empty(len(texts), dtype=torch.long)
        places[torch.tensor([i for part in parts for i in part])] = torch.arange(len(texts))
        found = places[: len(queries)] if bags is None else bags
        return {"queries": found, "passages": places[len(queries) :], "mini_batches": inputs}

    def _inputs(self, texts: list[Key]) -> dict[str, Any]:
        if self.store is not None:
            states: dict[str, Any] = self.store.batch(texts)
            return states
        return self._collate(tokenize(self.text, texts))

    def _collate(self, tokens: list[Tokens]) -> dict[str, Any]:
        return (self.text.pack(tokens) if self.packed else self.text.collate(tokens)).inputs()


def tokenize(text: TextProcessor, texts: Sequence[Key]) -> list[Tokens]:
    """Tokens of (text, kind, instruction) triples, in order; texts that share kind and instruction go together."""
    tokens: list[Tokens | None] = [None] * len(texts)
    together: dict[tuple[Any, str | None], list[int]] = {}
    for index, (_, kind, instruction) in enumerate(texts):
        together.setdefault((kind, instruction), []).append(index)
    for (kind, instruction), indices in together.items():
        for index, item in zip(indices, text([texts[i][0] for i in indices], kind, instruction), strict=True):
            tokens[index] = item
    return [item for item in tokens if item is not None]
