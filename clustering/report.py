"""What the clusters hold: tokens made readable, variants of one word counted, and a page to browse it all.

Legend: V rows of the head (vocabulary entries), D hidden size, K clusters.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import unicodedata
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = Path(__file__).with_name("page.html")
PLACEHOLDER = re.compile(r"[\[<](unused|reserved|extra_id|pad)[_\s-]?\w*[\]>]|<\|reserved\w*\|>", re.IGNORECASE)
KINDS = ("words", "word pieces", "other scripts", "numbers and symbols", "special and unused")
NEIGHBOURS = 6
PERMUTATIONS = 5


def check_libraries() -> None:
    """Raises ImportError naming the pip command where a library of the report is missing."""
    for module, package in (("sklearn", "scikit-learn"), ("Stemmer", "PyStemmer")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"the report needs {package}: run `pip install {package}`") from error


def read_tokens(folder: Path | None, rows: int) -> tuple[list[str | None], list[str]]:
    """The text and the role of every row: (V,) names and (V,) of "token", "special", "unused" or "unnamed".

    A leading space stands for whatever the tokenizer marks a word's start with; WordPiece's "##" stays as it is.
    Rows without a token, or all of them where there is no tokenizer folder, have the name None.
    Raises ValueError for tokenizer files that cannot be read.
    """
    vocabulary: dict[str, int] = {}
    special: set[int] = set()
    byte_level = False
    if folder is not None:
        try:
            if (folder / "tokenizer.json").is_file():
                from tokenizers import Tokenizer

                tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
                vocabulary = tokenizer.get_vocab(with_added_tokens=True)
                special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
            else:
                from transformers import AutoTokenizer

                slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
                vocabulary, special = slow.get_vocab(), set(slow.all_special_ids)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"the tokenizer in {folder} cannot be read: {error}; save the tokenizer again") from error
        byte_level = any(token.startswith("Ġ") for token in vocabulary)
    names: list[str | None] = [None] * rows
    roles = ["unnamed"] * rows
    for token, index in vocabulary.items():
        if index < rows:
            names[index] = readable(token, byte_level and index not in special)
            placeholder = PLACEHOLDER.fullmatch(token) is not None
            roles[index] = "unused" if placeholder else "special" if index in special else "token"
    return names, roles


def readable(token: str, byte_level: bool) -> str:
    """A token's text: bytes decoded where they are whole characters, the mark of a word's start as a space."""
    if byte_level:
        from tokenizers.decoders import ByteLevel

        text = ByteLevel().decode([token])
        return token if "\ufffd" in text else text
    return token.replace("▁", " ")


def normal_forms(names: list[str | None]) -> list[str | None]:
    """The word that each token is a variant of: marks stripped, case folded, Snowball's English stem.

    None for tokens that are not letters throughout, or a single letter: those are variants of nothing.
    """
    import Stemmer

    words = [unicodedata.normalize("NFKC", (name or "").removeprefix("##").strip()).casefold() for name in names]
    stems = Stemmer.Stemmer("english").stemWords(words)
    return [stem if word.isalpha() and len(word) > 1 else None for word, stem in zip(words, stems, strict=True)]


def variants(names: list[str | None], labels: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How far clusters unite the variants of a word (case, leading space or "##", inflection); labels (V,).

    `clusters_uniting_variants` is the share of clusters of two or more tokens in which two tokens have one normal
    form; `families_in_one_cluster` is the share of families (two or more tokens of one normal form) that lie in one
    cluster whole. Beside each is what labels of the same sizes, dealt out at random, give.
    """
    numbers: dict[str, int] = {}
    forms = np.array([-1 if form is None else numbers.setdefault(form, len(numbers)) for form in normal_forms(names)])
    kept = labels >= 0
    forms, labels = forms[kept], labels[kept]
    generator = np.random.default_rng(seed)
    chance = [_shares(forms, generator.permutation(labels)) for _ in range(PERMUTATIONS)]
    clusters, families = _shares(forms, labels)
    return {
        "clusters_of_two_or_more": int((np.bincount(labels) > 1).sum()),
        "clusters_uniting_variants": round(clusters, 4),
        "clusters_uniting_variants_by_chance": round(statistics.mean(share for share, _ in chance), 4),
        "families": int((np.bincount(forms[forms >= 0], minlength=1) > 1).sum()),
        "families_in_one_cluster": round(families, 4),
        "families_in_one_cluster_by_chance": round(statistics.mean(share for _, share in chance), 4),
    }


def _shares(forms: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Both shares of `variants`; forms (V,) with -1 for none, labels (V,)."""
    worded = forms >= 0
    pairs, counts = np.unique(np.stack([forms[worded], labels[worded]]), axis=1, return_counts=True)
    uniting = len(np.unique(pairs[1, counts > 1]))
    several = int((np.bincount(labels) > 1).sum())
    members = np.bincount(forms[worded], minlength=1)
    places = np.bincount(pairs[0], minlength=len(members))
    families = members > 1
    whole = int((places[families] == 1).sum())
    return uniting / max(several, 1), whole / max(int(families.sum()), 1)


def page(
    facts: dict[str, Any],
    names: list[str | None],
    roles: list[str],
    labels: np.ndarray,
    centroids: np.ndarray,
    distance: np.ndarray,
    method: str = "tsne",
) -> str:
    """The page that browses the clusters: one HTML text that needs nothing else.

    names and roles (V,), labels (V,), centroids (K, D), distance (V,) of each row to its centroid: it orders the
    tokens of a cluster; `method` of the map: "tsne" or "pca". Tokens travel as JSON and are only ever shown as text,
    so that no token can act as markup.
    """
    k = len(centroids)
    kinds = [_kind(name, role) for name, role in zip(names, roles, strict=True)]
    members: list[list[int]] = [[] for _ in range(k)]
    for row in np.argsort(distance, kind="stable"):
        if labels[row] >= 0:
            members[labels[row]].append(int(row))
    spread = [float(np.sqrt(np.mean(np.square(distance[rows])))) if rows else 0.0 for rows in members]
    data = {
        "tokens": names,
        "members": members,
        "kinds": [_most([kinds[row] for row in rows]) for rows in members],
        "kind_names": KINDS,
        "spread": [round(value, 3) for value in spread],
        "near": neighbours(centroids).tolist(),
        "map": layout(centroids, method).tolist(),
        "excluded": np.flatnonzero(labels < 0).tolist(),
        "facts": {key: value for key, value in facts.items() if key not in ("sizes", "configuration")},
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    text = text.encode("utf-8", "backslashreplace").decode()
    template = TEMPLATE.read_text(encoding="utf-8")
    title = escape(f"{k:,} token clusters of {Path(str(facts['base_model'])).name}")
    return template.replace("{{title}}", title).replace("{{data}}", text)


def _kind(name: str | None, role: str) -> int:
    """Index into KINDS."""
    if name is None or role != "token":
        return 4
    text = name.removeprefix("##").strip()
    letters = [character for character in text if character.isalpha()]
    if len(letters) * 2 <= len(text) or name.startswith("<0x"):
        return 3
    if any(ord(character) > 0x24F for character in letters):
        return 2
    return 1 if name.startswith("##") else 0


def _most(kinds: list[int]) -> int:
    return max(sorted(set(kinds)), key=kinds.count, default=4)


def neighbours(centroids: np.ndarray) -> np.ndarray:
    """The nearest other clusters by cosine about the mean, nearest first; (K, D) -> (K, NEIGHBOURS or fewer)."""
    from sklearn.neighbors import NearestNeighbors

    count = min(NEIGHBOURS, len(centroids) - 1)
    model = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute")
    return model.fit(centroids - centroids.mean(axis=0)).kneighbors(return_distance=False)


def layout(centroids: np.ndarray, method: str = "tsne") -> np.ndarray:
    """A map in whole numbers from 0 to 1000; (K, D) -> (K, 2): t-SNE of the leading 50 components, or two of them."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    k, width = centroids.shape
    flat = PCA(min(50, k, width), random_state=0).fit_transform(centroids)
    if method == "tsne" and 10 <= k <= 20_000:
        unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
        model = TSNE(2, max_iter=500, init="pca", perplexity=min(20, k // 4), random_state=0, n_jobs=-1)
        flat = model.fit_transform(unit)
    flat = np.pad(flat, [(0, 0), (0, 2)])[:, :2]
    low, high = flat.min(axis=0), flat.max(axis=0)
    return np.rint(1000 * (flat - low) / np.where(high > low, high - low, 1)).astype(int)
