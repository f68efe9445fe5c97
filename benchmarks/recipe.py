"""What each part of lens-mini's recipe gives: variants trained on the quick start's data, asked its development part.

    python benchmarks/recipe.py --quickstart runs/quickstart

Trains the recipe and variants that differ in one field each, with the quick start's clusters, examples and teacher,
and evaluates all of them together; writes benchmarks/results/recipe.json. benchmarks/retrieval.py --page puts it into
docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recipe.json"
RECIPE = "train/recipes/lens-mini.yaml"
VARIANTS: dict[str, dict[str, str]] = {
    "lens-mini": {},
    "another seed": {"seed": "7"},
    "backbone frozen": {"backbone": "frozen", "learning_rate": "0.01"},  # the rate of what is left, the gates
    "centroids not whitened": {"whiten": "false"},
    "no share of the mean": {"transform": "none"},
    "temperature 0.05": {"temperature": "0.05"},
    "no distillation": {"kd_weight": "0"},
}


def train(quickstart: Path, output: Path, changes: dict[str, str]) -> float:
    """Trains one variant into `output`; returns the seconds of its training steps."""
    base = read_json(quickstart / "model" / "recipe.json")["base"]
    fields = {
        "base": base,
        "clusters": str(quickstart / "clusters"),
        "data": str(quickstart / "train" / "examples.jsonl"),
        "teacher_embeddings": str(quickstart / "train" / "teacher.safetensors"),
        "output": str(output),
        "report_to": "[]",
        **changes,
    }
    overrides = [part for name, value in fields.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, "train/run.py", RECIPE, *overrides], cwd=ROOT, check=True)
    rows = (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    seconds: float = json.loads(rows[-1])["seconds"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True, help="finished output folder of quickstart.sh")
    quickstart = parser.parse_args().quickstart.resolve()
    if not (quickstart / "report.json").is_file():
        parser.error(f"{quickstart} holds no finished quick start: run scripts/quickstart.sh")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = {variant: train(quickstart, folder / variant, changes) for variant, changes in VARIANTS.items()}
        models = [f"{variant}={folder / variant}" for variant in VARIANTS]
        evaluation = [
            *("eval/run.py", "--model", *models, "--beir", str(quickstart / "data" / "heldout"), "--split", "dev"),
            *("--baselines", "bm25", "dense", "--fuse", "--output", str(folder / "eval")),
        ]
        subprocess.run([sys.executable, *evaluation], cwd=ROOT, check=True)
        results = read_json(folder / "eval" / "results.json")
    content: dict[str, Any] = {
        "variants": VARIANTS,
        "seconds": seconds,
        "heldout": results["datasets"]["heldout"],
        "machine": results["machine"],
        "versions": results["versions"],
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
