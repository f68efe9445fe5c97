"""Tiny models made in memory: a random Mistral and a random BERT with tokenizers trained on a few sentences."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, BertModel, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

import lens

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a lexicon based embedding has one dimension for every cluster of tokens",
    "copy the whole directory tree and keep the modification times of all files",
    "wait until every thread has finished and join them in the order they were started",
    "parse a date from a string, and raise an error when the format does not match",
    "Bidirectional attention lets a token see what comes after it.",
    "Hidden states go through the head; the greatest logit of every cluster is kept.",
]


def decoder_tokenizer() -> FastTokenizer:
    """A byte-level BPE with <s> and </s>, of which only <s> is added by itself, as in Mistral."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return FastTokenizer(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def word_pieces(size: int = 254) -> list[str]:
    """A vocabulary for WordPiece: special tokens, the letters of SENTENCES, their words, and the most frequent endings
    until there are `size`. Made by hand because WordPieceTrainer breaks ties in another way in every process."""
    words = [word for sentence in SENTENCES for word in re.findall(r"\w+|[^\w\s]", sentence.lower())]
    letters = sorted({letter for word in words for letter in word})
    endings = Counter(
        word[start : start + length]
        for word in words
        for length in (2, 3, 4)
        for start in range(1, len(word) - length + 1)
    )
    frequent = [f"##{ending}" for ending, _ in sorted(endings.items(), key=lambda item: (-item[1], item[0]))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(
        dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *sorted(set(words)), *frequent])
    )[:size]


def encoder_tokenizer() -> FastTokenizer:
    """A WordPiece with [CLS] and [SEP], as in BERT."""
    vocabulary = {token: number for number, token in enumerate(word_pieces())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return FastTokenizer(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )


def save_mistral(folder: Path, **changes: int) -> Path:
    torch.manual_seed(0)
    tokenizer = decoder_tokenizer()
    facts = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.15,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes,
    }  # fmt: skip
    MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **facts)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path, masked_lm: bool = False) -> Path:
    torch.manual_seed(0)
    tokenizer = encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    (BertForMaskedLM(config) if masked_lm else BertModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_clusters(folder: Path, vocabulary: int, k: int = 24, width: int = 32) -> Path:
    """A clusters folder with random centroids and labels, every cluster used."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, vocabulary - k)]).astype(np.int32)
    tensors = {
        "centroids": torch.from_numpy(rng.normal(size=(k, width)).astype(np.float32)),
        "labels": torch.from_numpy(labels),
    }
    save_file(tensors, folder / "clusters.safetensors")
    return folder


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Mistral with its tokenizer."""
    return save_mistral(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random BERT encoder with its tokenizer."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def bert_mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random BERT with its MLM head."""
    return save_bert(tmp_path_factory.mktemp("bert_mlm"), masked_lm=True)


@pytest.fixture(scope="session")
def mistral_clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clusters(tmp_path_factory.mktemp("clusters") / "mistral", len(decoder_tokenizer()))


@pytest.fixture(scope="session")
def bert_clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clusters(tmp_path_factory.mktemp("clusters") / "bert", len(encoder_tokenizer()))


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory: pytest.TempPathFactory, bert: Path, bert_clusters: Path) -> Path:
    """Folder of a tiny LENS model of finite weights, whose every embedding overflows."""
    folder = tmp_path_factory.mktemp("overflowing")
    clusters = shutil.copytree(bert_clusters, folder / "clusters")
    tensors = load_file(clusters / "clusters.safetensors")
    tensors["centroids"][::2] = torch.finfo(torch.float32).max
    tensors["centroids"][1::2] = torch.finfo(torch.float32).min  # one of the two has a logit that is not below 0
    save_file(tensors, clusters / "clusters.safetensors")
    lens.LENS.build(bert, clusters, device="cpu").save(folder / "model", include_backbone=True)
    return folder / "model"


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `datasets` library, offline, with a cache of its own for the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path / "datasets"


def need(path: Path) -> Path:
    """Skips the test, saying why, where a shared data set is absent."""
    if not path.exists():
        pytest.skip(f"{path.name} is not here: the shared data sets are not part of the repository")
    return path


def row(**changes):
    return {"query": "q", "pos": ["p"], "neg": ["n", "m"], "type": "retrieval", **changes}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Forty examples: the first half of a sentence finds the second."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for number in range(40):
        words = SENTENCES[number % 7].split()
        others = [SENTENCES[(number + step) % 7].partition(" ")[2] for step in (1, 2, 3)]
        rows.append(
            row(query=f"{' '.join(words[:4])} {number}", pos=[" ".join(words[4:])], neg=others,
                pos_scores=[2.0], neg_scores=[0.5, 0.1, 0.3], prompt="Find the rest of the sentence.")
        )  # fmt: skip
    return write_rows(path, *rows)


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return str(path)
