"""Text -> the words that lexical systems index: lower-cased, without stopwords, stemmed; one analysis for all of them.

BM25, TF-IDF and DeepCT share it, so that their rows of a table differ by their weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lens.files import require

TOKEN_PATTERN = r"(?u)[^\W_]+"
"""Runs of letters and digits; an underscore separates, so that `read_csv` is two words."""


class Word(NamedTuple):
    """A word of a text that is indexed: where it stands (characters), in lower case, and its term (the stem)."""

    start: int
    end: int
    lower: str
    term: str


class Words:
    """Splits texts by TOKEN_PATTERN as bm25s does. `stopwords` names a list of bm25s, `stemmer` a Snowball stemmer of
    PyStemmer; "none" leaves the step out. Raises ValueError for a name they do not know, ImportError without them."""

    def __init__(self, stopwords: str = "english", stemmer: str = "english") -> None:
        require("bm25", "bm25s", "Stemmer")
        import Stemmer

        if stemmer not in ("none", *Stemmer.algorithms()):
            raise ValueError(f"unknown stemmer {stemmer!r}: use none or one of {', '.join(Stemmer.algorithms())}")
        self.options: dict[str, Any] = {
            "token_pattern": TOKEN_PATTERN,
            "stopwords": [] if stopwords == "none" else stopwords,
            "stemmer": None if stemmer == "none" else Stemmer.Stemmer(stemmer),
            "show_progress": False,
        }
        self(["check"])

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The terms of each text in order, repetitions included."""
        import bm25s

        rows = bm25s.tokenize(list(texts), **self.options, return_ids=False)
        return [[term for term in row if term] for row in rows]  # bm25s gives a text without words the token ""

    def located(self, texts: Sequence[str]) -> list[list[Word]]:
        """The same with their places, one list for each text."""
        found = [list(re.finditer(TOKEN_PATTERN, text)) for text in texts]
        distinct = list(dict.fromkeys(match.group().lower() for row in found for match in row))
        terms = {word: row[0] for word, row in zip(distinct, self(distinct), strict=True) if row}
        return [
            [
                Word(match.start(), match.end(), lower, terms[lower])
                for match in row
                if (lower := match.group().lower()) in terms
            ]
            for row in found
        ]
