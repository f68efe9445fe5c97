"""Answers questions from the corpus of a BEIR folder and shows why each hit matched: which clusters, how much.

    python scripts/quickstart_answers.py --model runs/quickstart/model --beir runs/quickstart/data/heldout \\
        --output answers.json "how do I copy a whole directory tree?"

Without questions, three queries of qrels/test.tsv are asked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import lens
from lens.corpus import read_beir, read_texts
from lens.files import write_json
from lens.search import search

HITS = 3
CLUSTERS = 8
TOKENS = 6


def answer(model: Any, questions: list[str], corpus: dict[str, str], relevant: list[set[str]]) -> list[dict[str, Any]]:
    """For every question its best documents, each with the clusters that it shares with the question.

    `relevant` holds the ids of the documents judged relevant to each question, empty where nobody judged.
    """
    ids, texts = list(corpus), list(corpus.values())
    indices, _ = search(model.encode_queries(questions), model.encode_documents(texts), k=HITS)
    answers = []
    for question, known, row in zip(questions, relevant, indices, strict=True):
        hits = []
        for index in row:
            explanation = model.explain(question, texts[index], k=CLUSTERS)
            hits.append(
                {
                    "id": ids[index],
                    "text": texts[index],
                    "score": explanation.score,
                    "relevant": ids[index] in known if known else None,
                    "matches": [
                        {"cluster": match.cluster, "tokens": match.tokens[:TOKENS], "share": match.share}
                        for match in explanation.matches
                    ],
                    "other_clusters": explanation.rest_count,
                }
            )
        answers.append({"question": question, "hits": hits})
    return answers


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns 0, or 2 after one line on standard error."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    parser.add_argument("--model", required=True, help="folder of a trained LENS model")
    parser.add_argument("--beir", type=Path, required=True, help="BEIR folder whose corpus is searched")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        questions, relevant = options.questions, [set[str]() for _ in options.questions]
        if questions:
            corpus = dict(zip(*read_texts(options.beir), strict=True))
        else:
            beir = read_beir(options.beir, "test")
            corpus, names = beir.corpus, list(beir.qrels)
            chosen = names[:: max(1, len(names) // 3)][:3]
            questions = [beir.queries[name] for name in chosen]
            relevant = [{document for document, score in beir.qrels[name].items() if score > 0} for name in chosen]
        write_json(options.output, {"answers": answer(lens.load(options.model), questions, corpus, relevant)})
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
