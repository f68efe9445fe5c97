"""SparTerm: gate, modes and losses by hand on four tokens; a naive loop; training that learns to expand."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import row, write_rows
from safetensors.torch import load_file, save_file
from test_eval_program import write_beir
from torch import nn
from torch.nn import functional as F
from transformers import BertForMaskedLM

from eval import run as evaluation
from eval.lexical import load_lexical
from eval.scoring import evaluate, lens_system
from lens.chunked import max_pool
from lens.config import LensConfig
from lens.corpus import Beir
from lens.head import LexicalHead
from lens.model import LensModel
from lens.sparterm import MODES, SparTerm, SparTermConfig, SparTermModel, importance, mask
from train.sparterm import gate_loss, main, ranking_loss

STATES = torch.tensor([[2.0, -1.0, 0.5, -3.0], [1.0, 3.0, -2.0, -4.0], [-1.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 6.0]])
"""Hidden states of the four tokens; the head's rows are the unit vectors, so that states are logits."""


class Table(nn.Module):
    """A backbone that looks its states up."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=4)
        self.embeddings = nn.Embedding(4, 4)
        self.embeddings.weight.data.copy_(STATES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.embeddings(input_ids))


def four(**options: Any) -> SparTermModel:
    config = LensConfig(
        "four", architecture="encoder", head="vocabulary", dimensions=4, hidden_size=4, positions="content",
        prompt="plain", normalize=False,
    )  # fmt: skip
    head = LexicalHead(config, torch.arange(4))
    head.weight.data.copy_(torch.eye(4))
    return SparTermModel(LensModel(Table(), head, config), SparTermConfig(**options)).eval()


def inputs(*texts: list[int]) -> dict[str, torch.Tensor]:
    """Padded texts of one length, every token pooled."""
    ids = torch.tensor(texts)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pooled": torch.arange(ids.numel()),
        "pool_offsets": torch.arange(len(texts) + 1) * ids.shape[1],
    }


def test_modes_by_hand() -> None:
    """Text (0, 1): relu summed over its two states is (3, 3, 0.5, 0), the greatest logits (2, 3, 0.5, -3)."""
    model = four()
    terms = model(inputs([0, 1], [3, 2]), "enhanced")
    assert terms.gate.tolist() == [[2.0, 3.0, 0.5, -3.0], [0.0, 0.0, 0.0, 6.0]]
    assert terms.own.tolist() == [[True, True, False, False], [False, False, True, True]]

    def embedded(mode: Any) -> list[float]:
        found: list[float] = model(inputs([0, 1]), mode).embeddings[0].tolist()
        return found

    assert embedded("literal") == [3.0, 3.0, 0.0, 0.0]
    assert embedded("expansion") == [0.0, 0.0, 0.5, 0.0]
    assert embedded("enhanced") == [3.0, 3.0, 0.5, 0.0]


def test_threshold_and_bias_of_the_gate_by_hand() -> None:
    """sigmoid(0.5) = 0.622: a threshold of 0.63 shuts term 2; the gate's bias opens it again, not its importance."""
    model = four(threshold=0.63)
    assert model(inputs([0, 1]), "enhanced").embeddings[0].tolist() == [3.0, 3.0, 0.0, 0.0]
    model.gate.bias.data[2] = 0.1
    assert model(inputs([0, 1]), "enhanced").embeddings[0].tolist() == [3.0, 3.0, 0.5, 0.0]
    own = torch.tensor([[True, False, False, True]])
    logits = torch.tensor([[-9.0, math.log(0.7 / 0.3) + 1e-4, math.log(0.7 / 0.3) - 1e-4, 9.0]])
    assert mask("expansion", own, logits, 0.7).tolist() == [[False, True, False, False]]
    assert mask("enhanced", own, logits, 0.7).tolist() == [[True, True, False, True]]
    assert mask("literal", own, None, 0.7).tolist() == own.tolist()
    with pytest.raises(ValueError, match="needs the gate"):
        mask("expansion", own, None, 0.7)


def test_a_text_without_tokens_gets_nothing() -> None:
    model = four()
    nothing = {**inputs([0, 1]), "pooled": torch.arange(0), "pool_offsets": torch.tensor([0, 0])}
    for mode in MODES:
        assert model(nothing, mode).embeddings.tolist() == [[0.0] * 4]


def test_ranking_loss_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    passages = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 1.0], [5.0, 2.0]])  # two of each query, the first positive
    first = -math.log(math.exp(3) / (math.exp(3) + math.exp(1)))
    second = -math.log(math.exp(2) / (math.exp(2) + math.exp(4)))
    assert float(ranking_loss(queries, passages)) == pytest.approx((first + second) / 2)
    first = -math.log(math.exp(3) / sum(math.exp(s) for s in (3, 1, 0, 5)))
    second = -math.log(math.exp(2) / sum(math.exp(s) for s in (0, 2, 2, 4)))
    assert float(ranking_loss(queries, passages, in_batch=True)) == pytest.approx((first + second) / 2)
    halved = -math.log(math.exp(1.5) / (math.exp(1.5) + math.exp(0.5)))
    assert float(ranking_loss(queries[:1], passages[:2], temperature=2.0)) == pytest.approx(halved)


def test_gate_loss_by_hand() -> None:
    probability = torch.tensor([[0.9, 0.2, 0.6], [0.5, 0.1, 0.3]])
    wanted = torch.tensor([[True, False, False], [True, False, True]])
    logits = torch.logit(probability)
    positive = -(math.log(0.9) + math.log(0.5) + math.log(0.3)) / 3
    negative = -(math.log(0.8) + math.log(0.4) + math.log(0.9)) / 3
    assert float(gate_loss(logits, wanted)) == pytest.approx(positive + negative, rel=1e-5)
    assert float(gate_loss(logits, wanted, 2.0, 0.5)) == pytest.approx(2 * positive + 0.5 * negative, rel=1e-5)
    none = torch.zeros_like(wanted)
    assert float(gate_loss(logits, none)) == pytest.approx(-float(torch.log(1 - probability).mean()), rel=1e-5)


def test_pooling_recomputed_has_the_gradients_of_a_naive_loop() -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 5]
    rows, weight, bias = (torch.randn(shape) for shape in ((9, 6), (7, 6), (7,)))
    picks = torch.randn(2, 3, 7)
    chosen = torch.rand(3, 7) > 0.4
    chosen[1], chosen[2] = False, True

    def run(naive: bool) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (rows, weight, bias)]
        if naive:
            logits = leaves[0] @ leaves[1].T + leaves[2]
            parts = [logits[:3], logits[3:4], logits[4:]]
            sums = torch.stack([part.clamp(min=0).sum(0) for part in parts]) * chosen
            most = torch.stack([part.amax(0) for part in parts])
        else:
            sums, most = importance(*leaves, lengths, chosen), max_pool(*leaves, lengths)
        loss = (sums * picks[0]).sum() + (most * picks[1]).sum()
        return [sums, most, *torch.autograd.grad(loss, leaves)]

    for found, wanted in zip(run(False), run(True), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_embeddings_equal_a_naive_loop_and_do_not_depend_on_the_batch(bert_mlm: Path) -> None:
    model = SparTerm.build(bert_mlm, SparTermConfig(threshold=0.6), "cpu")
    texts = ["the quick brown fox", "parse a date", "copy the whole directory tree and keep it", ""]
    found = model.encode_documents(texts, output="numpy")
    assert found.shape == (4, model.config.dimensions)
    lm = BertForMaskedLM.from_pretrained(bert_mlm).eval()
    for vector, text in zip(found, texts, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = lm(torch.tensor([ids])).logits[0, 1:-1]  # [CLS] and [SEP] are not pooled
        wanted = np.zeros(logits.shape[1], dtype=np.float32)
        if len(logits):
            importance, gate = logits.clamp(min=0).sum(0), torch.sigmoid(logits.max(0).values)
            own = torch.zeros(logits.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(ids[1:-1]), True)
            wanted = (importance * ((gate > 0.6) | own)).numpy()
        assert np.allclose(vector, wanted, atol=1e-4)
    alone = np.concatenate([model.encode_documents([text], output="numpy") for text in texts])
    assert np.allclose(found, alone, atol=1e-5)
    queries = model.encode_queries(texts, output="numpy")  # literal: the same on the text's own terms
    for query, vector, text in zip(queries, found, texts, strict=True):
        own = np.isin(np.arange(len(query)), model.tokenizer(text, add_special_tokens=False)["input_ids"])
        assert np.allclose(query, vector * own, atol=1e-5)


def test_clusters_serve_as_terms(bert: Path, bert_clusters: Path) -> None:
    model = SparTerm.build(bert, SparTermConfig(mode="literal"), "cpu", clusters=bert_clusters)
    (vector,) = model.encode_documents(["quick fox"], output="numpy")
    labels = model.model.importance.head.labels
    own = {int(labels[token]) for token in model.tokenizer("quick fox", add_special_tokens=False)["input_ids"]}
    assert set(np.flatnonzero(vector)) <= own
    assert vector.shape == (24,)


def test_a_decoder_is_refused(mistral: Path) -> None:
    with pytest.raises(ValueError, match="SparTerm needs an encoder"):
        SparTerm.build(mistral, None, "cpu", prompt="plain", bias=False)


# training: passages speak of `fox`, queries ask for `date`, and never the same word

PAIRS = {"fox": "date", "dog": "string", "tree": "error", "files": "format", "thread": "token", "order": "head"}
FILLERS = ["quick", "brown", "lazy", "copy", "keep", "wait"]


def text_of(word: str, rng: random.Random) -> str:
    words = [word, *rng.sample(FILLERS, 3)]
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    rows = []
    for _ in range(240):
        word, *others = rng.sample(list(PAIRS), 4)
        rows.append(row(query=PAIRS[word], pos=[text_of(word, rng)], neg=[text_of(other, rng) for other in others]))
    return write_rows(tmp_path_factory.mktemp("sparterm") / "examples.jsonl", *rows)


@pytest.fixture(scope="module")
def beir() -> Beir:
    rng = random.Random(1)
    corpus = {f"{word}{i}": text_of(word, rng) for word in PAIRS for i in range(3)}
    qrels = {f"q{word}": {f"{word}{i}": 1 for i in range(3)} for word in PAIRS}
    return Beir("synonyms", corpus, {f"q{word}": asked for word, asked in PAIRS.items()}, qrels)


def arguments(base: Path, data: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "base": base, "data": data, "output": output, "batch_size": 16, "learning_rate": 3e-3, "max_steps": 6,
        "save_steps": 2, "logging_steps": 1, "device": "cpu", **changes,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def trained(bert_mlm: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "sparterm"
    changes = {"max_steps": 200, "save_steps": 200, "logging_steps": 20, "temperature": 10, "threshold": 0.7}
    assert main(arguments(bert_mlm, examples, output, **changes)) == 0
    return output


def gain(model: SparTerm, beir: Beir) -> float:
    return float(evaluate(beir, [lens_system("s", model, beir)]).values["s"]["nDCG@10"].mean())


def test_training_learns_to_expand(trained: Path, bert_mlm: Path, beir: Beir) -> None:
    """Queries share no word with their passages: only terms that the gate adds can match."""
    torch.manual_seed(0)
    before = gain(SparTerm.build(bert_mlm, SparTermConfig(threshold=0.7), "cpu"), beir)
    values = {mode: gain(SparTerm.load(trained, "cpu", mode=mode), beir) for mode in MODES}
    assert values["literal"] == 0
    assert values["enhanced"] > max(0.9, before + 0.2)
    assert values["expansion"] > max(0.9, before + 0.2)
    model = SparTerm.load(trained, "cpu")
    sizes = {
        mode: SparTerm.load(trained, "cpu", mode=mode).encode_documents(list(beir.corpus.values())) for mode in MODES
    }
    assert sizes["literal"].nnz + sizes["expansion"].nnz == sizes["enhanced"].nnz
    assert sizes["enhanced"].nnz / len(beir.corpus) < 0.3 * model.config.dimensions  # the gate is no open door
    log = [json.loads(line) for line in (trained / "training_log.jsonl").open()]
    assert log[-1]["gate"] < 0.5 * log[0]["gate"]
    assert log[-1]["rank"] < 0.5 * log[0]["rank"]


def test_the_artifact_evaluates_by_the_program(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    command = "--beir tiny --baselines bm25 --resamples 100 --output out --device cpu --lexical"
    names = [str(trained), f"{trained}:literal", f"more={trained}:expansion"]
    assert evaluation.main([*command.split(), *names]) == 0
    systems = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]["tiny"]["systems"]
    assert list(systems) == ["sparterm", "sparterm-literal", "more", "bm25"]
    active = [systems[name]["active_per_document"] for name in ("sparterm", "sparterm-literal", "more")]
    assert active[0] == pytest.approx(active[1] + active[2])
    with pytest.raises(ValueError, match="one of literal, expansion, enhanced"):
        load_lexical(f"{trained}:both")


def test_a_killed_run_goes_on_to_the_same_weights(bert_mlm: Path, examples: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(bert_mlm, examples, whole)) == 0
    shutil.copytree(whole, broken)
    for path in broken.iterdir():  # as a kill after step 4 leaves it
        if path.is_file() and path.name not in ("run.json", "training_log.jsonl"):
            path.unlink()
    shutil.rmtree(broken / "importance")
    shutil.rmtree(broken / "checkpoint-6")
    assert main(arguments(bert_mlm, examples, broken)) == 0
    for name in ("gate.safetensors", "importance/head.safetensors", "importance/model.safetensors"):
        first, second = load_file(whole / name), load_file(broken / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    (broken / "sparterm.json").unlink()  # as a kill while the artifact was moved leaves it
    assert main(arguments(bert_mlm, examples, broken)) == 0
    second = SparTerm.load(broken, "cpu").encode_documents(["quick fox"], output="numpy")
    assert np.array_equal(second, SparTerm.load(whole, "cpu").encode_documents(["quick fox"], output="numpy"))


def test_a_run_whose_clusters_were_made_anew_is_refused(
    bert: Path, bert_clusters: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clusters = Path(shutil.copytree(bert_clusters, tmp_path / "clusters"))
    command = arguments(bert, examples, tmp_path / "out", clusters=clusters, max_steps=1)
    assert main(command) == 0
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    tensors = load_file(clusters / "clusters.safetensors")
    tensors["centroids"] += 1
    save_file(tensors, clusters / "clusters.safetensors")
    assert main(command) == 2
    assert "a run with other options (files)" in capsys.readouterr().err


def test_literal_mode_leaves_the_gate_alone(bert_mlm: Path, examples: Path, tmp_path: Path) -> None:
    output = tmp_path / "literal"
    assert main(arguments(bert_mlm, examples, output, mode="literal", precision="bf16")) == 0
    assert "gate" not in (output / "training_log.jsonl").read_text()
    assert SparTerm.load(output, "cpu").model.config.mode == "literal"
    with pytest.raises(ValueError, match="without its gate"):
        SparTerm.load(output, "cpu", mode="enhanced")


def test_half_precision_and_a_shut_gate(bert_mlm: Path, examples: Path, tmp_path: Path) -> None:
    output = tmp_path / "shut"
    assert main(arguments(bert_mlm, examples, output, precision="bf16", gate_bias=-100, max_steps=2)) == 0
    model = SparTerm.load(output, "cpu")
    literal = SparTerm.load(output, "cpu", mode="literal")
    texts = ["quick fox", "parse a date"]
    assert (model.encode_documents(texts) != literal.encode_documents(texts)).nnz == 0
    assert SparTerm.load(output, "cpu", mode="expansion").encode_documents(texts).nnz == 0


def test_the_gate_passes_no_gradient_to_the_ranking(bert_mlm: Path) -> None:
    torch.manual_seed(0)
    model = SparTerm.build(bert_mlm, SparTermConfig(), "cpu")
    batch = model.text.collate(model.text(["the quick brown fox", "parse a date"])).inputs()
    embedded = model.model(batch, "enhanced").embeddings
    F.cross_entropy(embedded[:1] @ embedded.T, torch.tensor([1])).backward()
    assert all(parameter.grad is None for parameter in model.model.gate.parameters())
    assert float(model.model.importance.head.weight.grad.abs().sum()) > 0


def test_bad_input_gets_one_line(
    bert_mlm: Path, mistral: Path, trained: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    lonely = write_rows(tmp_path / "lonely.jsonl", row(query="q", pos=["fox"], neg=[]))
    cases = [
        (arguments(bert_mlm, lonely, output), "`neg` is empty but group_size=2"),
        (arguments(bert_mlm, examples, output, threshold=1.5), "threshold must lie between 0 and 1"),
        (arguments(bert_mlm, examples, output, temperature=0), "--temperature must be above 0"),
        (arguments(bert_mlm, examples, output, mode="literal", query_mode="enhanced"), "--query-mode enhanced needs"),
        (arguments(bert_mlm, examples, output, negatives=0), "--negatives 0 leaves nothing"),
        (arguments(bert_mlm, examples, output, gate_weight="nan"), "--gate-weight must be at least 0"),
        (arguments(bert_mlm, examples, output, document_max_length=999), "more than the 128 positions"),
        (arguments(bert_mlm, tmp_path / "no.jsonl", output), "no.jsonl does not exist"),
        (arguments(mistral, examples, output), "SparTerm needs an encoder"),
    ]
    for command, message in cases:
        shutil.rmtree(output, ignore_errors=True)
        assert main(command) == 2, message
        error = capsys.readouterr().err
        assert error.strip().splitlines()[-1].startswith("train/sparterm.py: ")
        assert message in error, error
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    save_file({"bias": torch.zeros(3)}, broken / "gate.safetensors")
    with pytest.raises(ValueError, match="gate.safetensors"):
        SparTerm.load(broken, "cpu")
    with pytest.raises(FileNotFoundError, match="no SparTerm model"):
        SparTerm.load(bert_mlm, "cpu")
    with pytest.raises(FileNotFoundError, match="no model of either kind"):
        load_lexical(str(bert_mlm))
