"""Teachers loaded onto a device: functions from the items of train/teachers.py to scores or embeddings.

Batches hold texts of like length within a budget of tokens, and the batches of given items are always the same, so
that a score does not depend on what else was asked for before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import lens
from lens.backbone import load_tokenizer, position_limit
from lens.dense import Dense
from lens.text import token_batches
from train.teachers import PLACEHOLDER, Compute, Item, Scores, Teacher

# Legend: m items, D dimensions of an embedding, B pairs of a batch, L tokens, V vocabulary.

BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
SPECIAL_TOKENS = 4
"""Tokens at most that tokenizers put around and between the two texts of a pair."""


def _budget(teacher: Teacher, device: torch.device) -> int:
    return teacher.options.batch_tokens or BATCH_TOKENS.get(device.type, 1 << 13)


def cross_encoder(teacher: Teacher, device: torch.device, dtype: torch.dtype) -> Compute:
    """(query, passage) -> the score that sentence-transformers' CrossEncoder predicts, before its activation unless
    the options ask for it. Raises ValueError for a model of several labels."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(teacher.path, device=str(device), model_kwargs={"dtype": dtype})
    if model.num_labels != 1:
        raise ValueError(f"it has {model.num_labels} labels, and a teacher needs a single one, the relevance")
    limits = [teacher.max_length, model.max_seq_length, model.model and position_limit(model.model)]
    limit = min(found for found in limits if found)
    model.max_seq_length = limit
    budget = _budget(teacher, device)
    activation = None if teacher.options.activation else torch.nn.Identity()

    def compute(items: Sequence[Item]) -> Scores:
        texts = list(dict.fromkeys(text for pair in items for text in pair))
        tokens = model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        length = {text: len(ids) for text, ids in zip(texts, tokens, strict=True)}
        lengths = [min(sum(length[text] for text in pair) + SPECIAL_TOKENS, limit) for pair in items]
        scores = np.zeros(len(items), dtype=np.float32)
        for batch in token_batches(lengths, budget):
            pairs = [items[row] for row in batch]
            scores[batch] = model.predict(
                pairs, batch_size=len(pairs), activation_fn=activation, show_progress_bar=False
            )
        return scores

    return compute


class PromptedModel:
    """A causal language model that is asked about (query, passage, instruction): the logit of the answer yes after the
    prompt, less that of no where the prompt has one.

    Where the tokens are too many, the passage loses its end, then the query its own; the prompt stays whole.
    Raises ValueError for answers that are not one token each, and a length that the prompt alone takes.
    """

    def __init__(self, teacher: Teacher, device: torch.device, dtype: torch.dtype) -> None:
        self.prompt = teacher.options.prompt
        self.tokenizer = load_tokenizer(teacher.path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.answers = [self._answer(word) for word in (self.prompt.yes, self.prompt.no) if word]
        bos = self.tokenizer.bos_token_id
        begins = bos is not None and self.tokenizer("a")["input_ids"][0] == bos
        self.start = [bos] if begins and not self.prompt.text.startswith(self.tokenizer.bos_token) else []
        self.pieces = PLACEHOLDER.split(self.prompt.text)  # literal, placeholder, literal, ...
        model, report = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=dtype, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(report['missing_keys'])[:3])}")
        self.model = model.to(device).eval()
        self.device, self.budget = device, _budget(teacher, device)
        self.limit = min(found for found in (teacher.max_length, position_limit(model)) if found)
        alone = len(self._tokens([("", "", "")], cut=False)[0])
        if alone + 2 > self.limit:
            raise ValueError(f"the prompt alone takes {alone} of {self.limit} tokens: raise --max-length")
        known = inspect.signature(model.forward).parameters
        self.placed = "position_ids" in known  # else positions are relative, and padding moves none
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def _answer(self, word: str) -> int:
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"the answer {word!r} is {len(ids)} tokens, and one is needed: choose --yes and --no")
        return int(ids[0])

    def _tokens(self, items: Sequence[Item], cut: bool = True) -> list[list[int]]:
        """Ids of the filled prompts, of `limit` tokens at most where they are cut."""
        texts, spans = [], []
        for query, passage, instruction in items:
            values = {"query": query, "passage": passage, "instruction": instruction or self.prompt.instruction}
            text, places = "", {}
            for number, piece in enumerate(self.pieces):
                value = values[piece] if number % 2 else piece
                if number % 2:
                    places[piece] = len(text), len(text) + len(value)
                text += value
            texts.append(text)
            spans.append((places["passage"], places["query"]))
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found = []
        for ids, offsets, places in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            kept = list(range(len(ids)))
            for start, end in places:
                excess = len(self.start) + len(kept) - self.limit if cut else 0
                inside = [i for i in kept if start <= offsets[i][0] < offsets[i][1] <= end] if excess > 0 else []
                dropped = set(inside[max(0, len(inside) - excess) :])
                kept = [i for i in kept if i not in dropped]
            found.append([*self.start, *(ids[i] for i in kept)])
        return found

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> Scores:
        tokens = self._tokens(items)
        scores = np.zeros(len(items), dtype=np.float32)
        for batch in token_batches([len(ids) for ids in tokens], self.budget):
            longest = len(tokens[batch[0]])
            ids = torch.full((len(batch), longest), self.tokenizer.pad_token_id, dtype=torch.long)  # (B, L)
            mask = torch.zeros_like(ids)
            for row, item in enumerate(batch):  # padded on the left, so that the last position is everyone's last token
                ids[row, longest - len(tokens[item]) :] = torch.tensor(tokens[item])
                mask[row, longest - len(tokens[item]) :] = 1
            options = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(self.device)} if self.placed else {}
            inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
            logits = self.model(**inputs, **options, **self.last, use_cache=False).logits[:, -1].float()  # (B, V)
            signs = torch.tensor([1.0, -1.0][: len(self.answers)], device=self.device)
            scores[batch] = (logits[:, self.answers] @ signs).cpu().numpy()
        return scores


def mean_pooled(teacher: Teacher, device: torch.device, dtype: torch.dtype) -> Compute:
    """(text, "", "") -> the mean of its last hidden states, of unit length (m, D)."""
    name = str(dtype).removeprefix("torch.")
    model = Dense(teacher.path, str(device), name, teacher.max_length or 0, teacher.options.batch_tokens)
    return lambda items: model.encode([text for text, *_ in items], show_progress=False)


def sentence_transformer(teacher: Teacher, device: torch.device, dtype: torch.dtype) -> Compute:
    """(text, role, "") -> its embedding (m, D) by encode_query or encode_document, of unit length where the model
    compares by cosine. Raises ValueError for a model that compares by a distance."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(teacher.path, device=str(device), model_kwargs={"dtype": dtype})
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise ValueError(f"it compares by {model.similarity_fn_name}, and a teacher by cosine or dot")
    limit = min((found for found in (teacher.max_length, model.max_seq_length) if found), default=1 << 30)
    model.max_seq_length = limit
    budget = _budget(teacher, device)

    def compute(items: Sequence[Item]) -> NDArray[np.float32]:
        texts = [text for text, *_ in items]
        tokens = model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        lengths = [min(len(ids) + SPECIAL_TOKENS, limit) for ids in tokens]
        embeddings: list[Any] = [None] * len(items)
        for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
            mine = [row for row, item in enumerate(items) if item[1] == role]
            for part in token_batches([lengths[row] for row in mine], budget):
                rows = [mine[place] for place in part]
                vectors = encode(
                    [texts[row] for row in rows], batch_size=len(rows), show_progress_bar=False, convert_to_tensor=True
                ).float()
                if model.similarity_fn_name == "cosine":
                    vectors = F.normalize(vectors, dim=-1)
                for row, vector in zip(rows, vectors.cpu().numpy(), strict=True):
                    embeddings[row] = vector
        return np.stack(embeddings)

    return compute


def lens_model(teacher: Teacher, device: torch.device, dtype: torch.dtype) -> Compute:
    """(text, role, instruction) -> its LENS embedding, CSR (m, D)."""
    model = lens.load(teacher.path, device=device, dtype=dtype)

    def compute(items: Sequence[Item]) -> sparse.csr_matrix:
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, (_, *how) in enumerate(items):
            groups.setdefault(tuple(how), []).append(row)
        parts, order = [], []
        for (role, instruction), rows in groups.items():
            parts.append(
                model.encode(
                    [items[row][0] for row in rows],
                    "query" if role == "query" else "document",
                    instruction or None,
                    output="csr",
                    batch_tokens=teacher.options.batch_tokens,
                    show_progress=False,
                )
            )
            order += rows
        return sparse.vstack(parts, format="csr")[np.argsort(order)]

    return compute
