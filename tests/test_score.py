"""train/score.py: every kind of teacher against the library that made it, averages by hand, restarts, bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, decoder_tokenizer, encoder_tokenizer, row, write_rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from lens.files import atomic_file
from lens.locks import alone
from train import teacher_pool
from train.data import text_key
from train.score import main
from train.shards import STATE, Shards
from train.sources import read_examples
from train.teacher_pool import Here, Processes, chunks_of
from train.teachers import PROMPTS, Options, Pair, Teacher, parse_prompt, parse_teacher

HALVES = [(" ".join(words[:3]), " ".join(words[3:8])) for words in map(str.split, SENTENCES)]
LONG = " ".join(SENTENCES * 4)


def save_classifier(folder, labels=1, steps=0):
    """A tiny BERT that classifies pairs, after some steps of learning which half of a sentence belongs to which."""
    torch.manual_seed(1)
    tokenizer = encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.15, num_labels=labels,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    pairs = [(query, passage) for query, _ in HALVES for _, passage in HALVES]
    target = torch.eye(len(HALVES)).flatten()
    batch = tokenizer([q for q, _ in pairs], [p for _, p in pairs], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model(**batch).logits[:, 0], target, pos_weight=torch.tensor(6.0)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cross(tmp_path_factory):
    """Folder of a tiny cross-encoder that ranks the right half of a sentence first."""
    return save_classifier(tmp_path_factory.mktemp("cross"), steps=150)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Seven examples of unlike lengths, one with a text that no teacher reads to its end, one without negatives."""
    rows = []
    for number, (query, passage) in enumerate(HALVES):
        others = [HALVES[(number + step) % 7][1] for step in (1, 2, 3)]
        rows.append(row(query=query, pos=[passage], neg=others, prompt=f"Find it {number}."))
    rows[1]["neg"].append(LONG)
    rows[2]["pos"].append("the lazy dog")
    rows[3]["neg"] = []
    return write_rows(tmp_path_factory.mktemp("score") / "data.jsonl", *rows)


def score(output, *arguments):
    assert main([*map(str, arguments), "--output", str(output), "--device", "cpu"]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def flat(rows):
    return np.array([value for item in rows for value in (*item["pos_scores"], *item["neg_scores"])])


def pairs_in(rows):
    return [(item["query"], text, item["prompt"]) for item in rows for text in (*item["pos"], *item["neg"])]


# --- each kind of teacher --------------------------------------------------------------------------------------------


def test_cross_encoder_scores_are_those_of_the_library(cross, data, tmp_path):
    from sentence_transformers import CrossEncoder

    rows = score(tmp_path / "a.jsonl", "--model", f"cross={cross}", "--data", data)
    peer = CrossEncoder(str(cross), device="cpu")
    pairs = [(query, passage) for query, passage, _ in pairs_in(rows)]
    logits = peer.predict(pairs, activation_fn=torch.nn.Identity())
    assert np.ptp(logits) > 1
    np.testing.assert_allclose(flat(rows), logits, atol=1e-5)

    model = AutoModelForSequenceClassification.from_pretrained(cross).eval()
    tokenizer = AutoTokenizer.from_pretrained(cross)
    with torch.inference_mode():
        naive = [
            model(**tokenizer(*pair, truncation=True, max_length=128, return_tensors="pt")).logits.item()
            for pair in pairs
        ]
    np.testing.assert_allclose(flat(rows), naive, atol=1e-5)

    narrow = score(tmp_path / "b.jsonl", "--model", cross, "--data", data, "--batch-tokens", 20, "--shard", 2)
    np.testing.assert_allclose(flat(narrow), flat(rows), atol=1e-5)
    active = score(tmp_path / "c.jsonl", "--model", cross, "--data", data, "--activation", "model")
    np.testing.assert_allclose(flat(active), peer.predict(pairs), atol=1e-5)
    short = score(tmp_path / "d.jsonl", "--model", cross, "--data", data, "--max-length", 8)
    peer.max_seq_length = 8
    np.testing.assert_allclose(flat(short), peer.predict(pairs, activation_fn=torch.nn.Identity()), atol=1e-5)
    assert np.abs(flat(short) - flat(rows)).max() > 1e-4


def test_a_trained_cross_encoder_finds_the_positives(cross, data, tmp_path):
    for item in score(tmp_path / "a.jsonl", "--model", cross, "--data", data)[3:]:
        assert item["pos_scores"][0] > max([0, *item["neg_scores"]])
    manifest = json.loads((tmp_path / "a.jsonl.manifest.json").read_text())
    assert manifest["statistics"]["positives"]["mean"] > manifest["statistics"]["negatives"]["mean"] + 2


def naive_prompted(folder, texts, yes, no=None):
    """One text at a time, without padding: the logit of `yes`, less that of `no`, after its last token."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = []
    for text in texts:
        ids = text if isinstance(text, list) else tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        scores.append(float(logits[tokenizer.convert_tokens_to_ids(yes)]))
        if no:
            scores[-1] -= float(logits[tokenizer.convert_tokens_to_ids(no)])
    return np.array(scores)


def test_prompted_model_scores_are_those_of_single_texts(mistral, data, tmp_path):
    model = ("--model", f"llm={mistral}", "--data", data, "--max-length", 2000)
    rows = score(tmp_path / "a.jsonl", *model, "--yes", "y", "--no", "")
    texts = [PROMPTS["bge"].text.format(query=q, passage=p) for q, p, _ in pairs_in(rows)]
    naive = naive_prompted(mistral, texts, "y")
    assert np.std(naive) > 0.01
    np.testing.assert_allclose(flat(rows), naive, atol=1e-5)

    prompt = "{instruction} Is {passage} an answer to {query}? {{}} "
    own = score(tmp_path / "b.jsonl", *model, "--prompt", prompt, "--yes", "y", "--no", "n", "--batch-tokens", 150)
    texts = [f"{how} Is {p} an answer to {q}? {{{{}}}} " for q, p, how in pairs_in(rows)]
    np.testing.assert_allclose(flat(own), naive_prompted(mistral, texts, "y", "n"), atol=1e-5)
    (tmp_path / "prompt.txt").write_text(prompt)
    named = score(tmp_path / "c.jsonl", *model, "--prompt", f"@{tmp_path / 'prompt.txt'}", "--yes", "y", "--no", "n")
    np.testing.assert_allclose(flat(named), flat(own), atol=1e-5)


def test_long_passages_lose_their_end_and_the_prompt_stays_whole(mistral, tmp_path):
    prompt = "Q: {query}\nP: {passage}\nAnswer:"
    item = row(query="quick fox", pos=[LONG], neg=["dog"], prompt=None)
    rows = score(
        tmp_path / "a.jsonl", "--model", f"llm={mistral}", "--data", write_rows(tmp_path / "d.jsonl", item),
        "--prompt", prompt, "--yes", "y", "--no", "n", "--max-length", 64,
    )  # fmt: skip
    whole = decoder_tokenizer()(prompt.format(query="quick fox", passage=LONG))["input_ids"]
    end = decoder_tokenizer()("\nAnswer:", add_special_tokens=False)["input_ids"]
    assert whole[-len(end) :] == end
    assert len(whole) > 200
    cut = whole[: 64 - len(end)] + end
    short = decoder_tokenizer()(prompt.format(query="quick fox", passage="dog"))["input_ids"]
    np.testing.assert_allclose(flat(rows), naive_prompted(mistral, [cut, short], "y", "n"), atol=1e-5)


def test_generative_rerankers_that_the_library_saved_are_cross_encoders(mistral, data, tmp_path):
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    word = Transformer(str(mistral), transformer_task="text-generation")
    answers = [decoder_tokenizer().convert_tokens_to_ids(letter) for letter in "yn"]
    peer = CrossEncoder(modules=[word, LogitScore(*answers)], device="cpu")
    peer.save_pretrained(str(tmp_path / "model"))
    rows = score(tmp_path / "a.jsonl", "--model", tmp_path / "model", "--data", data, "--batch-tokens", 80)
    pairs = [(query, passage) for query, passage, _ in pairs_in(rows)]
    np.testing.assert_allclose(flat(rows), peer.predict(pairs, activation_fn=torch.nn.Identity()), atol=1e-5)


def test_released_prompts():
    assert PROMPTS["bge"].text.startswith("A: {query}\nB: {passage}\nGiven a query A and a passage B, determine")
    assert (PROMPTS["bge"].yes, PROMPTS["bge"].no) == ("Yes", None)
    assert PROMPTS["qwen3"].text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert parse_prompt("qwen3", no="").no is None
    assert parse_prompt("{query}{passage}").no == "No"


def test_sentence_transformers_scores(bert, data, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    word = Transformer(str(bert))
    pooling = Pooling(word.get_embedding_dimension(), pooling_mode="cls")
    prompts = {"query": "quick ", "document": "lazy "}
    peer = SentenceTransformer(modules=[word, pooling], prompts=prompts, device="cpu")
    peer.save(str(tmp_path / "model"))
    rows = score(tmp_path / "a.jsonl", "--model", f"bi={tmp_path / 'model'}", "--data", data, "--batch-tokens", 60)
    queries, passages, _ = zip(*pairs_in(rows), strict=True)
    vectors = peer.encode_query(list(queries)), peer.encode_document(list(passages))
    np.testing.assert_allclose(flat(rows), peer.similarity_pairwise(*vectors), atol=1e-5)


def test_lens_model_scores_with_each_example_s_instruction(mistral, mistral_clusters, tmp_path):
    import lens

    lens.LENS.build(mistral, mistral_clusters, device="cpu").save(tmp_path / "model", include_backbone=True)
    items = [
        row(query="quick fox", pos=["lazy dog"], neg=["the fox", "dog"], prompt=None, type="symmetric_sts"),
        row(query="quick fox", pos=["lazy dog"], neg=["the fox", "dog"], prompt="Find it.", type="symmetric_sts"),
    ]
    path = write_rows(tmp_path / "d.jsonl", *items)
    rows = score(tmp_path / "a.jsonl", "--model", tmp_path / "model", "--data", path)
    model = lens.load(tmp_path / "model", device="cpu")
    for item in rows:
        query = model.encode_queries([item["query"]], instruction=item["prompt"])
        documents = model.encode_documents([*item["pos"], *item["neg"]], instruction=item["prompt"])
        np.testing.assert_allclose(flat([item]), (query @ documents.T)[0], atol=1e-5)
    assert np.abs(flat(rows[:1]) - flat(rows[1:])).max() > 1e-3


def test_models_of_the_hub_are_known_by_their_commit(bert, bert_clusters, data, tmp_path, monkeypatch):
    import lens

    commit = "0123456789abcdef" * 2 + "01234567"
    for name in ("head", "sentence"):  # neither holds config.json
        snapshot = tmp_path / "hub" / f"models--org--{name}" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (tmp_path / "hub" / f"models--org--{name}" / "refs").mkdir()
        (tmp_path / "hub" / f"models--org--{name}" / "refs" / "main").write_text(commit)
    (snapshot / "modules.json").write_text("[]")
    head = tmp_path / "hub" / "models--org--head" / "snapshots" / commit
    lens.LENS.build(bert, bert_clusters, device="cpu").save(head)
    assert not (head / "config.json").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = score(tmp_path / "a.jsonl", "--model", "org/head", "--data", data)
    assert rows == score(tmp_path / "b.jsonl", "--model", head, "--data", data)
    (teacher,) = json.loads((tmp_path / "a.jsonl.manifest.json").read_text())["teachers"]
    assert (teacher["model"], teacher["kind"], teacher["commit"]) == ("org/head", "lens", commit)
    assert Teacher("sentence", "org/sentence", Options()).facts()["commit"] == commit


def test_splade_scores_are_inner_products(bert_mlm, data, tmp_path):
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    peer = SparseEncoder(modules=[MLMTransformer(str(bert_mlm)), SpladePooling()], device="cpu")
    peer.save(str(tmp_path / "model"))
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    data = tmp_path / "plain.jsonl"  # an instruction would stand before the query
    data.write_text("".join(json.dumps({**line, "prompt": None}) + "\n" for line in lines))
    rows = score(tmp_path / "a.jsonl", "--model", f"bi={tmp_path / 'model'}", "--data", data)
    queries, passages, _ = zip(*pairs_in(rows), strict=True)
    vectors = peer.encode_query(list(queries)).to_dense(), peer.encode_document(list(passages)).to_dense()
    np.testing.assert_allclose(flat(rows), (vectors[0] * vectors[1]).sum(1), rtol=1e-5, atol=1e-5)
    alone = score(tmp_path / "b.jsonl", "--model", f"lens={bert_mlm}", "--data", data)
    np.testing.assert_allclose(flat(alone), flat(rows), rtol=1e-5, atol=1e-5)


def test_embeddings_are_the_same_from_any_shards(bert, data, tmp_path):
    for name, size in (("a", 100), ("b", 2)):
        extra = ("--embeddings", tmp_path / f"{name}.safetensors", "--shard", size)
        score(tmp_path / f"{name}.jsonl", "--model", bert, "--data", data, *extra)
    one, many = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    texts = dict.fromkeys(text for e in read_examples(data) for text in (e.query, *e.pos, *e.neg))
    assert one["keys"].tolist() == many["keys"].tolist() == [text_key(text) for text in texts]
    torch.testing.assert_close(one["embeddings"], many["embeddings"], atol=1e-3, rtol=0)


def test_gzipped_outputs(bert, data, tmp_path):
    plain = score(tmp_path / "a.jsonl", "--model", bert, "--data", data)
    packed = [tmp_path / name for name in ("b.jsonl.gz", "c.jsonl.gz")]
    for output in packed:
        command = ["--model", bert, "--data", data, "--output", output, "--device", "cpu"]
        assert main(list(map(str, command))) == 0
        assert [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()] == plain
    assert packed[0].read_bytes() == packed[1].read_bytes()
    digest = json.loads((tmp_path / "b.jsonl.gz.manifest.json").read_text())["output"]["sha256"]
    assert digest == hashlib.sha256(packed[0].read_bytes()).hexdigest()
    assert read_examples(packed[0])[0].pos_scores == plain[0]["pos_scores"]


# --- several teachers, several devices -------------------------------------------------------------------------------


def test_means_of_teachers_by_hand(cross, bert, data, tmp_path):
    one = flat(score(tmp_path / "1.jsonl", "--model", cross, "--data", data))
    two = flat(score(tmp_path / "2.jsonl", "--model", f"bi={bert}", "--data", data))
    both = ("--model", cross, "--model", f"bi={bert}", "--data", data)
    plain = flat(score(tmp_path / "3.jsonl", *both, "--weights", 1, 3, "--no-standardise"))
    np.testing.assert_allclose(plain, (one + 3 * two) / 4, atol=2e-6)
    rows = score(tmp_path / "4.jsonl", *both, "--shard", 3)
    mean = ((one - one.mean()) / one.std() + (two - two.mean()) / two.std()) / 2
    np.testing.assert_allclose(flat(rows), mean, atol=1e-4)

    manifest = json.loads((tmp_path / "4.jsonl.manifest.json").read_text())
    assert manifest["standardised"] is True
    assert manifest["counts"] == {"examples": 7, "positives": 8, "negatives": 19, "examples_without_negatives": 1}
    above = [value > max(item["pos_scores"]) for item in rows for value in item["neg_scores"]]
    assert manifest["statistics"]["negatives_above_the_best_positive"] == pytest.approx(np.mean(above))
    positives = [value for item in rows for value in item["pos_scores"]]
    assert manifest["statistics"]["positives"]["mean"] == pytest.approx(np.mean(positives), abs=1e-5)
    assert manifest["statistics"]["positives"]["std"] == pytest.approx(np.std(positives), abs=1e-5)
    named = manifest["teachers"][1]
    negatives = [value for item in map(json.loads, (tmp_path / "2.jsonl").open()) for value in item["neg_scores"]]
    assert named["statistics"]["negatives"]["mean"] == pytest.approx(np.mean(negatives), abs=1e-5)
    weights = hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    assert (named["weight"], named["sha256"]["model.safetensors"]) == (1.0, weights)
    assert manifest["output"]["sha256"] == hashlib.sha256((tmp_path / "4.jsonl").read_bytes()).hexdigest()
    assert not (tmp_path / "4.jsonl.parts").exists()


def test_each_pair_and_each_text_is_computed_once():
    pairs = [Pair("q", "p"), Pair("q", "p", "other"), Pair("q", "r"), Pair("p", "q")]
    items = {kind: parse(kind).items(pairs) for kind in ("cross", "llm", "mean", "sentence", "lens")}
    assert items["cross"] == [("q", "p"), ("q", "r"), ("p", "q")]
    assert items["llm"] == [("q", "p", ""), ("q", "r", ""), ("p", "q", "")]
    assert items["mean"] == [("q", "", ""), ("p", "", ""), ("r", "", "")]
    assert len(items["sentence"]) == 5
    assert len(items["lens"]) == 6


def parse(kind):
    return Teacher(kind, "x", Options())


def test_chunks_hold_every_item_once_the_longest_first(monkeypatch):
    monkeypatch.setattr(teacher_pool, "CHUNK_TOKENS", 20)
    items = [("x" * length,) for length in (4, 400, 8, 40, 12, 16)]
    chunks = chunks_of(items)
    assert [number for chunk in chunks for number in chunk] == [1, 3, 5, 4, 2, 0]
    assert chunks[0] == [1]
    assert len(chunks) == 3


def test_several_processes_give_the_same(cross, bert, data, tmp_path, monkeypatch):
    both = ("--model", cross, "--model", f"bi={bert}", "--data", data)
    monkeypatch.setattr(teacher_pool, "CHUNK_TOKENS", 30)
    one = score(tmp_path / "one.jsonl", *both)
    arguments = [*map(str, both), "--output", str(tmp_path / "two.jsonl"), "--devices", "cpu", "cpu"]
    assert main(arguments) == 0
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(flat(two), flat(one), atol=1e-5)


def test_a_process_that_dies_is_named(cross, bert):
    teacher = parse_teacher(f"cross={cross}", Options())
    pool = Processes([teacher], [torch.device("cpu"), torch.device("cpu")])
    try:
        chunks = [[pair] for pair in HALVES]
        found = dict(pool.run(0, chunks))
        expected = dict(Here([teacher], torch.device("cpu")).run(0, chunks))
        for number in range(len(chunks)):
            np.testing.assert_allclose(found[number], expected[number], atol=1e-6)
        os.kill(pool.processes[1].pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="cpu died"):
            list(pool.run(0, chunks))
    finally:
        pool.close()
    assert not any(process.is_alive() for process in pool.processes)


# --- restarts --------------------------------------------------------------------------------------------------------


def test_killed_and_started_again_equals_uninterrupted(cross, data, tmp_path, capsys):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    many = write_rows(
        tmp_path / "many.jsonl", *({**item, "query": f"{item['query']} {n}"} for n in range(40) for item in rows)
    )
    options = ["--model", f"cross={cross}", "--data", str(many), "--shard", "4", "--device", "cpu"]
    output, parts = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.parts"
    command = [sys.executable, str(ROOT / "train" / "score.py"), *options, "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (parts / "part-000003.npz").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = len(list(parts.glob("part-*.npz")))
    assert 4 <= done < 70
    assert not output.exists()

    assert main([*options, "--output", str(output), "--max-length", "64"]) == 2
    assert "this differs: models;" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.npz")}
    shutil.copytree(parts, tmp_path / "again.jsonl.parts")
    assert main([*options, "--output", str(output)]) == 0
    assert f"going on: {done} of 70 shards are done" in capsys.readouterr().err
    assert len(times) == done
    assert not parts.exists()
    whole = tmp_path / "whole.jsonl"
    assert main([*options, "--output", str(whole)]) == 0
    assert output.read_bytes() == whole.read_bytes()

    again = ["--output", str(tmp_path / "again.jsonl")]
    with many.open("a") as file:
        file.write(json.dumps(row()) + "\n")
    capsys.readouterr()
    assert main([*options, *again]) == 2
    assert "this differs: data; run it as it was begun, or begin anew (--overwrite)" in capsys.readouterr().err
    assert main([*options, *again, "--overwrite"]) == 0
    assert "beginning anew, because this changed: data" in capsys.readouterr().err
    assert len((tmp_path / "again.jsonl").read_text().splitlines()) == 281


def test_weights_may_change_between_an_interrupted_run_and_its_end(cross, bert, data, tmp_path, monkeypatch):
    both = ("--model", cross, "--model", f"bi={bert}", "--data", data, "--shard", 2)
    compute = Shards.compute

    def stop(self, number, *arguments):
        if number == 2:
            raise KeyboardInterrupt
        compute(self, number, *arguments)

    output = tmp_path / "a.jsonl"
    monkeypatch.setattr(Shards, "compute", stop)
    assert main([*map(str, both), "--output", str(output), "--device", "cpu"]) == 130
    monkeypatch.setattr(Shards, "compute", compute)
    resumed = score(output, *both, "--weights", 2, 1)
    assert resumed == score(tmp_path / "b.jsonl", *both, "--weights", 2, 1)


def test_a_run_killed_between_embeddings_and_output_goes_on(bert, data, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    output, embeddings, other = tmp_path / "a.jsonl", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    command = ["--model", bert, "--data", data, "--embeddings", embeddings]
    monkeypatch.setattr(Shards, "combined", stop)
    assert main([*map(str, command), "--output", str(output), "--device", "cpu"]) == 130
    monkeypatch.undo()
    assert embeddings.exists()
    assert not output.exists()
    other.write_text("precious")
    assert main([*map(str, command[:-1]), str(other), "--output", str(output), "--device", "cpu"]) == 2
    assert "b.safetensors exists" in capsys.readouterr().err
    assert other.read_text() == "precious"
    rows = score(output, *command)
    assert rows == score(tmp_path / "c.jsonl", *command[:-1], tmp_path / "c.safetensors")
    found, expected = load_file(embeddings), load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in ("embeddings", "keys"))


def test_a_run_killed_while_it_wrote_its_first_file_is_begun_again(bert, data, tmp_path):
    output, parts = tmp_path / "a.jsonl", tmp_path / "a.jsonl.parts"
    with atomic_file(parts / STATE) as temporary:
        torn = temporary
    (parts / STATE).unlink()
    torn.write_text('{"da')
    assert len(score(output, "--model", bert, "--data", data)) == 7
    assert not parts.exists()


def test_one_run_at_a_time_writes_to_an_output(bert, data, tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    arguments = ["--model", str(bert), "--data", str(data), "--output", str(output), "--device", "cpu"]
    with alone(output):
        assert main(arguments) == 2
        assert "another run is writing to" in capsys.readouterr().err
        assert not (tmp_path / "a.jsonl.parts").exists()
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.manifest.json"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_example_and_teacher(cross, bert, data, tmp_path, capsys, value):
    broken = shutil.copytree(cross, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    word = AutoTokenizer.from_pretrained(cross).convert_tokens_to_ids("dog")  # each trained tokenizer numbers them anew
    weights["bert.embeddings.word_embeddings.weight"][word] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    output = tmp_path / "a.jsonl"
    arguments = ["--model", f"bi={bert}", "--model", f"cross={broken}", "--data", str(data), "--output", str(output)]
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"data.jsonl:2: teacher cross={broken} gives neg[3] the score nan" in error
    assert not output.exists()


def test_a_lens_model_that_gives_nan_is_named(overflowing, data, tmp_path, capsys):
    arguments = ["--model", str(overflowing), "--data", str(data), "--output", str(tmp_path / "a.jsonl")]
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"teacher lens={overflowing} failed: embeddings hold NaN" in error
    assert "memory" not in error


def bad_rows(*rows):
    return "".join(json.dumps(item) + "\n" for item in rows)


BAD_DATA = [
    ("", "holds no examples"),
    ("\n\n", "holds no examples"),
    (bad_rows(row(), {"query": "q", "neg": ["n"]}), "d.jsonl:2: `pos` must be a list"),
    (bad_rows(row(), row(pos=[])), "d.jsonl:2: `pos` must hold at least one text"),
    (bad_rows(row(neg=["n", " "])), "d.jsonl:1: `neg` holds an empty text"),
    (bad_rows(row(query="")), "d.jsonl:1: `query` must be a text"),
    (bad_rows(row()) + "\n{oops\n", "d.jsonl:3: not valid JSON"),
    (bad_rows(row()) + "[1]\n", "d.jsonl:2: expected a JSON object"),
]


@pytest.mark.parametrize(("content", "message"), BAD_DATA, ids=[message for _, message in BAD_DATA])
def test_bad_data_gets_one_line(bert, tmp_path, capsys, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    arguments = ["--model", str(bert), "--data", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "a.jsonl")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]


BAD_OPTIONS = [
    ("--model nowhere/at/all", "nowhere/at/all does not exist"),
    ("--model empty", "empty holds no config.json"),
    ("--model reranker=bert", "'reranker' is no kind of teacher; write cross=, llm=, bi="),
    ("--model cross=", "names no folder"),
    ("--model lens=bert", "teacher lens=bert cannot be used"),
    ("--model cross=bert", "no cross-encoder (BertModel): one for sequence classification with a single label"),
    ("--model three", "is a classifier of 3 labels: a teacher needs a single one"),
    ("--model cross=three", "is a classifier of 3 labels: a teacher needs a single one"),
    ("--model cross=mistral", "is a causal language model (MistralForCausalLM): write llm="),
    ("--model llm=bert", "is no causal language model (BertModel)"),
    ("--model llm=mistral --prompt {query}", "must hold {query} and {passage} once each"),
    ("--model llm=mistral --prompt {query}{passage}{passage}", "found {passage} 2 times"),
    ("--model llm=mistral --prompt @gone.txt", "gone.txt"),
    ("--model llm=mistral --yes xylophone", "the answer 'xylophone' is"),
    ("--model llm=mistral --yes y --max-length 8", "the prompt alone takes"),
    ("--model bert --yes y", "teachers that take --prompt, --yes and --no are llm=PATH"),
    ("--model bert --activation model", "teachers that take --activation are cross=PATH"),
    ("--model cut", "teacher bi=cut cannot be used"),
    ("--model bert --model bi=bert", "names the same teacher twice"),
    ("--model bert --weights 1 2", "--weights must be 1 numbers above 0"),
    ("--model bert --weights 0", "--weights must be 1 numbers above 0"),
    ("--model bert --max-length 0", "--max-length must be at least 1"),
    ("--model bert --shard 0", "--shard must be at least 1"),
    ("--model bert --devices cuda:7", "device 'cuda:7' was asked for"),
    ("--model bert --output d.jsonl --overwrite", "must be different files"),
    ("--model bert --embeddings e.npz", "--embeddings must end in .safetensors"),
    ("--model cross=cross --embeddings e.safetensors", "--embeddings needs a single bi-encoder with mean pooling"),
    ("--model bert --output taken.jsonl", "is not empty"),
    ("--model bert --output a.txt", "--output must end in .jsonl or .jsonl.gz, found a.txt"),
    ("--model bert --output folder.jsonl --overwrite", "--output folder.jsonl is a folder"),
    ("--model bert --embeddings folder.safetensors --overwrite", "--embeddings folder.safetensors is a folder"),
    ("--model bert --output blocked.jsonl", "is in the way and holds no state.json"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, cross, bert, mistral):
    folder = tmp_path_factory.mktemp("models")
    for name, target in (("cross", cross), ("bert", bert), ("mistral", mistral)):
        (folder / name).symlink_to(target)
    save_classifier(folder / "three", labels=3)
    for name in ("empty", "folder.jsonl", "folder.safetensors"):
        (folder / name).mkdir()
    shutil.copytree(bert, folder / "cut")
    (folder / "cut" / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:5000])
    (folder / "taken.jsonl").write_text("precious")
    (folder / "blocked.jsonl.parts").mkdir()
    (folder / "blocked.jsonl.parts" / "mine.txt").write_text("precious")
    write_rows(folder / "d.jsonl", row())
    return folder


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[options for options, _ in BAD_OPTIONS])
def test_bad_options_get_one_line(models, monkeypatch, capsys, options, message):
    monkeypatch.chdir(models)
    arguments = [*options.split(), "--data", "d.jsonl"]
    if "--output" not in arguments:
        arguments += ["--output", "a.jsonl"]
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert error.startswith("train/score.py: ")
    assert error.count("\n") == 1
    after = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    assert after == before
    assert not (models / "a.jsonl.parts").exists()
