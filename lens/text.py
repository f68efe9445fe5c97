"""Text -> tokens and the span of positions that is pooled.

The shift by one: a causal LM's output at position i predicts token i+1. The words of a document are therefore
predicted by the positions from BOS up to the last content token's predecessor, and those of a query by the positions
from `<query>` on. In both cases the last two positions (the last content token, which predicts EOS, and EOS itself)
predict no content and are left out. An encoder's output at position i describes token i, so its content positions
are pooled themselves. The instruction is attended to but never pooled.

Every pooled set is one contiguous span, so tokens travel as (ids, start, end).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from lens.config import LensConfig

# Legend: B texts, L tokens, T tokens of all texts, P pooled tokens of all texts.

SPECIAL_TOKENS = ("<instruct>", "<query>", "<response>")
Kind = Literal["query", "document"]
tokenizing = threading.Lock()  # fast tokenizers keep truncation as state, which another thread would change


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text: its token ids, special tokens included, and the half-open span of pooled positions; of a query that is
    a bag of tokens, the text's own tokens alone."""

    ids: list[int]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded tokens of B texts."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 1 = token
    pooled: Tensor  # (P,) int64, places of pooled tokens among the B*L
    pool_offsets: Tensor  # (B+1,) int64, the texts' offsets in `pooled`

    def inputs(self, device: torch.device | None = None) -> dict[str, Any]:
        """Arguments of LensModel, on `device` (None: where they are)."""
        return _inputs(self, device)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Tokens of B texts one after another, without padding."""

    input_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int64, the texts' offsets
    lengths: tuple[int, ...]  # (B,) tokens of each text
    pooled: Tensor  # (P,) int64, places of pooled tokens among the T
    pool_offsets: Tensor  # (B+1,) int64, the texts' offsets in `pooled`

    def inputs(self, device: torch.device | None = None) -> dict[str, Any]:
        """Arguments of LensModel, on `device` (None: where they are)."""
        return _inputs(self, device)


def _inputs(batch: Any, device: torch.device | None) -> dict[str, Any]:
    return move({field.name: getattr(batch, field.name) for field in fields(batch)}, device)


def move(values: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    """The same values, tensors on `device` (None: where they are)."""
    if device is None:
        return values
    gpu = device.type == "cuda"
    for name, value in values.items():
        if isinstance(value, Tensor):  # from pinned memory nothing is waited for
            values[name] = (value.pin_memory() if gpu else value).to(device, non_blocking=gpu)
    return values


def check_texts(texts: Any) -> list[str]:
    """Returns `texts` as a list, or raises naming the first entry that cannot be encoded.

    Raises TypeError for a bare string, a mapping or set, or entries that are no str; ValueError for lone surrogates.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"expected a list of texts, found one {type(texts).__name__}: write [text]")
    if isinstance(texts, Mapping | Set) or not isinstance(texts, Iterable):
        raise TypeError(f"expected a list of texts, found {type(texts).__name__}")
    checked: list[str] = list(texts)
    for index, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] must be a str, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts[{index}] holds a lone surrogate at character {error.start}, which is not valid text; "
                "remove it, for example with text.encode('utf-8', 'replace').decode()"
            ) from error
    return checked


def tagged_prompt(instruction: str | None) -> str:
    """What stands before a query in the lens prompt: <instruct>{instruction}\\n<query>, or <query> alone."""
    return f"<instruct>{instruction}\n<query>" if instruction else "<query>"


class TextProcessor:
    """Turns texts into Tokens by the prompt, lengths and pooled positions of a LensConfig.

    The tokenizer must be a fast Hugging Face one; with the `lens` prompt it must know the three added tokens.
    """

    def __init__(self, tokenizer: Any, config: LensConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        tokenizer.truncation_side = "right"
        self.pad_id = next(
            i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0) if i is not None
        )
        self.prefix, self.suffix = _special_ids(tokenizer, config.architecture)
        if config.prompt == "lens":
            unknown = [t for t in SPECIAL_TOKENS if t not in tokenizer.get_vocab()]
            if unknown:
                raise ValueError(f"the lens prompt needs the tokens {', '.join(unknown)}, which the tokenizer lacks")

    def __call__(self, texts: Sequence[str], kind: Kind = "document", instruction: str | None = None) -> list[Tokens]:
        """Tokenises `texts`; ids longer than the limit of their kind lose what LensConfig.truncation says.

        An empty text has an empty span, unless every position is pooled. Raises TypeError and ValueError as
        `check_texts`, and ValueError when the instruction leaves no room for text.
        """
        texts = check_texts(texts)
        if not texts:
            return []
        limit = self.config.query_max_length if kind == "query" else self.config.document_max_length
        if kind == "query" and self.config.query_encoder == "bag":
            return [Tokens(ids, 0, len(ids)) for ids in self._encode(texts, limit)["input_ids"]]
        prompt = self._prompt(kind, instruction)
        prompt_length = len(self._encode([prompt], None)["input_ids"][0]) if prompt else 0
        room = limit - len(self.prefix) - len(self.suffix)
        if prompt_length >= room:
            raise ValueError(
                f"the instruction takes {prompt_length} of the {room} tokens that {kind}_max_length={limit} leaves: "
                "shorten it or raise the limit"
            )
        tail = self.config.truncation == "tail"
        encoded = self._encode([prompt + text for text in texts], room + len(self.suffix) if tail else room)
        spans = []
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A token that straddles the prompt's end, as a space merged with the first word, belongs to the text.
            before = sum(end <= len(prompt) for _, end in offsets[:prompt_length]) if prompt else 0
            spans.append(self._span(ids, len(self.prefix) + before, limit))
        return spans

    def _prompt(self, kind: Kind, instruction: str | None) -> str:
        if kind == "query" and instruction is None:
            instruction = self.config.instruction
        if self.config.prompt == "lens":
            return tagged_prompt(instruction) if instruction or kind == "query" else ""
        return f"{instruction} " if instruction else ""

    def _encode(self, texts: list[str], room: int | None) -> Any:
        with tokenizing:
            return self.tokenizer(
                texts,
                add_special_tokens=False,
                truncation=room is not None,
                max_length=room,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=True,
                verbose=False,
            )

    def _span(self, content: list[int], content_start: int, limit: int) -> Tokens:
        ids = [*self.prefix, *content, *self.suffix][:limit]
        content_end = len(ids) - len(self.suffix)
        if self.config.positions == "all" and self.config.pooling != "last":
            return Tokens(ids, 0, len(ids))
        if content_end <= content_start:
            return Tokens(ids, 0, 0)
        if self.config.pooling == "last":
            return Tokens(ids, len(ids) - 1, len(ids))
        if self.config.positions == "shifted":
            return Tokens(ids, max(content_start - 1, 0), content_end - 1)
        return Tokens(ids, content_start, content_end)

    def collate(self, tokens: Sequence[Tokens]) -> Batch:
        """Pads Tokens on the right to the longest of them."""
        width = max(len(item.ids) for item in tokens)
        input_ids = torch.full((len(tokens), width), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros((len(tokens), width), dtype=torch.long)
        for row, item in enumerate(tokens):
            input_ids[row, : len(item.ids)] = torch.tensor(item.ids)
            attention_mask[row, : len(item.ids)] = 1
        starts = [row * width for row in range(len(tokens))]
        return Batch(input_ids, attention_mask, *pooled_places([(item.start, item.end) for item in tokens], starts))

    def pack(self, tokens: Sequence[Tokens]) -> PackedBatch:
        """Lays Tokens one after another."""
        lengths = tuple(len(item.ids) for item in tokens)
        cu_seqlens = offsets(lengths)
        input_ids = torch.tensor([token for item in tokens for token in item.ids], dtype=torch.long)
        spans = [(item.start, item.end) for item in tokens]
        return PackedBatch(input_ids, cu_seqlens, lengths, *pooled_places(spans, cu_seqlens.tolist()))


def offsets(lengths: Sequence[int]) -> Tensor:
    """Offsets (B+1,) int64 of texts of these lengths one after another."""
    return torch.tensor([0, *lengths]).cumsum(0)


def pooled_places(spans: Sequence[tuple[int, int]], starts: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Places (P,) int64 of the tokens that lie in each text's span, whose first token is at `starts`, and the texts'
    offsets (B+1,) among them.

    Places, not a mask: a GPU that is to choose by a mask must first tell the host how many it chooses.
    """
    places = [
        place
        for (first, last), start in zip(spans, starts, strict=False)
        for place in range(start + first, start + last)
    ]
    return torch.tensor(places, dtype=torch.long), offsets([last - first for first, last in spans])


def token_batches(lengths: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Indices of texts of these lengths in batches, the longest text first, so many at a time that the batch stays
    within `budget` tokens, with padding unless `packed`; a text longer than that goes alone."""
    batches: list[list[int]] = []
    widest = held = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        full = held + lengths[index] if packed else (len(batches[-1]) + 1) * widest if batches else 0
        if batches and full <= budget:
            batches[-1].append(index)
            held += lengths[index]
        else:
            batches.append([index])
            widest = held = lengths[index]
    return batches


def _special_ids(tokenizer: Any, architecture: str) -> tuple[list[int], list[int]]:
    """The ids that stand before and after every text: CLS/SEP of an encoder, BOS/EOS of a decoder."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    prefix, suffix = full[:start], full[start + len(bare) :]
    if architecture == "decoder":
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no EOS token, which ends every text of a decoder")
        if not prefix and bos is not None and bos != eos:
            prefix = [bos]
        if not suffix:
            suffix = [eos]
    return prefix, suffix


def add_special_tokens(tokenizer: Any) -> int:
    """Adds <instruct>, <query> and <response> where absent; returns how many were added."""
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    added: int = (
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        if missing
        else 0
    )
    return added
