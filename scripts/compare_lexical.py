"""The classic table of lexical systems, made anew: all rows trained on the same pairs, from the same backbone.

    python scripts/compare_lexical.py --beir EVAL_DIR [...] --pairs pairs.jsonl.gz [...] --output runs/compare

BM25, TF-IDF, doc2query, DeepCT, SparTerm in its three modes, SPLADE v1 with both regularisers, SPLADE-max, -doc and
-distil, SPLADE over token clusters, LENS, and the dense backbone. Every step is a call of one of the project's
programs, printed so that you can repeat it by hand; a step is skipped while its command, its code and its inputs are
unchanged. `scripts/compare_lexical.sh` makes the environment first and then calls this program.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart import clusters_for, mini_backbone, whitens
from steps import ROOT, Step, StepError, check_output, duration, files_state, run_steps, shown, write_json

RECIPES = Path("train/recipes")
ROWS = (
    "tfidf", "doc2query", "deepct", "sparterm", "splade-v1-l1", "splade-v1-flops", "splade-max", "splade-doc",
    "splade-distil", "splade-clusters", "lens", "dense",
)  # fmt: skip
MAX_POOLING = "--learning_rate 6e-4 --head_learning_rate 1e-3"
SUM_POOLING = "--temperature 20 --learning_rate 2e-4 --head_learning_rate 4e-4"
"""Sums over positions begin as large products, which saturate a softmax without temperature, and steps that suit a
maximum throw them about."""
FLOPS = "--query_sparsity 3e-3 --passage_sparsity 3e-3"
SPLADE = {
    "splade-v1-l1": f"splade-v1.yaml {SUM_POOLING} --sparsity l1 --query_sparsity 3e-4 --passage_sparsity 3e-4",
    "splade-v1-flops": f"splade-v1.yaml {SUM_POOLING} --query_sparsity 3e-4 --passage_sparsity 3e-4",
    "splade-max": f"splade-max.yaml {MAX_POOLING} {FLOPS}",
    "splade-doc": f"splade-doc.yaml {MAX_POOLING} --passage_sparsity 3e-3",
    "splade-distil": f"splade-distil.yaml {MAX_POOLING} {FLOPS} --distillation kl --contrastive_weight 1 "
    "--kd_temperature 0.05",
    "splade-clusters": f"splade-max.yaml {MAX_POOLING} {FLOPS}",
}
"""Recipe, learning rates and regulariser of each SPLADE row. The published weights belong to batches of 128, 150,000
steps and a head that was pre-trained for weeks."""
SPLADE_TRAINING = "--backbone top --top_layers 1 --cache_hidden false --precision fp32 --workers 0"
GENERATOR_TRAINING = "--freeze-encoder --dropout 0 --learning-rate 1e-3"
SPARTERM_TRAINING = "--learning-rate 1e-4 --gate-bias -2 --temperature 50 --in-batch-negatives"
DEEPCT_SCALE = 1000
"""Of DeepCT's frequencies: with one or two queries a passage its recalls are small, and the paper's 100 leaves few."""
QUERIES = 5
"""Queries written for each passage."""
QUERY_LENGTH = 64


@dataclass(frozen=True)
class Settings:
    """What the plan depends on."""

    output: Path
    model: Path | str
    folders: Sequence[Path]
    pairs: Sequence[Path]
    text: Sequence[Path]
    rows: Sequence[str]
    steps: int
    batch: int
    length: int
    k: int
    limit: int | None
    seed: int

    @property
    def mlm_steps(self) -> int:
        """Steps of the MLM head, which all SPLADE and SparTerm rows share."""
        return 3 * self.steps // 2

    @property
    def generator_steps(self) -> int:
        """Steps of the query generator, of half a batch each: it alone learns to write from nothing."""
        return 7 * self.steps // 2


def plan(settings: Settings) -> list[Step]:
    """The steps in order, without those that only rows need which were not asked for."""
    s = settings
    out = shlex.quote(shown(s.output))
    base = shlex.quote(shown(s.model) if isinstance(s.model, Path) else s.model)
    model_state = files_state(s.model) if isinstance(s.model, Path) else s.model
    folders = " ".join(shlex.quote(shown(folder)) for folder in s.folders)
    train, scored = f"{out}/mined/examples.jsonl", f"{out}/scored/examples.jsonl"
    common = f"--seed {s.seed} --max_steps {s.steps} --warmup_steps {max(1, s.steps // 10)} --batch_size {s.batch}"
    common += f" --save_steps {max(1, s.steps // 4)}"
    lengths = f"--query_max_length {QUERY_LENGTH} --document_max_length {s.length}"
    plain = common.replace("_", "-")
    steps: list[Step] = []

    def add(
        name: str, title: str, command: str, output: Path, *after: str, state: Any = None, go: bool = False
    ) -> None:
        steps.append(Step(name, title, command, output, after, state, resumable=go))

    source = (
        "--pairs " + " ".join(shlex.quote(shown(path)) for path in s.pairs)
        if s.pairs
        else f"--beir {shlex.quote(shown(s.folders[0]))}"
    )
    limit = f" --limit {s.limit}" if s.limit else ""
    add(
        "data",
        "Training pairs that the evaluation does not ask",
        f"scripts/compare_data.py {source} --exclude {folders} --seed {s.seed}{limit} --output {out}/data",
        s.output / "data",
        state=[files_state(path) for path in (*s.pairs, *s.folders)],
    )
    corpus = "" if s.pairs else f" --corpus {shlex.quote(shown(s.folders[0]))}"
    add(
        "mine",
        "Hard negatives from BM25",
        f"train/mine.py --pairs {out}/data/pairs.jsonl{corpus} --negatives 7 --output {train}",
        s.output / "mined",
        "data",
    )
    sparse = [row for row in SPLADE if row in s.rows]
    if sparse or "sparterm" in s.rows:
        texts = " ".join(shlex.quote(shown(path)) for path in s.text)
        add(
            "mlm",
            "An MLM head for the backbone",
            f"train/mlm.py --base {base} --text {out}/data/pairs.jsonl {texts} --output {out}/mlm --seed {s.seed} "
            f"--max-length 64 --max-steps {s.mlm_steps} --save-steps 100 --batch-size {s.batch}",
            s.output / "mlm",
            "data",
            state=[model_state, [files_state(path) for path in s.text]],
            go=True,
        )
    if {"lens", "splade-distil"} & set(s.rows):
        add(
            "score",
            "The backbone's own cosine similarities, as a teacher",
            f"train/score.py --model {base} --data {train} --output {scored} --standardise "
            f"--max-length {s.length} --embeddings {out}/scored/teacher.safetensors",
            s.output / "scored",
            "mine",
            state=model_state,
        )
    if "lens" in s.rows:
        add(
            "cluster",
            f"{s.k:,} clusters of the backbone's vocabulary",
            f"clustering/run.py --model {base} --k {s.k} --seed {s.seed} --output {out}/clusters",
            s.output / "clusters",
            state=model_state,
        )
        white = "" if whitens(s.model, s.k) else " --whiten false"
        add(
            "lens",
            "LENS",
            f"train/run.py {RECIPES}/lens-mini.yaml --base {base} --clusters {out}/clusters --data {scored} "
            f"--teacher_embeddings {out}/scored/teacher.safetensors --output {out}/models/LENS {lengths} {common}"
            + white,
            s.output / "models/LENS",
            "score",
            "cluster",
            state=recipe_state("lens-mini.yaml"),
            go=True,
        )
    if "splade-clusters" in s.rows:
        add(
            "cluster-mlm",
            f"{s.k:,} clusters of the MLM head's rows",
            f"clustering/run.py --model {out}/mlm --k {s.k} --seed {s.seed} --output {out}/clusters-mlm",
            s.output / "clusters-mlm",
            "mlm",
        )
    for row in sparse:
        after, data, head = ["mine", "mlm"], train, ""
        if row == "splade-distil":
            after, data, head = ["score", "mlm"], scored, f" --teacher_embeddings {out}/scored/teacher.safetensors"
        if row == "splade-clusters":
            after, head = [*after, "cluster-mlm"], f" --clusters {out}/clusters-mlm --transform mlm"
        recipe = SPLADE[row].split()[0]
        add(
            row,
            f"Train {row}",
            f"train/run.py {RECIPES}/{SPLADE[row]} --base {out}/mlm --data {data} --output {out}/models/{row}{head} "
            f"{SPLADE_TRAINING} {lengths} {common} --sparsity_warmup_steps {max(1, s.steps // 2)}",
            s.output / "models" / row,
            *after,
            state=recipe_state(recipe),
            go=True,
        )
    lexical = []
    if "deepct" in s.rows:
        lexical.append(f"DeepCT={out}/models/deepct")
        add(
            "deepct",
            "Train DeepCT",
            f"train/deepct.py --base {base} --data {train} --output {out}/models/deepct {plain} --learning-rate 1e-4",
            s.output / "models/deepct",
            "mine",
            state=model_state,
            go=True,
        )
    if "sparterm" in s.rows:
        place = f"{out}/models/sparterm"
        lexical += [f"SparTerm-{mode}={place}:{mode}" for mode in ("literal", "expansion", "enhanced")]
        add(
            "sparterm",
            "Train SparTerm",
            f"train/sparterm.py --base {out}/mlm --data {train} --output {place} {plain} {SPARTERM_TRAINING} "
            + lengths.replace("_", "-"),
            s.output / "models/sparterm",
            "mine",
            "mlm",
            go=True,
        )
    if "doc2query" in s.rows:
        add(
            "generator",
            "Train a query generator for doc2query",
            f"train/generator.py --base {base} --data {train} --output {out}/generator --seed {s.seed} "
            f"{GENERATOR_TRAINING} {generator_layers(s.model)}"
            f"--passage-length {s.length} --max-steps {s.generator_steps} --warmup-steps {max(1, s.steps // 5)} "
            f"--save-steps 100 --batch-size {s.batch // 2}",
            s.output / "generator",
            "mine",
            state=model_state,
            go=True,
        )
        for folder in s.folders:
            place = f"{out}/doc2query/{shlex.quote(folder.name)}"
            add(
                f"doc2query-{folder.name}",
                f"Write queries for {folder.name}'s documents",
                f"train/generate.py --model {out}/generator --corpus {shlex.quote(shown(folder))} --output "
                f"{place}/written --queries {QUERIES} --seed {s.seed} --passage-length {s.length} --query-length 24 "
                "--overwrite",
                s.output / "doc2query" / folder.name,
                "generator",
                state=files_state(folder),
                go=True,
            )
            add(
                f"evaluate-doc2query-{folder.name}",
                f"BM25 over {folder.name} with its queries",
                f"eval/run.py --beir {place}/written/expanded --baselines bm25 --output {out}/eval-doc2query/"
                f"{shlex.quote(folder.name)}",
                s.output / "eval-doc2query" / folder.name,
                f"doc2query-{folder.name}",
            )
    models = [f"LENS={out}/models/LENS"] if "lens" in s.rows else []
    models += [f"{row}={out}/models/{row}" for row in sparse]
    baselines = ["bm25", *(row for row in ("tfidf", "dense") if row in s.rows)]
    trained = [row for row in ("lens", *sparse, "deepct", "sparterm") if row in s.rows]
    add(
        "evaluate",
        "Evaluate all rows",
        f"eval/run.py --beir {folders} --baselines {' '.join(baselines)} --against bm25 --dense-length {s.length} "
        + (f"--dense-model {base} " if "dense" in s.rows else "")
        + (f"--model {' '.join(models)} " if models else "")
        + (f"--lexical {' '.join(lexical)} --deepct-scale {DEEPCT_SCALE} " if lexical else "")
        + f"--output {out}/eval",
        s.output / "eval",
        *trained,
        state=[model_state, [files_state(folder) for folder in s.folders]],
    )
    written = [f"evaluate-doc2query-{folder.name}" for folder in s.folders] if "doc2query" in s.rows else []
    add(
        "report",
        "Table and plot",
        f"scripts/compare_report.py {out}",
        s.output / "report.md",
        "evaluate",
        *written,
        state=facts_of(s),
    )
    return steps


def facts_of(s: Settings) -> dict[str, Any]:
    """What the report says of the settings, without the places of files."""
    own = [s.folders[0].name] if not s.pairs else []
    model = s.model
    backbone = (model.parent if model.name == "model" else model).name if isinstance(model, Path) else model
    return {
        "rows": list(s.rows), "steps": s.steps, "batch_size": s.batch, "length": s.length, "k": s.k, "seed": s.seed,
        "limit": s.limit, "mlm_steps": s.mlm_steps, "generator_steps": s.generator_steps, "queries": QUERIES,
        "deepct_scale": DEEPCT_SCALE, "backbone": backbone,
        "pairs": [f"{path.parent.name}/{path.name}" for path in s.pairs], "trained_on_folder": own,
        "text": [f"{path.parent.name}/{path.name}" for path in s.text],
    }  # fmt: skip


def generator_layers(model: Path | str) -> str:
    """Options of the generator: two thirds of an encoder's layers read, whose states still tell words apart, and two
    write, which is as much as minutes can train."""
    layers = config_of(Path(model)).get("num_hidden_layers")
    if not isinstance(layers, int):
        return ""
    return f"--encoder-layers {max(1, 2 * layers // 3)} --decoder-layers {min(2, layers)} "


def config_of(model: Path) -> dict[str, Any]:
    """The config.json of a model's folder, nothing where there is none; raises StepError for a damaged one."""
    file = model / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise StepError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise StepError(f"{file} should hold an object, found {type(found).__name__}")
    return found


def recipe_state(name: str) -> str:
    """A hash of a recipe's file."""
    return hashlib.sha256((ROOT / RECIPES / name).read_bytes()).hexdigest()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--beir", type=Path, nargs="+", required=True, metavar="DIR", help="folders of the evaluation")
    add("--pairs", type=Path, nargs="+", default=[], metavar="FILE", help="training pairs: `query`, `positive`")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="more raw text for the MLM head")
    add("--model", help="backbone, a folder or hub name (MiniLM from the package index)")
    add("--output", type=Path, default=ROOT / "runs" / "compare", metavar="DIR")
    add("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="NAME", help=", ".join(ROWS))
    add("--steps", type=int, default=200, help="optimizer steps of each trained row (200)")
    add("--batch-size", type=int, default=32, help="queries of a step (32)")
    add("--length", type=int, default=256, help="tokens that documents are cut to, by all rows with a model (256)")
    add("--k", type=int, help="clusters (4000, at most a quarter of the vocabulary)")
    add("--limit", type=int, help="training queries at most")
    add("--seed", type=int, default=42)
    add("--restart", action="store_true", help="run every step again")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """The checked settings; raises StepError naming the option that does not fit."""
    for name, least in (("steps", 2), ("batch_size", 2), ("length", QUERY_LENGTH), ("limit", 1), ("k", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise StepError(f"--{name.replace('_', '-')} must be at least {least}, found {value}")
    if not 0 <= options.seed < 2**32:
        raise StepError(f"--seed must be at least 0 and below 2^32, found {options.seed}")
    for option in ("pairs", "text"):
        for path in getattr(options, option):
            if not path.exists():
                raise StepError(f"--{option} {path} does not exist")
    for folder in options.beir:
        if not folder.is_dir():
            raise StepError(f"--beir {folder} is not a folder: expected one in BEIR layout, with corpus.jsonl")
    folders = [folder.resolve() for folder in options.beir]
    names = [folder.name for folder in folders]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise StepError(f"two --beir folders are named {repeated!r}: rename one, results are kept by name")
    for path in (path.resolve() for path in options.text):
        inside = next((folder for folder in folders if path == folder or folder in path.parents), None)
        if inside is not None:
            raise StepError(f"--text {path} belongs to {inside.name}, on which the rows are evaluated: leave it out")
    if not options.pairs and not (folders[0] / "qrels" / "train.tsv").is_file():
        raise StepError(f"{folders[0]} has no qrels/train.tsv to train on: give --pairs")
    local = options.model is None or Path(options.model).is_dir()
    model = mini_backbone() if options.model is None else Path(options.model).resolve() if local else options.model
    limit = config_of(Path(model)).get("max_position_embeddings")
    if isinstance(limit, int) and options.length > limit - 2:
        raise StepError(f"--length {options.length} leaves no room for special tokens in {limit} positions of {model}")
    return Settings(
        output=options.output.resolve(),
        model=model,
        folders=folders,
        pairs=[path.resolve() for path in options.pairs],
        text=[path.resolve() for path in options.text],
        rows=options.rows,
        steps=options.steps,
        batch=options.batch_size,
        length=options.length,
        k=clusters_for(Path(model), options.k),
        limit=options.limit,
        seed=options.seed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0, or 1 after one line on standard error."""
    options = parse(arguments)
    started = time.monotonic()
    try:
        settings = settings_of(options)
        check_output(settings.output, "the comparison")
        steps = plan(settings)
        write_json(
            settings.output / ".steps" / "settings.json", {**facts_of(settings), "plan": [x.name for x in steps]}
        )
        print(f"Comparison -> {shown(settings.output)}\n")
        run_steps(steps, settings.output, isinstance(settings.model, Path), options.restart)
    except (StepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nerror: interrupted; the same command goes on with the step that was running", file=sys.stderr)
        return 130
    print((settings.output / "report.md").read_text(encoding="utf-8"))
    print(f"Report: {shown(settings.output / 'report.md')}, in {duration(time.monotonic() - started)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
