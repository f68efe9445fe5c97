"""A base model's folder → a sequence-to-sequence model to train: T5 and BART as they are, an encoder with a decoder
made of its own layers (BERT2BERT, Rothe et al., 2020, arXiv 1907.12461); pairs of texts → its batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, EncoderDecoderModel, GenerationConfig
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
    quiet,
    read_weights,
)
from train.sampler import Schedule

CROSS, OWN = ".crossattention.", ".attention."
"""In the names of a decoder's weights: attention to the encoder's states, and to the text itself."""
POOL_STEPS = 16
"""Steps whose examples are drawn together and laid into batches by length."""
IGNORED = -100
"""Label of a place that no loss is taken of."""
DROPOUTS = (
    "dropout", "dropout_rate", "attention_dropout", "activation_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip
"""Fields of configurations that say how much is dropped out."""


def load_base(
    base: str, encoder_layers: int | None = None, decoder_layers: int | None = None, dropout: float | None = None
) -> tuple[Any, Any]:
    """The model to train and its tokenizer, on the CPU in float32.

    Of an encoder the first `encoder_layers` are kept, and the first `decoder_layers` become the decoder; None: all.
    `dropout` is that of all places; None: the base's own.
    Raises OSError or ValueError naming what is wrong with `base` or the number of layers.
    """
    base = check_base(base)
    config = load_config(base)
    kind = config.model_type
    if dropout is not None:
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            for name in DROPOUTS:
                if hasattr(part, name):
                    setattr(part, name, dropout)
    given = {"--encoder-layers": encoder_layers, "--decoder-layers": decoder_layers}
    as_it_is = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if not as_it_is and architecture_of(config) == "decoder":
        raise ValueError(
            f"{base} is a causal {kind} model, which writes queries untrained: give it to train/generate.py --model, "
            "or name an encoder or a sequence-to-sequence model here"
        )
    for name, value in given.items():
        if value is not None and as_it_is:
            raise ValueError(f"{name} is for encoders, and {base} is a {kind} model, which is trained as it is")
        if value is not None and not 1 <= value <= config.num_hidden_layers:
            raise ValueError(f"{name} must be from 1 to {config.num_hidden_layers}, the layers of {base}: {value}")
    tokenizer = load_tokenizer(base)
    absent = [name for name in ("pad_token", "eos_token") if _special(tokenizer, name) is None]
    if absent:
        raise ValueError(f"the tokenizer of {base} has no {' and no '.join(absent)}, which a generator needs")
    if as_it_is:
        model = _read(AutoModelForSeq2SeqLM, base, config, lambda name: False)
        if getattr(model.generation_config, "decoder_start_token_id", None) is None:
            raise ValueError(f"{base} says no decoder_start_token_id in config.json: a query could not begin")
    else:
        model = _warm_start(base, config, tokenizer, encoder_layers, decoder_layers)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer of {base} has {len(tokenizer)} tokens, and the model embeds {rows}")
    return model, tokenizer


def _special(tokenizer: Any, name: str) -> int | None:
    """The id of `pad_token`, of `bos_token` or of `eos_token`, as which an encoder's CLS and SEP serve."""
    stand_in = {"bos_token": "cls_token_id", "eos_token": "sep_token_id"}.get(name)
    found = getattr(tokenizer, f"{name}_id")
    if stand_in is not None and getattr(tokenizer, stand_in) is not None:
        found = getattr(tokenizer, stand_in)
    return None if found is None else int(found)


def _read(auto: Any, base: str, config: Any, may_lack: Callable[[str], bool]) -> Any:
    """The model of a folder; raises ValueError where it lacks a weight that it must not lack."""
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    model, report = read_weights(auto, base, options)
    absent = sorted(name for name in report["missing_keys"] if not may_lack(name))
    if absent:
        raise ValueError(f"{base} lacks weights of its {config.model_type} model: {', '.join(absent[:3])} ...")
    check_finite(model, base)
    model.fresh_weights = sorted(report["missing_keys"])
    return model


def _warm_start(
    base: str, config: Any, tokenizer: Any, encoder_layers: int | None, decoder_layers: int | None
) -> EncoderDecoderModel:
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{base} is a {config.model_type} model, of which transformers makes no decoder: name a BERT, RoBERTa or "
            "ELECTRA, or a sequence-to-sequence model"
        )
    start, end, pad = (_special(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token"))
    if start is None:
        raise ValueError(f"the tokenizer of {base} has no cls_token and no bos_token, with which a query begins")
    layers = config.num_hidden_layers
    reading, writing = copy.deepcopy(config), copy.deepcopy(config)
    reading.num_hidden_layers, writing.num_hidden_layers = encoder_layers or layers, decoder_layers or layers
    writing.is_decoder = writing.add_cross_attention = True
    encoder = _read(AutoModel, base, reading, lambda name: name.startswith("pooler."))
    decoder: Any = _read(AutoModelForCausalLM, base, writing, lambda name: CROSS in name or not _inner(name))
    if not any(CROSS in name for name, _ in decoder.named_parameters()):
        raise ValueError(f"{base} is a {config.model_type} model, whose decoder would not read an encoder's states")
    _begin(decoder)
    encoder.config._name_or_path = decoder.config._name_or_path = ""
    with quiet():
        model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = start, pad
    model.generation_config = GenerationConfig(decoder_start_token_id=start, eos_token_id=end, pad_token_id=pad)
    return model


def _inner(name: str) -> bool:
    """Whether a weight of a causal LM belongs to its layers, not to its head."""
    return ".encoder." in name or ".embeddings." in name


@torch.no_grad()
def _begin(decoder: nn.Module) -> None:
    """First values of what the base has no weights for.

    Attention to the encoder's states begins with the queries and keys of the layer's attention to the text itself, and
    with the identity for its values and output: states of the first layers resemble their word's embedding, so that to
    attend to a word is to be about to write it. A head's square layer begins as the identity: its GELU is nearly linear
    around a bias of 3, which the layer norm after it takes away again.
    """
    weights = dict(decoder.named_parameters())
    for name in decoder.fresh_weights:
        weight = weights.get(name)
        if weight is None or not name.endswith(".weight"):
            continue
        bias = weights.get(name.removesuffix("weight") + "bias")
        passes = name.endswith((".value.weight", ".output.dense.weight"))
        square = weight.dim() == 2 and weight.shape[0] == weight.shape[1]
        if CROSS in name and not (passes and square):
            weight.copy_(weights[name.replace(CROSS, OWN)])
            if bias is not None:
                bias.copy_(weights[name.replace(CROSS, OWN).removesuffix("weight") + "bias"])
        elif square and (CROSS in name or name.endswith("dense.weight")):
            nn.init.eye_(weight)
            if bias is not None:
                nn.init.constant_(bias, 0.0 if CROSS in name else 3.0)


class Pairs:
    """Passages and their queries as tokens, cut to so many; pairs whose query the tokenizer leaves nothing of are out.

    Raises ValueError where a length is beyond the model's positions, or no pair is left.
    """

    def __init__(
        self, model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], passage_length: int, query_length: int
    ) -> None:
        for name, length, part in (
            ("--passage-length", passage_length, model.get_encoder()),
            ("--query-length", query_length, model.get_decoder()),
        ):
            limit = position_limit(part)
            if limit is not None and length > limit:
                raise ValueError(f"{name} {length} is more than the model's {limit} positions: lower it")
        queries = [query for _, query in pairs]
        bare = tokenizer(queries, add_special_tokens=False, truncation=True, max_length=query_length - 1)["input_ids"]
        passages = [passage for passage, _ in pairs]
        read: list[list[int]] = tokenizer(passages, truncation=True, max_length=passage_length)["input_ids"]
        if isinstance(model, EncoderDecoderModel):  # its tokenizer frames texts as the encoder reads them
            end = _special(tokenizer, "eos_token")
            written: list[list[int]] = [[*ids, end] for ids in bare]
        else:
            written = tokenizer(text_target=queries, truncation=True, max_length=query_length)["input_ids"]
        kept = [row for row, ids in enumerate(bare) if ids]
        if not kept:
            raise ValueError("no pair has a query of which the tokenizer leaves a token: check --data")
        self.read, self.written = [read[row] for row in kept], [written[row] for row in kept]
        self.pad = int(tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.read)

    def batches(self, schedule: Schedule) -> Callable[[int, list[int]], dict[str, Any]]:
        """The batch of a step, of pairs of similar length: a pure function of the schedule and the step."""
        pools: dict[int, list[list[int]]] = {}

        def batch(step: int, rows: list[int]) -> dict[str, Any]:
            number, place = divmod(step, POOL_STEPS)
            if number not in pools:
                pools.clear()
                pools[number] = self.pool(schedule, number)
            return self.collate(pools[number][place])

        return batch

    def pool(self, schedule: Schedule, number: int) -> list[list[int]]:
        """The batches of the `number`-th POOL_STEPS steps: the rows of all of them, sorted by length."""
        first = number * POOL_STEPS
        drawn = [schedule.batch(step)[1] for step in range(first, min(first + POOL_STEPS, schedule.steps))]
        rows = sorted(
            (row for rows in drawn for row in rows), key=lambda row: len(self.read[row]) + len(self.written[row])
        )
        size = len(drawn[0])
        found = [rows[start : start + size] for start in range(0, len(rows), size)]
        random.Random(f"{schedule.seed} {number} pool").shuffle(found)
        return found

    def collate(self, rows: Sequence[int]) -> dict[str, Any]:
        """The model's arguments for these rows: ids and mask (B, L), labels (B, M)."""
        ids = _padded([self.read[row] for row in rows], self.pad)
        mask = _padded([[1] * len(self.read[row]) for row in rows], 0)
        labels = _padded([self.written[row] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
