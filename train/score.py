"""Scores positives and negatives with a teacher: the cosine similarity of a dense bi-encoder.

    python train/score.py --model PATH_OR_ID --data FILE.jsonl --output FILE.jsonl

Example: python train/score.py --model sentence-transformers/all-MiniLM-L6-v2 --data mined.jsonl --output train.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from lens.dense import Dense
from lens.files import atomic_file, check_output, read_jsonl
from lens.program import interruptible
from train.data import text_key
from train.sources import read_examples


@interruptible("train/score.py")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/score.py"
    )
    parser.add_argument("--model", required=True, help="teacher: folder or hub id of a bi-encoder with mean pooling")
    parser.add_argument("--data", required=True, help="examples, .jsonl, in the bge format")
    parser.add_argument("--output", required=True, help="file to write: the examples with pos_scores and neg_scores")
    parser.add_argument("--embeddings", help="also write the teacher's embeddings of all texts, .safetensors")
    parser.add_argument("--max-length", type=int, default=256, help="longest text in tokens (256)")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the first GPU there is, else the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    try:
        check_output(options.output, options.overwrite)
        places = [Path(name).resolve() for name in (options.data, options.output, options.embeddings) if name]
        if len(set(places)) != len(places):
            raise ValueError("--data, --output and --embeddings must be different files")
        if options.embeddings:
            if not options.embeddings.endswith(".safetensors"):
                raise ValueError(f"--embeddings must end in .safetensors, found {options.embeddings}")
            check_output(options.embeddings, options.overwrite)
        examples = read_examples(options.data)
        teacher = Dense(options.model, device=options.device, max_length=options.max_length)
        texts = list(dict.fromkeys(t for item in examples for t in (item.query, *item.pos, *item.neg)))
        encoded = teacher.encode(texts, "teacher")
        vectors = dict(zip(texts, encoded, strict=True))
        if options.embeddings:
            tensors = {
                "embeddings": torch.from_numpy(encoded).half(),
                "keys": torch.tensor([text_key(text) for text in texts]),
            }
            with atomic_file(options.embeddings, options.overwrite) as temporary:
                save_file(tensors, temporary, {"format": "pt", "teacher": options.model})
        with atomic_file(options.output, options.overwrite) as temporary, temporary.open("w", encoding="utf-8") as file:
            for (_, row), item in zip(read_jsonl(options.data), examples, strict=True):
                for name, passages in (("pos_scores", item.pos), ("neg_scores", item.neg)):
                    row[name] = [round(float(vectors[item.query] @ vectors[passage]), 6) for passage in passages]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except (ValueError, OSError, ImportError) as error:
        print(f"train/score.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{len(examples):,} examples scored in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
