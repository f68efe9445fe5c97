"""The one head tensor: which it is, and that no other is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cluster_helpers import ROOT, TINY, save
from safetensors.torch import load_file, save_file

from clustering import weights

ENCODERS = {
    "BertForMaskedLM": transformers.BertConfig(**TINY),
    "RobertaForMaskedLM": transformers.RobertaConfig(**TINY, pad_token_id=1),
    "DistilBertForMaskedLM": transformers.DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=20),
    "ModernBertForMaskedLM": transformers.ModernBertConfig(
        **TINY, pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("tied", [True, False])
def test_heads_of_masked_language_models(name: str, tied: bool, tmp_path: Path) -> None:
    config = ENCODERS[name].__class__(**ENCODERS[name].to_dict() | {"tie_word_embeddings": tied})
    model = save(name, config, tmp_path)
    head = weights.read_head(weights.Source(tmp_path))
    expected = model.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(head.weight, expected)
    assert head.kind == ("tied embeddings" if tied else "output head")
    if not tied:
        assert not np.array_equal(expected, model.get_input_embeddings().weight.detach().numpy())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["4KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_decoders(tied: bool, shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = transformers.MistralConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / weights.INDEX).exists() == (shard == "4KB")
    head = weights.read_head(weights.Source(tmp_path))
    np.testing.assert_array_equal(head.weight, model.get_output_embeddings().weight.detach().float().numpy())
    assert head.weight.dtype == np.float32
    for file in tmp_path.glob("model-*.safetensors"):  # the other shards are not even opened
        if file.name != head.file:
            file.write_bytes(b"")
    np.testing.assert_array_equal(weights.read_head(weights.Source(tmp_path)).weight, head.weight)


def test_plain_encoders_give_their_word_embeddings(tmp_path: Path) -> None:
    model = save("BertModel", transformers.BertConfig(**TINY), tmp_path)
    head = weights.read_head(weights.Source(tmp_path))
    assert (head.kind, head.tensor) == ("word embeddings", "embeddings.word_embeddings.weight")
    np.testing.assert_array_equal(head.weight, model.get_input_embeddings().weight.detach().numpy())
    named = weights.read_head(weights.Source(tmp_path), "embeddings.position_embeddings.weight")
    np.testing.assert_array_equal(named.weight, model.embeddings.position_embeddings.weight.detach().numpy())


def fake_checkpoint(folder: Path, rows: int = 32_000, width: int = 4096, filler: int = 3 * 2**30) -> None:
    """A sharded checkpoint of sparse files: a bf16 head in the middle of one shard, gigabytes of filler around it."""
    head, size = "lm_head.weight", rows * width * 2
    spans = {"a": (0, filler), head: (filler, filler + size), "z": (filler + size, 2 * filler + size)}
    layout = {
        name: {"dtype": "BF16", "shape": [rows, width] if name == head else [filler // 2], "data_offsets": span}
        for name, span in spans.items()
    }
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model-00002-of-00002.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * filler + size)
    files = dict.fromkeys(spans, "model-00002-of-00002.safetensors") | {"b": "model-00001-of-00002.safetensors"}
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"], "vocab_size": rows}))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_7b_head_is_read_in_under_a_gigabyte(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path)
    script = (  # getrusage would count the peak of the process that started this one, too
        "import sys; from clustering.weights import Source, read_head; head = read_head(Source(sys.argv[1]));"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(head.weight.shape, peak.split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shape, peak = done.stdout.rsplit(" ", 1)
    assert shape == "(32000, 4096)"
    assert int(peak) < 2**20  # KiB, the interpreter and torch included


def served(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Serves a folder as the hub's cache would; returns the list of files that were asked for and found."""
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        assert repo == "org/tiny"
        assert revision in (None, "main", "0123abcd")
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        asked.append(name)
        return str(folder / name)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    return asked


def test_the_hub_is_asked_for_one_shard_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "models--org--tiny" / "snapshots" / "0123abcd"
    config = transformers.MistralConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=False)
    model = save("MistralForCausalLM", config, folder, max_shard_size="4KB")
    asked = served(monkeypatch, folder)
    head = weights.read_head(weights.Source("org/tiny", "main"))
    np.testing.assert_array_equal(head.weight, model.lm_head.weight.detach().numpy())
    assert head.revision == "0123abcd"
    assert asked == ["config.json", weights.INDEX, head.file]
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def test_an_unreachable_hub_is_said_to_be_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"org/none-such has no config.json.*hub was not reached"):
        weights.read_head(weights.Source("org/none-such"))


def spoil(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config not JSON":
        (folder / "config.json").write_text("{")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "foreign":
        file.write_text("this is no safetensors file")
    elif how == "no weights":
        file.unlink()
    elif how == "pickle only":
        file.rename(folder / "pytorch_model.bin")
    elif how in ("NaN", "infinite"):
        tensors["lm_head.weight"][7, 3] = float("nan") if how == "NaN" else -float("inf")
        save_file(tensors, file)
    elif how == "quantised":
        tensors["lm_head.weight"] = torch.zeros(60, 16, dtype=torch.int8)
        save_file(tensors, file)
    elif how == "clustered head":
        tensors["lm_head.weight"] = torch.zeros(10, 16)
        save_file(tensors, file)
    elif how == "vector":
        tensors["lm_head.weight"] = torch.zeros(60)
        save_file(tensors, file)
    elif how == "headless":
        del tensors["lm_head.weight"]
        save_file(tensors, file)
    elif how == "two heads":
        tensors["other.lm_head.weight"] = torch.zeros(60, 16)
        tensors["one.lm_head.weight"] = tensors.pop("lm_head.weight")
        save_file(tensors, file)
    elif how == "nothing known":
        save_file({"a.b": torch.zeros(2, 2)}, file)
        (folder / "config.json").write_text("{}")
    else:
        names = {
            "lm_head.weight": {"missing shard": "gone.safetensors", "outside": "../x.safetensors"}.get(how, file.name)
        }
        index = {"empty index": {}, "wrong index": {"weight_map": {"cls.predictions.decoder.weight": file.name}}}
        (folder / weights.INDEX).write_text(json.dumps(index.get(how, {"weight_map": names})))


BAD_CHECKPOINTS = [
    ("no config", FileNotFoundError, r"has no config.json"),
    ("config not JSON", ValueError, r"config.json is not valid JSON"),
    ("truncated", ValueError, r"model.safetensors is not a whole safetensors file \(\d+ bytes"),
    ("foreign", ValueError, r"model.safetensors is not a whole safetensors file"),
    ("no weights", FileNotFoundError, r"has no model.safetensors"),
    ("pickle only", ValueError, r"only pytorch_model.bin, a pickle.*save_pretrained"),
    ("NaN", ValueError, r"lm_head.weight holds NaN or infinite weights \(first in row 7"),
    ("infinite", ValueError, r"lm_head.weight holds NaN or infinite weights \(first in row 7"),
    ("quantised", ValueError, r"stored as I8, a quantised form.*F32"),
    ("clustered head", ValueError, r"lm_head.weight has 10 rows, config.json says vocab_size 60.*--tensor"),
    ("vector", ValueError, r"lm_head.weight should be a matrix \(V, D\), found shape \(60,\)"),
    ("headless", ValueError, r"tie_word_embeddings false, but no output head"),
    ("two heads", ValueError, r"one.lm_head.weight and other.lm_head.weight could each be the head.*--tensor"),
    ("nothing known", ValueError, r"no output head and no word embeddings among 1 tensors \(a.b\).*--tensor"),
    ("missing shard", FileNotFoundError, r"has no gone.safetensors"),
    ("outside", ValueError, r"leaves the folder"),
    ("empty index", ValueError, r"index.json: expected an object `weight_map`"),
    ("wrong index", ValueError, r"says it holds cls.predictions.decoder.weight, but it does not"),
]


@pytest.mark.parametrize(("how", "error", "message"), BAD_CHECKPOINTS, ids=[case[0] for case in BAD_CHECKPOINTS])
def test_bad_checkpoints_are_named(how: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    config = transformers.MistralConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=False)
    save("MistralForCausalLM", config, tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    spoil(tmp_path, how)
    with pytest.raises(error, match=message):
        weights.read_head(weights.Source(tmp_path))
