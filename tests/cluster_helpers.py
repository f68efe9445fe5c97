"""What the tests of clustering share: point sets, tiny models, and tokens that a page must escape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden" / "official-tiny"
TINY = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
NASTY = [
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "&amp;",
    "\u2028",
    '"',
    "\\",
    "\n",
    "\x00",
    "<img src=x onerror=alert(2)>",
]


def blobs(seed: int = 0, k: int = 6, each: int = 30, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(k), each)
    return (20 * np.eye(width)[truth] + generator.normal(size=(k * each, width))).astype(np.float32), truth


def noise(seed: int = 0, rows: int = 700, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


def save(name: str, config: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder, **options)
    return model
