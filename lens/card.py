"""A model's configuration, recipe and results -> its model card, README.md with the hub's metadata.

This is the only place where a card is made. The facts it is made of beyond `lens.json` are kept in `card.json`, so
that they outlive loading, merging and saving again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lens.config import LensConfig, check_fields
from lens.explain import ClusterTokens
from lens.files import atomic_file, read_json, write_json

CARD_FILE, README_FILE = "card.json", "README.md"
OPERATIONAL = {
    "output", "save_steps", "save_total_limit", "resume", "logging_steps", "report_to", "workers", "device",
    "cache_hidden", "include_backbone", "inputs",
}  # fmt: skip
"""Fields of a recipe that say how a run was kept, not what it learnt."""
BASELINES = ("dense", "bm25")
"""Names that eval/run.py gives to systems that are no LENS models."""
FILE_ENDINGS = (".jsonl", ".gz", ".json", ".yaml", ".parquet", ".npz", ".npy", ".safetensors", ".txt", ".tsv")
METRICS = {"nDCG": "ndcg", "RR": "mrr", "R": "recall"}
EXAMPLES, EXAMPLE_TOKENS = 8, 6


@dataclass(frozen=True)
class Facts:
    """What a card tells beyond the model's configuration."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """Fields of the training recipe, without paths of the training machine."""
    results: dict[str, Any] = field(default_factory=dict)
    """`system`, the model's name among the systems, and `datasets`: name -> `queries`, `documents` and `systems`,
    name -> measure -> mean over queries."""
    license: str | None = None
    """License identifier as the hub writes it, such as apache-2.0."""

    def replace(self, **changes: Any) -> Facts:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def recipe_facts(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that decide what is learnt, places on the training machine cut to their last name."""
    return {name: public(value) for name, value in recipe.items() if name not in OPERATIONAL and value is not None}


def public(value: Any) -> Any:
    """`value` with local paths, alone or in lists, cut to their last name, cached copies to their hub id."""
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str) or not value or is_hub_id(value):
        return value
    if cached := re.search(r"[/\\](?:models|datasets)--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", value):
        return f"{cached[1]}/{cached[2]}"
    looks_local = value.startswith(("/", "~", "./", "../")) or "\\" in value or value.endswith(FILE_ENDINGS)
    return Path(value.replace("\\", "/")).name if looks_local or os.path.exists(value) else value


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as OWNER/NAME of the hub and names nothing on this machine."""
    return (
        name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not name.endswith(("/", *FILE_ENDINGS))
        and " " not in name
        and not os.path.exists(name)
    )


def result_facts(path: str | os.PathLike[str], system: str | None = None) -> dict[str, Any]:
    """What a card tells of a results.json of eval/run.py; `system` is the model's name in it where there are several.

    Raises FileNotFoundError, or ValueError naming the file and what it lacks.
    """
    found = read_json(path).get("datasets")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} holds no data sets: give the results.json that eval/run.py wrote")
    datasets: dict[str, Any] = {}
    models: dict[str, None] = {}
    for name, entry in found.items():
        systems = entry.get("systems") if isinstance(entry, dict) else None
        if not isinstance(systems, dict) or not all(isinstance(facts, dict) for facts in systems.values()):
            raise ValueError(f"{path}: datasets.{name} holds no systems: give the results.json that eval/run.py wrote")
        means = {
            other: {key: value for key, value in facts.items() if "@" in key and isinstance(value, int | float)}
            for other, facts in systems.items()
        }
        if not all(math.isfinite(value) for values in means.values() for value in values.values()):
            raise ValueError(f"{path}: datasets.{name} holds a measure that is not finite")
        models |= dict.fromkeys(n for n, facts in systems.items() if n not in BASELINES and not facts.get("parts"))
        datasets[name] = {"queries": entry.get("queries"), "documents": entry.get("documents"), "systems": means}
    if system is None and len(models) != 1:
        raise ValueError(f"{path} has results of {', '.join(models) or 'no model'}: say by --system which one this is")
    chosen = system if system is not None else next(iter(models))
    lacking = [name for name, entry in datasets.items() if not entry["systems"].get(chosen)]
    if lacking:
        raise ValueError(
            f"{path}: system {chosen!r} has no measures on {', '.join(lacking)}; known: {', '.join(models)}"
        )
    return {"system": chosen, "datasets": datasets}


def read_facts(folder: Path) -> Facts:
    """The facts in card.json, else those of a training run's recipe.json, else none.

    Raises ValueError naming a damaged file.
    """
    if not (folder / CARD_FILE).is_file():
        recipe = folder / "recipe.json"
        return Facts(recipe_facts(read_json(recipe))) if recipe.is_file() else Facts()
    values = read_json(folder / CARD_FILE)
    values.pop("readme_sha256", None)
    known = {item.name: item.default_factory for item in dataclasses.fields(Facts)}
    try:
        check_fields(values, known, "facts")
    except ValueError as error:
        raise ValueError(f"{folder / CARD_FILE}: {error}") from error
    for name in ("recipe", "results"):
        if not isinstance(values.get(name, {}), dict):
            raise ValueError(f"{folder / CARD_FILE}: {name} should be an object, found {values[name]!r}")
    return Facts(**values)


def write_card(folder: Path, facts: Facts, text: str) -> None:
    """Writes README.md and card.json, each atomically, replacing what is there."""
    with atomic_file(folder / README_FILE, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_json(folder / CARD_FILE, {**dataclasses.asdict(facts), "readme_sha256": digest})


def check_card(folder: Path) -> None:
    """Raises FileExistsError when the folder's README.md is not the one that `write_card` left there."""
    readme = folder / README_FILE
    if not readme.is_file():
        return
    written = read_json(folder / CARD_FILE).get("readme_sha256") if (folder / CARD_FILE).is_file() else None
    if hashlib.sha256(readme.read_bytes()).hexdigest() != written:
        raise FileExistsError(f"{readme} was edited by hand or by another version: --overwrite replaces it")


def model_card(
    config: LensConfig,
    facts: Facts,
    tokens: ClusterTokens,
    adapter: bool = False,
    repository: str | None = None,
) -> str:
    """The text of README.md; `adapter` says that the folder holds a LoRA adapter, `repository` is its hub id."""
    name = repository.rpartition("/")[2] if repository else f"LENS-{config.dimensions}"
    parts = [
        f"---\n{_metadata(config, facts, adapter, name).to_yaml()}\n---\n",
        f"# {name}\n",
        _about(config),
        _use(repository or "path/to/this/folder", config),
        _clusters(config, tokens),
        _results(facts.results),
        _training(facts.recipe),
        "## Method\n\nLei et al., *Enhancing Lexicon-Based Text Embeddings with Large Language Models*, ACL 2025, "
        "[arXiv 2501.09749](https://arxiv.org/abs/2501.09749).\n",
    ]
    return "\n".join(part for part in parts if part)


def _metadata(config: LensConfig, facts: Facts, adapter: bool, name: str) -> ModelCardData:
    base = public(config.base)
    on_hub = is_hub_id(base)
    data = facts.recipe.get("data", [])
    datasets = [item for item in ([data] if isinstance(data, str) else data) if is_hub_id(item)]
    system = facts.results.get("system")
    measured = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=_metric(measure),
            metric_name=measure,
            metric_value=round(value, 5),
        )
        for dataset, entry in facts.results.get("datasets", {}).items()
        for measure, value in entry["systems"][system].items()
    ]
    # The hub adds trust_remote_code=True to its snippets by the tag custom_code.
    tags = ["lens", "sentence-transformers", "sparse-encoder", "sparse", "lexicon", "retrieval", "custom_code"]
    return ModelCardData(
        license=facts.license,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=tags,
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        datasets=datasets or None,
        model_name=name if measured else None,
        eval_results=measured or None,
    )


def _metric(measure: str) -> str:
    """nDCG@10 -> ndcg_at_10, as the hub names measures."""
    kind, _, depth = measure.partition("@")
    return f"{METRICS.get(kind, kind.lower())}_at_{depth}"


def _about(config: LensConfig) -> str:
    what = {"clusters": ", each one a cluster of tokens", "vocabulary": ", each one a token of the vocabulary"}
    rows = {
        "backbone": f"`{public(config.base)}`" + (f" at `{config.revision}`" if config.revision else ""),
        "dimensions": f"{config.dimensions:,}{what.get(config.head, ', of a dense embedding')}",
        "attention": "bidirectional" if config.bidirectional else "causal",
        "pooling": f"{config.pooling} over {config.positions} positions",
        "similarity": "cosine (embeddings are L2-normalised)" if config.normalize else "inner product",
        **({"queries": "bags of tokens, without the model"} if config.query_encoder == "bag" else {}),
        "longest query, document": f"{config.query_max_length}, {config.document_max_length} tokens",
    }
    if config.instruction:
        rows["instruction of queries"] = _cell(config.instruction)
    return (
        "Lexicon-based text embeddings: every dimension is readable, and the parts of a score say why two texts "
        "match.\n\n" + _table(("", ""), rows.items())
    )


def _use(place: str, config: LensConfig) -> str:
    instruction = "Given a question, retrieve passages that answer it"
    prompt = repr(f"<instruct>{instruction}\n<query>").replace("'", '"')
    return f"""## Use

```python
import lens  # pip install lens-embeddings

model = lens.load("{place}")
queries = model.encode_queries(["how do I copy a directory tree?"], instruction="{instruction}")
documents = model.encode_documents(["Recursively copy an entire tree of files."])
print(model.similarity(queries, documents))
print(model.explain("how do I copy a directory tree?", "Recursively copy an entire tree of files.", k=5))
```

The same vectors from sentence-transformers, dense or sparse, with `lens-embeddings` installed:

```python
from sentence_transformers import SentenceTransformer, SparseEncoder

model = SentenceTransformer("{place}", trust_remote_code=True)
queries = model.encode_query(["how do I copy a directory tree?"], prompt={prompt})
documents = model.encode_document(["Recursively copy an entire tree of files."])
print(model.similarity(queries, documents))

sparse = SparseEncoder("{place}", trust_remote_code=True)
print(sparse.decode(sparse.encode_document("Recursively copy an entire tree of files."), top_k=5))
```

Documents get no prompt. A query without an instruction is `encode_query(texts)` or \
`encode(texts, prompt_name="query")`{", which takes the model's own instruction" if config.instruction else ""}.
"""


def _clusters(config: LensConfig, tokens: ClusterTokens) -> str:
    """A few clusters, evenly spread over the dimensions, that hold at least two words."""
    if config.head != "clusters":
        return ""
    rows = []
    step = max(config.dimensions // EXAMPLES, 1)
    for start in range(0, config.dimensions, step):
        for cluster in range(start, min(start + step, config.dimensions)):
            words = dict.fromkeys(w for w in tokens(cluster) if w.isalpha() and len(w) > 2)
            if len({word.lower() for word in words}) > 1:
                rows.append((str(cluster), _cell(", ".join(list(words)[:EXAMPLE_TOKENS]))))
                break
    if not rows:
        return ""
    return "## Clusters\n\nSome dimensions and tokens of theirs:\n\n" + _table(("dimension", "tokens"), rows[:EXAMPLES])


def _results(results: Mapping[str, Any]) -> str:
    if not results:
        return ""
    datasets = results["datasets"]
    measures = list(dict.fromkeys(m for entry in datasets.values() for m in entry["systems"][results["system"]]))
    rows = [
        (
            _cell(dataset),
            f"**{_cell(name)}**" if name == results["system"] else _cell(name),
            *(f"{values[m]:.4f}" if m in values else "" for m in measures),
        )
        for dataset, entry in datasets.items()
        for name, values in entry["systems"].items()
    ]
    sizes = ", ".join(
        f"{name} has {entry['queries']:,} queries and {entry['documents']:,} documents"
        for name, entry in datasets.items()
        if isinstance(entry.get("queries"), int) and isinstance(entry.get("documents"), int)
    )
    return f"## Results\n\nThis model is **{_cell(results['system'])}**{'; ' if sizes else ''}{sizes}.\n\n" + _table(
        ("data set", "system", *measures), rows
    )


def _training(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    rows = []
    for name, value in recipe.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((name, f"`{_cell(shown)}`" if shown else "none"))
    return "## Training\n\nThe recipe of `train/run.py`:\n\n" + _table(("field", "value"), rows)


def _cell(text: str) -> str:
    """Text for one cell of a markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines) + "\n"
