"""Gives an encoder an MLM head, or trains the one it has, by masked language modelling on raw text.

    python train/mlm.py --base ENCODER --text FILE ... --output DIR

The encoder stays as it is: only the head learns, whose decoder is the encoder's word embeddings. With --train-encoder
everything learns. DIR becomes a masked LM of transformers, which SPLADE and SparTerm begin from.

Example: python train/mlm.py --base sentence-transformers/all-MiniLM-L6-v2 --text data/scifact --output runs/minilm-mlm
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lens  # noqa: F401  before transformers, so that bitsandbytes, which that imports, is kept quiet

# isort: split
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lens.backbone import architecture_of, hidden_states, load_backbone, load_config, load_tokenizer, position_limit
from lens.corpus import texts_file
from lens.devices import resolve_device
from lens.head import ACTIVATIONS
from lens.program import interruptible
from lens.vocabulary import SUPPORTED, head_modules, read_vocabulary_head
from train.checkpoints import whole_checkpoints
from train.lexical import Steps, add_options, begun, check_options, schedule_of, train
from train.windows import Windows, mask, plain

# Legend: B windows, L tokens, M masked tokens, D hidden size, V vocabulary.

MARKER = "config.json"
STEPS = 400
SHORTEST = 8  # tokens of a window, special ones included
SAMPLE = 256  # windows by which the bias is set
FIRST = 50  # batches from which a new head is set
RIDGE = 0.3  # of the mean squared state
CHUNK = 512  # tokens whose logits are held at a time while a new head is set
DISCOUNT = "frequency_discount"  # of a model's config.json: the share of the log frequencies that its bias lacks
GAINS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


class MaskedLM(nn.Module):
    """The head of a masked LM of transformers, and with `train_encoder` its encoder: what is trained, and saved in
    checkpoints. `wrapper` is the whole model, which shares these weights."""

    wrapper: Any

    def __init__(self, wrapper: Any, train_encoder: bool = False) -> None:
        super().__init__()
        _, facts = read_vocabulary_head(wrapper, [], {})
        if facts.get("transform") != "mlm":
            raise ValueError(f"the MLM head of {wrapper.config.model_type} has no dense layer; {SUPPORTED}")
        self.activation = ACTIVATIONS[facts["transform_activation"]]
        self.__dict__["wrapper"] = wrapper  # not a submodule: a frozen encoder has no place in checkpoints
        dense, norms = head_modules(wrapper)
        (self.dense,), (self.norm,) = dense.values(), norms.values()
        output = wrapper.get_output_embeddings()
        self.bias: nn.Parameter | None = output.bias
        self.train_encoder = train_encoder
        if train_encoder:
            self.encoder = wrapper.base_model
            if output.weight is not wrapper.get_input_embeddings().weight:
                self.rows = output.weight
        wrapper.requires_grad_(False)
        self.requires_grad_(True)

    def states(self, part: dict[str, Tensor]) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L); they carry a gradient only if the encoder is trained."""
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            return hidden_states(self.wrapper.base_model, part["input_ids"], part["attention_mask"])

    def targets(self, parts: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """States (M, D) of the tokens that have a label, and the labels (M,)."""
        chosen = [part["labels"] >= 0 for part in parts]
        states = torch.cat([self.states(part)[where] for part, where in zip(parts, chosen, strict=True)])
        return states, torch.cat([part["labels"][where] for part, where in zip(parts, chosen, strict=True)])

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        normed = self.norm(self.activation(self.dense(states)))
        return F.linear(normed, self.wrapper.get_output_embeddings().weight, self.bias)

    def forward(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`loss`, the mean cross-entropy of all tokens that have a label, and `accuracy`, the share of them whose
        logit is the greatest. Logits exist for these tokens only, (M, V)."""
        states, labels = self.targets(parts)
        logits = self.logits(states).float()
        return {
            "loss": F.cross_entropy(logits, labels),
            "accuracy": (logits.detach().argmax(-1) == labels).float().mean(),
        }

    @torch.no_grad()
    def begin(self, new: set[str], frequencies: Tensor, batches: Iterable[list[dict[str, Tensor]]]) -> None:
        """Sets what of the head was never trained, named by `new` as in `named_parameters`, near where training would
        lead it, from how often each token (V,) occurs and masked batches: `bias` to the logarithm of the frequencies
        (`log_shares`), `dense.weight` with its bias to the map from states to word embeddings with the least squared
        error (ridge regression), `norm.weight` to the constant with the lowest loss."""
        assert self.bias is not None
        if "bias" in new:
            self.bias.copy_(log_shares(frequencies))
        if new.isdisjoint(("dense.weight", "norm.weight")):
            return
        device = self.dense.weight.device
        found = [self.targets([{k: v.to(device) for k, v in part.items()} for part in parts]) for parts in batches]
        states, labels = (torch.cat(column) for column in zip(*found, strict=True))
        held_out = max(1, len(labels) // 10)
        if "dense.weight" in new:
            self._least_squares(states[held_out:], labels[held_out:])
        if "norm.weight" in new:
            losses = {}
            for gain in GAINS:
                self.norm.weight.fill_(gain)
                losses[gain] = self._total_loss(states[:held_out], labels[:held_out])
            self.norm.weight.fill_(min(losses, key=lambda gain: losses[gain]))

    def _least_squares(self, states: Tensor, labels: Tensor) -> None:
        words = self.wrapper.get_output_embeddings().weight[labels].float()
        x = states.float()
        centre = x.mean(0) if self.dense.bias is not None else torch.zeros_like(x[0])
        x, y = x - centre, words - words.mean(0)
        square = x.T @ x
        square.diagonal().add_(RIDGE * square.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(square, x.T @ y).T
        scale = (x @ weight.T).std().clamp(min=1e-12)
        self.dense.weight.copy_(weight / scale)
        if self.dense.bias is not None:
            self.dense.bias.copy_(1 - weight @ centre / scale)  # around 1 the activation is nearly the identity

    def _total_loss(self, states: Tensor, labels: Tensor) -> float:
        """The summed cross-entropy of labels (M,) given states (M, D), with logits of CHUNK tokens at a time."""
        parts = zip(states.split(CHUNK), labels.split(CHUNK), strict=True)
        return sum(float(F.cross_entropy(self.logits(x).float(), y, reduction="sum")) for x, y in parts)

    @torch.no_grad()
    def weigh(self, frequencies: Tensor, share: float) -> None:
        """Adds `share` times the logarithm of each token's frequency (V,) to its bias. With -1 a logit, which was
        log p(token | position) but for a constant of the position, becomes the pointwise mutual information of both
        (Church and Hanks, 1990), by which frequent words no longer come first whatever the text. A token that never
        occurs, special ones among them, counts as the most frequent, for nothing is known of it."""
        assert self.bias is not None
        logs = log_shares(frequencies)
        logs[frequencies == 0] = logs.max()
        self.bias += share * logs.to(self.bias)

    @torch.no_grad()
    def shift(self, parts: list[dict[str, Tensor]], active: int) -> float:
        """Adds one constant to the bias, by which of all texts together `active` dimensions per text have a maximum
        over positions above 0; returns the constant. No probability of the masked LM changes."""
        assert self.bias is not None
        maxima, device = [], self.bias.device
        for part in ({name: tensor.to(device) for name, tensor in part.items()} for part in parts):
            for states, kept in zip(self.states(part), part["attention_mask"].bool(), strict=True):
                maxima.append(self.logits(states[kept]).float().amax(0))
        found = torch.stack(maxima)  # (B, V)
        top = found.flatten().topk(active * len(found) + 1).values
        constant = -float(top[-2:].double().mean())
        self.bias += constant
        return constant


def log_shares(frequencies: Tensor) -> Tensor:
    """The logarithm of each token's share of all tokens, one more counted of each: (V,) -> (V,)"""
    return torch.log((frequencies + 1) / (frequencies + 1).sum())


def discount_of(config: Any, base: str) -> float:
    """The share of the log frequencies that an earlier run took off the bias; raises ValueError for none."""
    found = getattr(config, DISCOUNT, 0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 2:
        raise ValueError(
            f"{DISCOUNT} in the config.json of --base {base} must be a number from 0 to 2, found {found!r}"
        )
    return float(found)


def build(options: argparse.Namespace) -> tuple[MaskedLM, Any, set[str]]:
    """The masked LM of `--base`, its tokenizer, and which parameters of its head the base lacks, by MaskedLM's names.

    Raises FileNotFoundError or ValueError naming what is wrong with the base or the options.
    """
    base = options.base
    config = load_config(base)
    if architecture_of(config) != "encoder" or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ValueError(f"--base {base} is a {config.model_type} model: masked language modelling needs an encoder")
    tokenizer = load_tokenizer(base)
    for name in ("mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"the tokenizer of --base {base} has no {name}, which masked language modelling needs")
    backbone, wrapper, missing = load_backbone(base, with_head=True, device=resolve_device(options.device))
    assert wrapper is not None
    output, words = wrapper.get_output_embeddings(), backbone.get_input_embeddings()  # type: ignore[operator]
    size, last = len(words.weight), max(tokenizer.get_vocab().values())
    if last >= size:
        raise ValueError(f"the tokenizer's ids go up to {last}, but --base {base} has a vocabulary of {size}")
    if not options.active_terms < size:
        raise ValueError(f"--active-terms must be below the vocabulary of {size}, found {options.active_terms}")
    limit = position_limit(backbone)
    if limit is not None and options.max_length > limit:
        raise ValueError(f"--max-length {options.max_length} is more than the {limit} positions of --base {base}")
    if output.bias is None:
        raise ValueError(f"the MLM head of {config.model_type} has no bias in --base {base}, by which its level is set")
    named = dict(wrapper.named_parameters(remove_duplicate=False))
    lost = any(named.get(name) is output.weight for name in missing)
    if lost and output.weight is not words.weight:  # a decoder of its own that was never trained
        wrapper.config.tie_word_embeddings = True
        wrapper.tie_weights()
        named = dict(wrapper.named_parameters(remove_duplicate=False))
    absent = {id(named[name]) for name in missing if name in named}
    model = MaskedLM(wrapper, options.train_encoder)
    head = {name: parameter for name, parameter in model.named_parameters() if not name.startswith("encoder.")}
    return model, tokenizer, {name for name, parameter in head.items() if id(parameter) in absent}


@interruptible("train/mlm.py", "the same command goes on from the last checkpoint")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/mlm.py"
    )
    add = parser.add_argument
    add("--base", required=True, metavar="PATH", help="encoder to begin with, a folder or hub id")
    add("--text", required=True, nargs="+", metavar="PATH", help=".txt, .jsonl(.gz) files and BEIR folders")
    add("--train-encoder", action="store_true", help="train the encoder too, not its head alone")
    add("--max-length", type=int, default=128, metavar="TOKENS", help="longer texts become several windows (128)")
    add("--mask-share", type=float, default=0.15, help="share of the tokens to predict (0.15)")
    add("--kept-share", type=float, help="of the tokens to predict, those that stay (0.5; 0.1 with --train-encoder)")
    add("--active-terms", type=int, default=200, help="positive dimensions of a text at the end, on average (200)")
    add(
        "--pmi",
        type=float,
        metavar="SHARE",
        help="of the log frequencies to take off the bias at the end (a new bias 1, else as the base)",
    )
    add_options(parser, batch_size=32, learning_rate=1e-3, epochs=1)
    parser.set_defaults(max_steps=None, epochs=None, learning_rate=None)
    options = parser.parse_args(arguments)
    if options.epochs is None:
        options.epochs = 1.0
        options.max_steps = STEPS if options.max_steps is None else options.max_steps
    if options.learning_rate is None:
        options.learning_rate = 5e-5 if options.train_encoder else 3e-3
    if options.kept_share is None:
        options.kept_share = 0.1 if options.train_encoder else 0.5
    try:
        return run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train/mlm.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Trains by the options; raises ValueError, OSError, ImportError or FloatingPointError with one clear line."""
    check_options(options)
    if not 0.01 <= options.mask_share <= 0.99:
        raise ValueError(f"--mask-share must lie between 0.01 and 0.99, found {options.mask_share}")
    if not 0 <= options.kept_share < 1:
        raise ValueError(f"--kept-share must be at least 0 and below 1, found {options.kept_share}")
    if options.pmi is not None and not 0 <= options.pmi <= 2:
        raise ValueError(f"--pmi must lie between 0 and 2, found {options.pmi}")
    for name, least in {"max_length": SHORTEST, "active_terms": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, found {getattr(options, name)}")
    with begun(options, [texts_file(path) for path in options.text], MARKER) as finished:
        if finished:
            print(f"{options.output} holds the finished model of these options; nothing to do")
            return 0
        set_seed(options.seed)
        model, tokenizer, new = build(options)
        windows = Windows(options.text, tokenizer, options.max_length)
        schedule = schedule_of(options, len(windows), "the text")

        def masked(rows: list[int], rng: random.Random) -> list[dict[str, Tensor]]:
            return mask(windows, rows, tokenizer, options.mask_share, options.kept_share, rng.getrandbits(63))

        def batch(step: int, rows: list[int]) -> dict[str, Any]:
            return {"parts": masked(rows, schedule.rng(step, 0))}

        frequencies = windows.frequencies(len(model.bias))
        taken = 0.0 if "bias" in new else discount_of(model.wrapper.config, options.base)
        model.weigh(frequencies, taken)
        pmi = options.pmi if options.pmi is not None else 1.0 if "bias" in new else taken
        if new and not whole_checkpoints(Path(options.output)):
            rng, size = random.Random(f"{options.seed} first"), options.batch_size
            rows = rng.sample(range(len(windows)), min(FIRST * size, len(windows)))
            first = (masked(rows[at : at + size], rng) for at in range(0, len(rows), size))
            model.begin(new, frequencies, first)

        def write(folder: Path) -> None:
            model.eval()
            rows = torch.linspace(0, len(windows) - 1, min(SAMPLE, len(windows))).long().tolist()
            model.weigh(frequencies, -pmi)
            setattr(model.wrapper.config, DISCOUNT, pmi)
            constant = model.shift(plain(windows, rows, tokenizer), options.active_terms)
            print(f"bias shifted by {constant:.3f}: {options.active_terms} active dimensions per text on average")
            model.wrapper.save_pretrained(folder)
            load_tokenizer(options.base).save_pretrained(folder)  # as it was: windows leave theirs cutting texts

        what = f"new in the head: {', '.join(sorted(new))}" if new else "its own head"
        print(f"{windows.texts:,} texts, {len(windows.tokens):,} tokens, {schedule.steps:,} steps; {what}", flush=True)
        set_seed(options.seed)
        if train(model, Steps(schedule, batch), options, write, MARKER):
            print(f"model in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
