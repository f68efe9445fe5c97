"""A model in several processes: the same vectors, errors that name the device, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, encoder_tokenizer, save_bert, save_clusters
from peft import LoraConfig, get_peft_model
from test_pipeline import mixed

import lens
from lens import workers
from lens.packed import forget_limits
from lens.vectors import load_embeddings
from lens.workers import Pool, _put_together, _taken_apart, split

TEXTS = [*mixed(60), "", *SENTENCES]


def build(folder, **options):
    """A small model with weights that no file holds."""
    model = lens.LENS.build(
        save_bert(folder / "bert"), save_clusters(folder / "clusters", len(encoder_tokenizer())), **options
    )
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tmp_path_factory.mktemp("workers"), device="cpu")


@pytest.fixture(scope="module")
def pool(model):
    model.encode(["a text: what was probed here is not to be believed there"])
    with model.start_multi_process_pool(["cpu", "cpu"]) as pool:
        yield pool


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(workers, "_CHUNK_VALUES", 24 * 5)


@pytest.mark.parametrize("output", ["numpy", "torch", "csr"])
def test_vectors_are_those_of_one_process(model, pool, small_chunks, output):
    for options in ({}, {"top_k": 5}, {"dims": [7, 3, 11]}, {"kind": "query", "instruction": "find it"}):
        expected = model.encode(TEXTS, output=output, **options)
        found = model.encode(TEXTS, output=output, pool=pool, **options)
        assert type(found) is type(expected)
        if output == "csr":
            found, expected = found.toarray(), expected.toarray()
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-6)
        assert not np.allclose(expected[0], expected[5])
    assert model.encode([], output=output, pool=pool).shape == (0, 24)
    assert model.encode_documents(["fox"], output=output, pool=pool).shape == (1, 24)


def test_a_workers_error_names_the_device_and_the_pool_goes_on(model, pool, small_chunks):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"on cpu \(process [12]\): the instruction takes") as caught:
            model.encode_queries(TEXTS, instruction="word " * 300, pool=pool)
        assert re.match(r"In the process for cpu \(process [12]\):\nTraceback", caught.value.__notes__[0])
        np.testing.assert_allclose(model.encode(TEXTS, pool=pool), model.encode(TEXTS), atol=1e-6)
    with pytest.raises(TypeError, match=r"texts\[3\] must be a str"):
        model.encode(["a", "b", "c", None], pool=pool)


def test_all_workers_get_chunks(model, pool, small_chunks, monkeypatch):
    sent = []
    inner = Pool._send
    monkeypatch.setattr(Pool, "_send", lambda self, worker, task: (sent.append(worker), inner(self, worker, task)))
    model.encode(TEXTS, pool=pool)
    assert len(sent) == -(-len(TEXTS) // 5)
    assert sorted(sent[:4]) == [0, 0, 1, 1]  # two each at the start


def count_threads(hidden, mask=None, cu_seqlens=None):
    texts = len(hidden) if cu_seqlens is None else len(cu_seqlens) - 1
    return torch.full((texts, 24), float(torch.get_num_threads()))


@pytest.mark.slow
def test_a_worker_that_dies_is_named_and_the_others_end(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_CHUNK_VALUES", 24 * 5)
    model = build(tmp_path, device="cpu")
    model.model.head.forward = count_threads
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        pool = model.start_multi_process_pool(["cpu", "cpu"])
    finally:
        torch.set_num_threads(before)
    processes = list(pool._processes)
    assert (model.encode(TEXTS, pool=pool) == 2).all()  # each takes its share of the cores
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"cpu \(process 2\) died by signal 9: it was killed, as Linux"):
        model.encode(TEXTS, pool=pool)
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(ValueError, match="these processes were ended: start another pool, or load the model again"):
        model.encode(TEXTS, pool=pool)
    pool.close()


@pytest.mark.slow
def test_several_devices_from_load_on_and_an_interruption(tmp_path, monkeypatch):
    build(tmp_path, device="cpu").save(tmp_path / "m", include_backbone=True)
    expected = lens.load(tmp_path / "m", device="cpu")
    with lens.load(tmp_path / "m", device=["cpu", "cpu"], quantization="int8") as model:
        eight = lens.load(tmp_path / "m", device="cpu", quantization="int8")
        np.testing.assert_allclose(model.encode(TEXTS), eight.encode(TEXTS), atol=1e-6)
        assert np.abs(eight.encode(TEXTS) - expected.encode(TEXTS)).max() > 1e-5
        assert [term[:2] for term in model.terms("fox")] == [term[:2] for term in eight.terms("fox")]
        processes = list(model.pool._processes)

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(workers, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.encode(TEXTS)
        assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
def test_ctrl_c_while_processes_start(tmp_path):
    program = """
import sys
import threading
from pathlib import Path

from test_workers import build

if __name__ == "__main__":
    model = build(Path(sys.argv[1]), device="cpu")
    threading.Timer(0.5, lambda: print("starting", flush=True)).start()
    model.start_multi_process_pool(["cpu", "cpu"])
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        preexec_fn=hearing,
    )  # fmt: skip
    try:
        assert "starting\n" in iter(running.stdout.readline, "")
        os.killpg(running.pid, signal.SIGINT)
        errors = running.communicate(timeout=60)[1]
        assert running.returncode == -signal.SIGINT
        assert errors.count("Traceback") == 1, errors  # the parent's own
        assert ends(running.pid)
    finally:
        running.kill()


def hearing():
    """Lets a child hear Ctrl-C even where the tests run in a shell's background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ends(group):
    """Whether within seconds no process of a group is left."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_leaves_no_process(tmp_path):
    build(tmp_path, device="cpu").save(tmp_path / "m", include_backbone=True)
    (tmp_path / "few.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "many.txt").write_text("\n".join(f"{i} {text}" for i in range(20_000) for text in SENTENCES))
    command = [sys.executable, "-m", "lens.cli", "encode", "--model", str(tmp_path / "m"), "--overwrite"]
    command += ["--output", str(tmp_path / "e.npz"), "--devices", "cpu", "cpu", "--top-k", "5"]
    done = subprocess.run([*command, "--", str(tmp_path / "few.txt")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected = lens.load(tmp_path / "m", device="cpu").encode(SENTENCES, top_k=5)
    np.testing.assert_allclose(load_embeddings(tmp_path / "e.npz")[0].toarray(), expected, atol=1e-6)
    running = subprocess.Popen(
        [*command, "--", str(tmp_path / "many.txt")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
        preexec_fn=hearing,
    )  # fmt: skip
    try:
        seen = b""
        while b"text/s" not in seen:  # the bar: workers are encoding
            part = os.read(running.stderr.fileno(), 4096)
            assert part, seen
            seen += part
        os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it
        output = running.communicate(timeout=60)[1].decode()
        assert running.returncode == 130
        assert "lens: interrupted" in output
        assert "Traceback" not in output
        assert ends(running.pid)
    finally:
        running.kill()


def test_what_cannot_be_started_is_said(model, monkeypatch):
    with pytest.raises(ValueError, match="no device is named"):
        model.start_multi_process_pool([])
    with pytest.raises(ValueError, match="no device is named"):
        lens.load("nowhere", device=[])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees none"):
            model.start_multi_process_pool(["cpu", "cuda:1"])
    monkeypatch.setattr(workers, "is_quantized", lambda _: True)
    with pytest.raises(ValueError, match="in 4 or 8 bits works on one device only"):
        model.start_multi_process_pool(["cpu"])


@pytest.mark.slow
def test_a_worker_that_cannot_take_the_model_says_why(tmp_path):
    model = build(tmp_path, device="cpu", attn_implementation="eager")
    model.packed = True
    with pytest.raises(ValueError, match="on cpu: packed=True contradicts the backbone BertModel"):
        model.start_multi_process_pool(["cpu"]).close()


def test_chunks_by_hand():
    texts = ["x" * letters for letters in (0, 40, 400, 4, 80, 4000)]  # 2, 12, 102, 3, 22, 102 tokens, about
    assert split(texts, 24, limit=100, budget=1, workers=1) == [[2], [5], [4, 1], [3, 0]]
    assert split(texts, 24, limit=100, budget=60, workers=1) == [[2, 5], [4, 1, 3, 0]]
    assert split(texts, 1 << 23, limit=100, budget=10**6, workers=1) == [[2, 5], [4, 1], [3, 0]]
    assert split(texts, 1 << 30, limit=100, budget=10**6, workers=1) == [[2], [5], [4], [1], [3], [0]]
    assert split([], 24, 100, 1, 2) == []


def test_tensors_survive_shared_memory_and_stay_tied():
    tied = torch.nn.Parameter(torch.randn(3, 5, dtype=torch.bfloat16), requires_grad=False)
    parts = {
        "tied": [tied, tied],
        "transposed": torch.arange(6).view(2, 3).t(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False, True]),
        "text": "kept",
    }
    skeleton, shared = _taken_apart(parts)
    found = _put_together(skeleton, shared)
    assert found["tied"][0] is found["tied"][1]
    assert isinstance(found["tied"][0], torch.nn.Parameter)
    assert not found["tied"][0].requires_grad
    for name in ("transposed", "scalar", "empty", "bool"):
        assert found[name].dtype == parts[name].dtype
        assert torch.equal(found[name], parts[name])
    assert torch.equal(found["tied"][0], tied)
    assert found["text"] == "kept"
    assert len(skeleton) < 2000
    found["bool"].fill_(False)  # the same memory, seen by all who put it together
    assert not _put_together(skeleton, shared)["bool"].any()


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 4, "trainable_token_indices": {"embed_tokens": [5, 6]}}])
def test_adapters_go_along(options, mistral, mistral_clusters):
    model = lens.LENS.build(mistral, mistral_clusters, device="cpu")
    plain = model.encode(SENTENCES)
    model.model.backbone = get_peft_model(model.model.backbone, LoraConfig(target_modules=["q_proj"], **options)).eval()
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(std=0.3)
    expected = model.encode(SENTENCES)
    assert np.abs(expected - plain).max() > 1e-3
    copy, tokenizer = _put_together(*_taken_apart((model.model, model.tokenizer)))
    forget_limits(copy.backbone)
    np.testing.assert_array_equal(lens.LENS(copy, tokenizer, "cpu").encode(SENTENCES), expected)


@pytest.mark.gpu
def test_on_gpus(tmp_path):
    expected = build(tmp_path, device="cpu")
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    with expected.start_multi_process_pool(devices) as pool:
        np.testing.assert_allclose(expected.encode(TEXTS, pool=pool), expected.encode(TEXTS), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_program_that_cannot_start_processes_ends_and_says_why(way, tmp_path):
    program = """
import sys
from pathlib import Path

from test_workers import build

model = build(Path(sys.argv[1]), device="cpu")
model.model.note = "x" * 500_000  # as a large tokenizer: more than a pipe holds
model.start_multi_process_pool(["cpu", "cpu"])
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(tmp_path / "program.py") if way == "file" else "-", str(tmp_path)]
    done = subprocess.run(
        command, input=program if way == "stdin" else None, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    assert "__main__" in done.stderr.strip().splitlines()[-1]


def test_a_pool_is_for_its_own_model(tmp_path):
    (tmp_path / "other").mkdir()
    model, other = build(tmp_path, device="cpu"), build(tmp_path / "other", device="cpu")
    with model.start_multi_process_pool(["cpu"]) as pool:
        with pytest.raises(ValueError, match="started with another model"):
            other.encode(SENTENCES, pool=pool)
        with pytest.raises(TypeError, match="found str"):
            model.encode(SENTENCES, pool="cpu")
        assert np.array_equal(model.encode(SENTENCES, pool=pool), model.encode(SENTENCES))


def test_one_device_without_a_list_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"devices must be a list, found 'cpu': write \['cpu'\]"):
        build(tmp_path, device="cpu").start_multi_process_pool("cpu")


def test_several_devices_and_bits_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="quantization='4bit' works on one device only"):
        lens.load("nowhere", device=["cpu", "cpu"], quantization="4bit")
