"""Tiny masked LMs and the sparse encoders that sentence-transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, encoder_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

pytest.importorskip("sentence_transformers")
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling, Transformer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> and </s> around a text, as RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def masked_lm(kind: str) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A tiny random masked LM, of which no bias is zero and no LayerNorm the identity, with its tokenizer."""
    torch.manual_seed(0)
    roberta = kind in ("roberta", "xlm-roberta")
    tokenizer = roberta_tokenizer() if roberta else encoder_tokenizer()
    facts = {"vocab_size": len(tokenizer), "initializer_range": 0.15, **SMALL}
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**facts, max_position_embeddings=96))
    elif kind == "bert-relu":
        model = BertForMaskedLM(BertConfig(**facts, max_position_embeddings=96, hidden_act="relu", layer_norm_eps=1e-3))
    elif kind == "bert-tanh":
        model = BertForMaskedLM(BertConfig(**facts, max_position_embeddings=96, hidden_act="gelu_new"))
    elif kind == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": len(tokenizer)}
        model = DistilBertForMaskedLM(
            DistilBertConfig(**sizes, max_position_embeddings=96, initializer_range=0.15, activation="relu")
        )
    elif roberta:
        # The head's activation is GELU whatever the configuration says of the layers'.
        config, form = (
            (RobertaConfig, RobertaForMaskedLM) if kind == "roberta" else (XLMRobertaConfig, XLMRobertaForMaskedLM)
        )
        marks = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
        act = "relu" if kind == "roberta" else "gelu"
        model = form(config(**facts, **marks, max_position_embeddings=66, layer_norm_eps=1e-5, hidden_act=act))
    else:
        marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        bare = kind == "modernbert"  # as released: no bias but the decoder's
        model = ModernBertForMaskedLM(
            ModernBertConfig(
                **facts, **marks, max_position_embeddings=96, local_attention=16, norm_bias=not bare,
                classifier_bias=not bare, decoder_bias=bare, classifier_activation="gelu" if bare else "silu",
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval(), tokenizer


def save_masked_lm(kind: str, folder: Path) -> Path:
    model, tokenizer = masked_lm(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sparse_encoder(folder, strategy="max", activation="relu", normalize=False) -> SparseEncoder:
    encoder = Transformer(str(folder), transformer_task="fill-mask")
    modules = [encoder, SpladePooling(strategy, activation)]
    return SparseEncoder(modules=[*modules, Normalize()] if normalize else modules, device="cpu")


def inference_free(folder, weight=None, activation="log1p_relu") -> SparseEncoder:
    encoder = Transformer(str(folder), transformer_task="fill-mask")
    static = SparseStaticEmbedding(encoder.tokenizer, weight, frozen=True)
    router = Router.for_query_document([static], [encoder, SpladePooling("max", activation)])
    return SparseEncoder(modules=[router], device="cpu", similarity_fn_name="dot")


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
