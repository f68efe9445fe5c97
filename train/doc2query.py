"""Passages -> queries that a language model writes for them, and their scores by a filter; in shards of the corpus.

What a shard holds depends on the settings, its passages and its number, never on what was computed before it, so that
a run which was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lens.backbone import (
    architecture_of,
    check_base,
    check_finite,
    load_config,
    load_tokenizer,
    position_limit,
    read_weights,
)
from lens.corpus import read_texts
from lens.dense import Dense
from lens.devices import resolve_device
from lens.files import atomic_file, read_jsonl, require
from lens.text import token_batches

PROMPT = "Passage: {text}\nA search query that this passage answers:"
"""What a causal model completes unless told otherwise."""


@dataclass(frozen=True)
class Settings:
    """All that decides what is written for a passage."""

    model: str
    """Folder or hub id of a sequence-to-sequence model, or of a causal one."""
    queries: int = 5
    """Queries per passage, before filtering."""
    top_k: int = 10
    """Sampling among the most probable tokens; 0: all."""
    top_p: float = 1.0
    """Sampling among the fewest tokens that hold this probability."""
    temperature: float = 1.0
    """Sampling temperature."""
    beams: int = 0
    """Beam search with so many beams, at least `queries`; 0: sampling."""
    prompt: str | None = None
    """What the model reads, with {text} for the passage; None: the passage alone, and PROMPT for a causal model."""
    passage_length: int = 384
    """Tokens to which a passage is cut."""
    query_length: int = 64
    """Tokens of a query at most."""
    batch_tokens: int = 8192
    """Tokens of the sequences that are written at a time, padding included."""
    dtype: str = "float32"
    """Of the model's weights."""
    scorer: str | None = None
    """Folder or hub id of the model that scores queries against their passage."""
    scorer_kind: Literal["cross", "bi"] = "bi"
    """A cross-encoder of sentence-transformers, or a LENS model or encoder with mean pooling."""
    shard_size: int = 1000
    """Passages of a shard."""
    seed: int = 42
    """Seed of the sampling, with a shard's number."""


class Writer:
    """A language model that writes queries for passages, on a device.

    Raises OSError or ValueError where the model cannot be read, writes no text, or has no room for the lengths.
    """

    def __init__(self, settings: Settings, device: str | None = None) -> None:
        self.settings, self.device = settings, resolve_device(device)
        base = check_base(settings.model)
        config = load_config(base)
        self.seq2seq = config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if not self.seq2seq and not (causal and architecture_of(config) == "decoder"):
            raise ValueError(f"{base} is a {config.model_type} model, which writes no text: name a T5 or a causal LM")
        self.tokenizer = load_tokenizer(base)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {base} has neither a padding nor an EOS token")
        self.prompt = settings.prompt or ("{text}" if self.seq2seq else PROMPT)
        around = len(self.tokenizer(self.prompt.replace("{text}", ""))["input_ids"])
        if not self.seq2seq:
            limit = getattr(config, "max_position_embeddings", None)
            self._check_room("passage_length, prompt and query_length", around + settings.query_length, limit)
        kind: Any = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
        options = {"dtype": getattr(torch, settings.dtype), "output_loading_info": True}
        model, report = read_weights(kind, base, options)
        if report["missing_keys"]:
            raise ValueError(
                f"{base} lacks weights of a language model: {', '.join(sorted(report['missing_keys'])[:3])}"
            )
        check_finite(model, base)
        if self.seq2seq:
            self._check_room("passage_length and prompt", around, position_limit(model.get_encoder()))
            limit = position_limit(model.get_decoder())
            if limit is not None and settings.query_length >= limit:
                raise ValueError(f"the decoder of {base} has {limit} positions: lower --query-length below it")
        self.model = model.to(self.device).eval()

    def _check_room(self, what: str, beside: int, limit: int | None) -> None:
        room = self.settings.passage_length + beside
        if limit is not None and room > limit:
            raise ValueError(
                f"{what} take {room} tokens, and {self.settings.model} has {limit} positions: lower --passage-length"
            )

    def tokens(self, passages: Sequence[str]) -> list[list[int]]:
        """What the model reads for each passage, which is cut so that prompt and special tokens stay whole."""
        limit = self.settings.passage_length
        cut = self.tokenizer(
            list(passages), add_special_tokens=False, truncation=True, max_length=limit, return_offsets_mapping=True
        )["offset_mapping"]
        ends = [offsets[-1][1] if offsets else 0 for offsets in cut]
        texts = [self.prompt.replace("{text}", text[:end]) for text, end in zip(passages, ends, strict=True)]
        ids: list[list[int]] = self.tokenizer(texts)["input_ids"]
        if not self.seq2seq and self.tokenizer.eos_token_id is not None:  # a text that has ended is not gone on with
            ids = [row[:-1] if row and row[-1] == self.tokenizer.eos_token_id else row for row in ids]
        return ids

    @torch.inference_mode()
    def __call__(self, passages: Sequence[str], seed: int) -> list[list[str]]:
        """`settings.queries` queries for each passage, in order. Raises ValueError when the model gives NaN."""
        settings = self.settings
        torch.manual_seed(seed)
        tokens = self.tokens(passages)
        found: list[list[str]] = [[] for _ in passages]
        options: dict[str, Any] = {"do_sample": True, "num_beams": 1, "top_k": settings.top_k, "top_p": settings.top_p}
        options["temperature"] = settings.temperature
        if settings.beams:
            options = {"do_sample": False, "num_beams": max(settings.beams, settings.queries)}
        each = settings.queries * settings.query_length + max(1, options["num_beams"])
        lengths = [len(ids) * max(settings.queries, options["num_beams"]) + each for ids in tokens]
        for rows in token_batches(lengths, settings.batch_tokens):
            side = "right" if self.seq2seq else "left"
            batch = self.tokenizer.pad(
                {"input_ids": [tokens[row] for row in rows]}, padding_side=side, return_tensors="pt"
            ).to(self.device)
            try:
                written = self.model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=settings.query_length,
                    num_return_sequences=settings.queries,
                    pad_token_id=self.tokenizer.pad_token_id,
                    **options,
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise ValueError(
                    f"{settings.model} gives NaN or infinite probabilities: try another --dtype"
                ) from error
            written = written if self.seq2seq else written[:, batch["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for place, row in enumerate(rows):
                found[row] = texts[place * settings.queries : (place + 1) * settings.queries]
        return found


class Scorer:
    """Scores of queries for their passage, by the model that the settings name."""

    def __init__(self, settings: Settings, device: str | None = None) -> None:
        assert settings.scorer is not None
        self.settings = settings
        where = str(resolve_device(device))
        if settings.scorer_kind == "cross":
            require("sentence-transformers", "sentence_transformers")
            from sentence_transformers import CrossEncoder

            self.cross = CrossEncoder(check_base(settings.scorer), device=where)
        elif (Path(settings.scorer) / "lens.json").is_file():
            from lens.encoder import load

            model = load(settings.scorer, device=where)
            self.encode = lambda texts, kind: model.encode(texts, kind)
        else:
            dense = Dense(settings.scorer, where, max_length=settings.passage_length)
            self.encode = lambda texts, kind: dense.encode(texts, "scores")

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> list[float]:
        """A score for each query with the passage of the same place. Raises ValueError for NaN."""
        if not queries:
            return []
        if self.settings.scorer_kind == "cross":
            pairs = list(zip(queries, passages, strict=True))
            scores = np.asarray(self.cross.predict(pairs, show_progress_bar=False), dtype=np.float64)
            if scores.ndim != 1:
                raise ValueError(
                    f"{self.settings.scorer} gives {scores.shape[1]} scores for a pair: name one that ranks"
                )
        else:
            distinct = list(dict.fromkeys(passages))
            place = {passage: i for i, passage in enumerate(distinct)}
            try:
                documents = np.asarray(self.encode(distinct, "document"))[[place[passage] for passage in passages]]
                scores = (np.asarray(self.encode(list(queries), "query")) * documents).sum(1)
            except FloatingPointError as error:
                raise ValueError(f"{self.settings.scorer}: {error}") from error
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"{self.settings.scorer} gives {scores[bad]} for the query {queries[bad][:60]!r}")
        return [round(float(score), 6) for score in scores]


def clean(queries: Sequence[str]) -> list[str]:
    """The first line of each query with single spaces, without empty ones and those that differ in case alone."""
    found: dict[str, str] = {}
    for query in queries:
        lines = query.strip().splitlines()
        text = " ".join(lines[0].split()) if lines else ""
        if text:
            found.setdefault(text.casefold(), text)
    return list(found.values())


def shard_seed(seed: int, shard: int) -> int:
    """The seed of a shard: 63 bits from the run's seed and the shard's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {shard}".encode(), digest_size=8).digest(), "big") >> 1


def shard_file(folder: Path, shard: int) -> Path:
    """The file of a shard, one line for each passage that is not blank."""
    return folder / f"shard-{shard:06d}.jsonl"


def read_shard(folder: Path, shard: int) -> list[dict[str, Any]]:
    """The rows of a shard: `_id`, `queries`, `scores` (null without a scorer), `written` (queries before cleaning)."""
    return [row for _, row in read_jsonl(shard_file(folder, shard))]


def compute(settings: Settings, source: str, folder: Path, shards: Sequence[int], device: str | None) -> Iterator[int]:
    """Writes the shards that are missing, in order, and yields the number of each when its file is whole."""
    ids, texts = read_texts(source)
    missing = [shard for shard in shards if not shard_file(folder, shard).is_file()]
    yield from (shard for shard in shards if shard not in set(missing))
    if not missing:
        return
    writer = Writer(settings, device)
    scorer = Scorer(settings, device) if settings.scorer else None
    for shard in missing:
        first = shard * settings.shard_size
        rows = [row for row in range(first, min(first + settings.shard_size, len(ids))) if texts[row].strip()]
        written = writer([texts[row] for row in rows], shard_seed(settings.seed, shard))
        kept = [clean(queries) for queries in written]
        scores = None
        if scorer is not None:
            flat = [(query, texts[row]) for row, queries in zip(rows, kept, strict=True) for query in queries]
            scores = iter(scorer([query for query, _ in flat], [passage for _, passage in flat]))
        with atomic_file(shard_file(folder, shard)) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row, queries, all_of_them in zip(rows, kept, written, strict=True):
                values = None if scores is None else [next(scores) for _ in queries]
                line = {"_id": ids[row], "queries": queries, "scores": values, "written": len(all_of_them)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        yield shard


def write_shards(settings: Settings, source: str, folder: Path, count: int, devices: Sequence[str | None]) -> None:
    """Writes all `count` shards into `folder`, those that are there already excepted; each of several devices gets a
    process and takes every so many-th shard. Raises what a process raised, naming its device."""
    shards = range(count)
    with tqdm(total=count, desc="write queries", unit="shard") as bar:
        if len(devices) == 1:
            for _ in compute(settings, source, folder, shards, devices[0]):
                bar.update()
            return
        parts = [shards[i :: len(devices)] for i in range(len(devices))]
        with _processes(settings, source, folder, parts, devices) as connections:
            names = {connection: str(device) for connection, device in zip(connections, devices, strict=True)}
            while names:
                for connection in wait(list(names)):
                    assert isinstance(connection, Connection)
                    name = names[connection]
                    try:
                        message = connection.recv()
                    except (EOFError, OSError) as error:
                        raise ChildProcessError(f"the process for {name} died; start the same command again") from error
                    if isinstance(message, str):
                        raise ValueError(f"on {name}: {message}")
                    if message is None:
                        del names[connection]
                    else:
                        bar.update()


@contextmanager
def _processes(
    settings: Settings, source: str, folder: Path, parts: Sequence[Sequence[int]], devices: Sequence[str | None]
) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for part, device in zip(parts, devices, strict=True):
            ours, theirs = context.Pipe()
            task = theirs, settings, source, folder, list(part), device, max(1, torch.get_num_threads() // len(parts))
            processes.append(context.Process(target=_work, args=task, daemon=True))
            connections.append(ours)
            processes[-1].start()
            theirs.close()
        yield connections
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(
    connection: Connection,
    settings: Settings,
    source: str,
    folder: Path,
    shards: Sequence[int],
    device: str | None,
    threads: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        for shard in compute(settings, source, folder, shards, device):
            connection.send(shard)
        connection.send(None)
    except (ValueError, OSError, ImportError) as error:
        connection.send(" ".join(str(error).split()))


def _end_with_parent() -> None:
    """Ends this process when its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
