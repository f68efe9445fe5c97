"""Figures of docs/compat.md: what `compat="official"` changes against the default, on a tiny released checkpoint.

    python benchmarks/compat.py [--golden DIR]

DIR holds a checkpoint in the released hub layout (`hub/`), `texts.json` and the released code's own embeddings
(`embeddings.npz`); without it a random tiny Mistral in that layout is made. Both ways of embedding are compared at
several length limits, on texts that fit and on texts that do not; writes benchmarks/results/compat.json and, from it,
the measured part of docs/compat.md. `--page` writes the page only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers
from scipy.stats import kendalltau

import lens
from benchmarks import arguments
from lens.files import atomic_file, read_json, write_json
from lens.text import SPECIAL_TOKENS, TextProcessor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compat.json"
PAGE = ROOT / "docs" / "compat.md"
GOLDEN = ROOT.parent / "shared" / "golden" / "official-tiny"
LIMITS = (64, 128, 256, 512)
BEGIN, END = "<!-- from benchmarks/results/compat.json -->\n", "<!-- end -->\n"


def tiny(folder: Path) -> dict[str, Any]:
    """A random tiny Mistral in the released hub layout in `folder`, and texts."""
    sys.path.insert(1, str(ROOT / "tests"))
    from conftest import SENTENCES, save_mistral

    save_mistral(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(torch.nn.Linear(32, 200, bias=False), folder / "lm_head.pth")
    rng = np.random.default_rng(0)
    long = [" ".join(rng.choice(SENTENCES, size)) for size in (3, 5, 9, 17, 30) for _ in range(4)]
    return {"documents": [*SENTENCES, *long], "queries": SENTENCES, "instructions": ["Find the sentence."]}


def limited(model: lens.LENS, limit: int) -> lens.LENS:
    """The model with `limit` tokens for both kinds of text."""
    model.config = model.config.replace(query_max_length=limit, document_max_length=limit)
    model.text = TextProcessor(model.tokenizer, model.config)
    return model


def differences(first: Any, second: Any) -> dict[str, float]:
    """How far rows (N, K) of unit length are apart: per value, and as cosines of rows."""
    gap, cosine = np.abs(first - second), (first * second).sum(1)
    filled = first[np.linalg.norm(first, axis=1) > 0]
    shown = cosine[np.linalg.norm(first, axis=1) > 0]
    others = filled @ filled.T
    return {
        "texts": len(first),
        "mean_difference": float(gap.mean()),
        "max_difference": float(gap.max()),
        "mean_cosine": float(shown.mean()),
        "min_cosine": float(shown.min()),
        "mean_cosine_of_two_texts": float(others[~np.eye(len(others), dtype=bool)].mean()),
    }


def rankings(queries: list[Any], documents: list[Any]) -> dict[str, float]:
    """How alike the two ways rank documents: same first document, shared among the first five, Kendall's tau."""
    first, second = (q @ d.T for q, d in zip(queries, documents, strict=True))
    orders = [np.argsort(-scores, axis=1, kind="stable") for scores in (first, second)]
    same = [len(set(a[:5]) & set(b[:5])) / 5 for a, b in zip(*orders, strict=True)]
    return {
        "documents": first.shape[1],
        "same_first": float((orders[0][:, 0] == orders[1][:, 0]).mean()),
        "shared_of_five": float(np.mean(same)),
        "kendall_tau": float(np.mean([kendalltau(a, b).statistic for a, b in zip(first, second, strict=True)])),
    }


def collect(golden: Path | None) -> dict[str, Any]:
    """All figures, on the checkpoint in `golden`, or on one made here."""
    with tempfile.TemporaryDirectory() as made:
        texts = read_json(golden / "texts.json") if golden else tiny(Path(made))
        hub = golden / "hub" if golden else Path(made)
        models = [lens.load(hub, device="cpu", compat=compat) for compat in ("official", None)]
        content: dict[str, Any] = {
            "checkpoint": "official-tiny, written by the released code" if golden else "a random tiny Mistral",
            "limits": {},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        joined = [f"{a} {b}" for a, b in zip(texts["documents"], texts["documents"][1:], strict=False)]
        instruction = texts["instructions"][0]
        every = list(dict.fromkeys([*texts["documents"], *joined]))
        lengths = np.array([len(item.ids) for item in limited(models[1], 1 << 20).text(every)])
        for limit in LIMITS:
            tokens = limited(models[1], 1 << 20).text(texts["queries"], "query", instruction)
            short = [q for q, item in zip(texts["queries"], tokens, strict=True) if len(item.ids) <= limit]
            both = [limited(model, limit) for model in models]
            queries = [model.encode_queries(short, instruction=instruction) for model in both]
            entry: dict[str, Any] = {}
            for name, chosen in (("fit", lengths <= limit), ("too_long", lengths > limit)):
                group = [text for text, taken in zip(every, chosen, strict=True) if taken]
                documents = [model.encode_documents(group) for model in both]
                entry[name] = {**differences(*documents), "ranking": rankings(queries, documents)}
            content["limits"][str(limit)] = entry
        if golden:
            released = np.load(golden / "embeddings.npz")["documents"]
            found = limited(models[0], texts["max_length"]).encode_documents(texts["documents"])
            content["released_code"] = {"texts": len(found), "max_difference": float(np.abs(found - released).max())}
    return content


def section(content: dict[str, Any]) -> str:
    """The measured part of docs/compat.md."""
    lines = [
        f"Documents embedded both ways on {content['checkpoint']} (random weights, so only the order of magnitude "
        "means anything, and any two documents are alike); differences are per value of embeddings of unit length, "
        "rankings are of the same queries, all within the limit, over these documents. Written by "
        "`benchmarks/compat.py`; do not edit.",
        "",
        "| limit, tokens | documents | mean difference | largest | mean cosine | least | of two documents | "
        "same first document | shared of first five | Kendall's tau |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for limit, entry in content["limits"].items():
        for name, label in (("fit", "fit"), ("too_long", "too long")):
            row, ranks = entry[name], entry[name]["ranking"]
            others = row["mean_cosine_of_two_texts"]
            lines.append(
                f"| {limit} | {row['texts']} {label} | {row['mean_difference']:.1e} | {row['max_difference']:.1e} | "
                f"{row['mean_cosine']:.4f} | {row['min_cosine']:.4f} | {others:.3f} | {ranks['same_first']:.0%} | "
                f"{ranks['shared_of_five']:.0%} | {ranks['kendall_tau']:.3f} |"
            )
    if "released_code" in content:
        row = content["released_code"]
        lines += [
            "",
            f'Against the released code\'s own embeddings, which were made with left padding, `compat="official"` is '
            f"off by {row['max_difference']:.1e} at most ({row['texts']} documents).",
        ]
    return "\n".join(lines) + "\n"


def page(text: str, content: dict[str, Any]) -> str:
    """docs/compat.md with its measured part made anew; raises ValueError where the marks of that part are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE} lacks the lines {BEGIN.strip()} and {END.strip()}")
    return text.partition(BEGIN)[0] + BEGIN + "\n" + section(content) + "\n" + END + text.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, help="folder with hub/, texts.json and embeddings.npz")
    parser.add_argument("--page", action="store_true", help="write docs/compat.md from the stored figures, no more")
    options = parser.parse_args()
    arguments.check(parser, options, RESULTS)
    if not options.page:
        golden = options.golden or (GOLDEN if GOLDEN.is_dir() else None)
        write_json(RESULTS, collect(golden))
    text = page(PAGE.read_text(encoding="utf-8"), read_json(RESULTS))
    with atomic_file(PAGE, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
