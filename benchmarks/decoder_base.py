"""The tiny decoder of benchmarks/decoder.py: pairs, text, a byte-level BPE and a Mistral trained as a causal LM."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lens.files import atomic_folder, read_jsonl, write_json

SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the figures. Lengths are in tokens."""

    pairs: tuple[str, ...] = ("pairs-medquad", "pairs-openstax-terms", "pairs-squad-sentences")
    """Sets of query and passage for training and for the held-out part."""
    texts: tuple[str, ...] = ("text-openstax", "text-wikipedia-ibm", "text-2wiki-passages")
    """Sets of running text for the language model, beside the training passages."""
    zero_shot: tuple[str, ...] = ("cranfield", "cisi")
    """Retrieval sets of which training saw nothing."""
    train_pairs: int = 5000
    """Training pairs of each set."""
    heldout_queries: int = 500
    """Held-out queries of each set."""
    passage_characters: int = 400
    """Passages are cut to this length, for every system."""
    vocabulary: int = 6000
    """Tokens of the BPE."""
    width: int = 256
    """Hidden size; the feed-forward layers are 2.75 times as wide."""
    layers: int = 4
    """Layers of the decoder."""
    heads: int = 4
    """Attention heads; keys and values have half as many."""
    lm_length: int = 128
    """Tokens of a block of text."""
    lm_batch: int = 16
    """Blocks per step."""
    lm_steps: int = 1200
    """Steps as a causal LM."""
    lm_learning_rate: float = 2e-3
    """Its peak learning rate."""
    k: int = 1000
    """Clusters of the vocabulary."""
    steps: int = 80
    """Steps of contrastive training."""
    batch_size: int = 64
    """Queries per step."""
    group_size: int = 2
    """Passages per query: the positive and BM25 negatives."""
    learning_rate: float = 1e-3
    """Peak learning rate of the LoRA matrices."""
    temperature: float = 0.02
    """Of the contrastive loss."""
    query_max_length: int = 32
    """Longest query."""
    document_max_length: int = 64
    """Longest passage."""
    precision: str = "bf16"
    """Arithmetic of both trainings, by autocast."""


def need_data(data: Path, settings: Settings) -> None:
    """Raises FileNotFoundError naming the first set that is not there and how to point to it."""
    wanted = [data / name / "train.jsonl.gz" for name in (*settings.pairs, *settings.texts)]
    wanted += [data / name / "corpus.jsonl.gz" for name in settings.zero_shot]
    for file in wanted:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: give --data, the folder of the shared data sets, or other sets by "
                "--pairs, --texts and --zero_shot"
            )


def split_pairs(rows: list[dict[str, Any]], heldout: int, rng: random.Random) -> tuple[list[Any], list[Any]]:
    """(training rows, held-out rows of `heldout` distinct queries or a few more).

    Rows that share a query, a passage or a subject (`focus`) stay together, so that training sees none of the
    held-out ones.
    """
    first: dict[tuple[str, str], int] = {}
    links = [
        (number, first.setdefault((field, row[field].lower()), number))
        for number, row in enumerate(rows)
        for field in ("query", "positive", "focus")
        if row.get(field)
    ]
    left, right = zip(*links, strict=True)
    graph = coo_matrix(([1] * len(links), (left, right)), shape=(len(rows), len(rows)))
    _, owners = connected_components(graph, directed=False)
    members = defaultdict(list)
    for row, owner in zip(rows, owners, strict=True):
        members[owner].append(row)
    groups = list(members.values())
    rng.shuffle(groups)
    kept: list[Any] = []
    while groups and len({row["query"] for row in kept}) < heldout:
        kept += groups.pop()
    return [row for group in groups for row in group], kept


def write_beir(folder: Path, rows: list[dict[str, Any]], split: str) -> None:
    """Rows of `query` and `positive` as a folder in BEIR layout; equal texts share an id."""
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    judged = {}
    for row in rows:
        query = queries.setdefault(row["query"], f"{row['set']}-q{len(queries)}")
        document = corpus.setdefault(row["positive"], f"{row['set']}-d{len(corpus)}")
        judged[query, document] = 1
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", queries), ("corpus", corpus)):
        lines = (json.dumps({"_id": number, "title": "", "text": text}) + "\n" for text, number in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    table = "".join(f"{query}\t{document}\t1\n" for query, document in judged)
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + table, encoding="utf-8")


def make_pairs(data: Path, folder: Path, settings: Settings) -> None:
    """`folder`/SET with the training pairs of each set, `folder`/heldout with the held-out ones of all."""
    with atomic_folder(folder) as staged:
        heldout: list[Any] = []
        for name in settings.pairs:
            rng = random.Random(name)
            rows = []
            for _, row in read_jsonl(data / name / "train.jsonl.gz"):
                passage = cut(" ".join(row["positive"].split()), settings.passage_characters)
                if passage and row["query"].strip():
                    rows.append({**row, "positive": passage, "set": name})
            train, kept = split_pairs(rows, settings.heldout_queries, rng)
            write_beir(staged / name, rng.sample(train, min(settings.train_pairs, len(train))), "train")
            heldout += kept
        write_beir(staged / "heldout", heldout, "test")


def cut(text: str, characters: int) -> str:
    """The text's first words, `characters` long at most."""
    return text if len(text) <= characters else text[:characters].rpartition(" ")[0]


def paragraphs(data: Path, pairs: Path, settings: Settings) -> list[str]:
    """Training passages and paragraphs of the text sets, shuffled."""
    found = [row["text"] for name in settings.pairs for _, row in read_jsonl(pairs / name / "corpus.jsonl")]
    for name in settings.texts:
        for _, row in read_jsonl(data / name / "train.jsonl.gz"):
            parts = row["paragraphs"] if "paragraphs" in row else [row["text"]]
            found += [part for part in parts if len(part) >= 80]
    random.Random(0).shuffle(found)
    return found


def make_tokenizer(texts: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts <s> before a text, as Mistral's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int, count: int) -> torch.Tensor:
    """(count, length) ids of the texts one after another, each between <s> and </s>; the texts repeat if need be."""
    stream: list[int] = []
    source: Iterator[str] = iter(texts)
    while len(stream) < length * count:
        part = [text for text, _ in zip(source, range(512), strict=False)]
        if not part:
            source = iter(texts)
            continue
        for ids in tokenizer(part)["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
    return torch.tensor(stream[: length * count]).view(count, length)


def pretrain(data: Path, pairs: Path, base: Path, scratch: Path, settings: Settings) -> dict[str, Any]:
    """Trains tokenizer and decoder and writes them to `base`; goes on from a checkpoint in `scratch`."""
    started = time.monotonic()
    texts = paragraphs(data, pairs, settings)
    tokenizer = make_tokenizer(texts[:20_000], settings)
    tested = settings.lm_batch * 4
    ids = blocks(texts, tokenizer, settings.lm_length, settings.lm_batch * settings.lm_steps + tested)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.width * 11 // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=max(settings.heads // 2, 1),
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = MistralForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=settings.lm_batch,
        per_device_eval_batch_size=settings.lm_batch,
        max_steps=settings.lm_steps,
        learning_rate=settings.lm_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.lm_steps // 20,
        weight_decay=0.01,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_steps=200,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
    )
    trainer: Any = Trainer(model=model, args=arguments, train_dataset=rows[tested:], eval_dataset=rows[:tested])
    trainer.train(resume_from_checkpoint=any(scratch.glob("checkpoint-*")) or None)
    loss = trainer.evaluate()["eval_loss"]
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": settings.lm_batch * settings.lm_steps * settings.lm_length,
        "characters": sum(map(len, texts)),
        "loss_per_token": round(loss, 3),
        "seconds": round(time.monotonic() - started),
    }
    with atomic_folder(base) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_json(staged / "figures.json", figures)
    return figures
