"""The command line: `lens encode | search | explain | export | card | push`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lens.files import atomic_file, check_output
from lens.program import interruptible


@interruptible("lens")
def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after printing one line on what was wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"lens: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


_QUANTIZATION = "4bit, 8bit: quantise the backbone to save memory (bitsandbytes); int8: faster on a CPU"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lens", description="Lexicon-based text embeddings.")
    commands = parser.add_subparsers(required=True, metavar="encode | search | explain | export | card | push")

    def command(name: str, run: Any, help: str, example: str, encodes: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, epilog=f"example: {example}")
        sub.set_defaults(command=run)
        sub.add_argument("--model", required=True, help="folder or hub id of a LENS model")
        if encodes:
            device = sub.add_mutually_exclusive_group()
            device.add_argument("--device", help="cpu, cuda or mps; default: the first GPU there is, else the CPU")
            device.add_argument("--devices", nargs="+", help="several, each with a process: --devices cuda:0 cuda:1")
            sub.add_argument("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on GPUs, else float32")
            sub.add_argument("--quantization", choices=("4bit", "8bit", "int8"), help=_QUANTIZATION)
            sub.add_argument(
                "--attn-implementation", help="sdpa, eager, flash_attention_2, ...; default: transformers' own"
            )
            sub.add_argument("--compile", action="store_true", help="compile the backbone's layers, for GPUs")
            sub.add_argument("--base", help="the backbone's place where it has moved")
            sub.add_argument(
                "--compat", choices=("official",), help="embed as the released LENS code does, for its checkpoints"
            )
            sub.add_argument("--instruction", help="instruction of the queries")
        if name != "card":
            sub.add_argument("--pooling", choices=("max", "sum"), help="of a SPLADE checkpoint that does not say: max")
        return sub

    encode = command(
        "encode",
        _encode,
        "Embed texts and write them to a file.",
        "lens encode corpus.jsonl.gz --model DIR --output d.npz",
    )
    encode.add_argument("input", help=".txt (a text a line), .jsonl(.gz) with _id and text, or a BEIR folder")
    encode.add_argument("--output", required=True, help=".npz (CSR with ids) or .safetensors (dense)")
    encode.add_argument("--kind", choices=("document", "query"), default="document", help="default: document")
    encode.add_argument("--top-k", type=int, help="keep this many largest values of each text")
    encode.add_argument("--batch-tokens", type=int, help="padded tokens of a batch at most")
    encode.add_argument("--overwrite", action="store_true", help="replace an existing output")

    search = command(
        "search",
        _search,
        "Rank the texts of a corpus for queries.",
        "lens search 'copy a tree' --model DIR --corpus DIR",
    )
    search.add_argument("query", nargs="*", help="queries, each one argument")
    search.add_argument("--queries", help="file of queries instead: .txt or .jsonl(.gz)")
    search.add_argument("--corpus", required=True, help=".txt, .jsonl(.gz) or a BEIR folder")
    search.add_argument("--embeddings", help="the corpus's embeddings as `lens encode` wrote them")
    search.add_argument("-k", type=int, default=10, help="documents per query (10)")
    search.add_argument("--explain", type=int, default=0, metavar="N", help="show the N clusters that matched most")
    search.add_argument("--json", action="store_true", help="print one JSON object a line")
    search.add_argument("--output", help="write a TREC run file instead of printing")
    search.add_argument("--overwrite", action="store_true", help="replace an existing output")

    explain = command(
        "explain",
        _explain,
        "Show which clusters match.",
        "lens explain --model DIR --query 'copy' --document 'copy a tree'",
    )
    explain.add_argument("--query", required=True)
    explain.add_argument("--document", required=True)
    explain.add_argument("-k", type=int, default=10, help="clusters shown (10)")

    export = command(
        "export",
        _export,
        "Write a model again: converted, with its adapter merged, or for sentence-transformers.",
        "lens export --model DIR --include-backbone --output DIR",
        encodes=False,
    )
    export.add_argument("--output", required=True, help="folder to write")
    export.add_argument("--overwrite", action="store_true", help="replace an existing model")

    card = command(
        "card",
        _card,
        "Write a model's card again, with results.",
        "lens card --model DIR --results runs/eval/results.json",
        encodes=False,
    )
    card.add_argument("--results", help="results.json of eval/run.py; unset: those the card has")
    card.add_argument("--system", help="the model's name in the results, where they hold several models")
    card.add_argument("--license", help="license identifier of the hub, such as apache-2.0; unset: the card's")
    card.add_argument("--overwrite", action="store_true", help="replace a README.md that was edited by hand")

    push = command(
        "push", _push, "Upload a model to the hub.", "lens push --model DIR --repo OWNER/NAME", encodes=False
    )
    push.add_argument("--repo", required=True, help="OWNER/NAME of the repository, made where absent")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--message", help="commit message")
    push.add_argument("--revision", help="branch, made where absent; unset: main")
    for sub in (export, push):
        sub.add_argument(
            "--include-backbone", action="store_true", help="store the backbone's weights too, an adapter merged in"
        )
        sub.add_argument("--base", help="the backbone's place where it has moved, or its hub id")
        sub.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16")
    return parser


def _load(options: argparse.Namespace) -> Any:
    import lens

    return lens.load(
        options.model,
        device=options.devices or options.device,
        dtype=options.dtype,
        base=options.base,
        attn_implementation=options.attn_implementation,
        compat=options.compat,
        quantization=options.quantization,
        compile=options.compile,
        pooling=options.pooling,
    )


def _encode(options: argparse.Namespace) -> None:
    from lens.corpus import read_texts
    from lens.vectors import embeddings_ending, save_embeddings

    if options.instruction and options.kind != "query":
        raise ValueError("--instruction goes with --kind query: documents carry none")
    embeddings_ending(options.output)
    check_output(options.output, options.overwrite)
    ids, texts = read_texts(options.input)
    with _load(options) as model:
        embeddings = model.encode(
            texts,
            options.kind,
            options.instruction,
            output="csr",
            top_k=options.top_k,
            batch_tokens=options.batch_tokens,
        )
    save_embeddings(options.output, embeddings, ids, options.overwrite)
    active = embeddings.nnz / max(len(ids), 1)
    print(f"{len(ids):,} texts x {embeddings.shape[1]:,} dimensions ({active:.0f} active each) in {options.output}")


def _search(options: argparse.Namespace) -> None:
    from lens.corpus import read_texts
    from lens.explain import explain
    from lens.search import search
    from lens.vectors import load_embeddings

    if bool(options.query) == bool(options.queries):
        raise ValueError("give queries either as arguments or by --queries FILE")
    if options.k < 1:
        raise ValueError(f"k must be at least 1, found {options.k}")
    if options.explain < 0 or (options.explain and (options.json or options.output)):
        raise ValueError("--explain takes a number from 1 and goes with printed hits, not with --json or --output")
    if options.output:
        check_output(options.output, options.overwrite)
    if options.queries:
        names, queries = read_texts(options.queries)
    else:
        names, queries = [str(number) for number in range(1, len(options.query) + 1)], options.query
    ids, texts = read_texts(options.corpus)
    spaced = next((name for name in (*names, *ids) if name.split() != [name]), None)
    if options.output and spaced is not None:
        raise ValueError(f"a TREC run cannot hold the id {spaced!r} with white space in it: use --json")
    stored = load_embeddings(options.embeddings) if options.embeddings else None
    if stored is not None and stored[1] != ids:
        raise ValueError(f"{options.embeddings} was made from another corpus than {options.corpus}: its ids differ")
    with _load(options) as model:
        documents = stored[0] if stored is not None else model.encode_documents(texts, output="csr")
        asked = model.encode_queries(queries, options.instruction, output="csr")
    indices, scores = search(asked, documents, options.k)
    if options.output:
        with atomic_file(options.output, options.overwrite) as temporary, temporary.open("w", encoding="utf-8") as file:
            for name, found, values in zip(names, indices, scores, strict=True):
                for rank, (index, score) in enumerate(zip(found, values, strict=True), 1):
                    file.write(f"{name} Q0 {ids[index]} {rank} {score:.6f} lens\n")
        print(f"{len(names):,} queries x {indices.shape[1]} documents in {options.output}")
        return
    for row, (name, query, found, values) in enumerate(zip(names, queries, indices, scores, strict=True)):
        if not options.json:
            print(f"\n{query}")
        for rank, (index, score) in enumerate(zip(found, values, strict=True), 1):
            if score <= 0:  # nothing in common with the query
                break
            if options.json:
                hit = {"query": name, "rank": rank, "document": ids[index], "score": round(float(score), 6)}
                print(json.dumps(hit, ensure_ascii=False))
                continue
            print(f"{rank:3d}  {score:.4f}  {ids[index]}  {' '.join(texts[index].split())[:90]}")
            if options.explain:
                vectors = asked[row].toarray()[0], documents[index].toarray()[0]
                seen = model.token_ids(query, texts[index])
                for match in explain(*vectors, model.tokens, options.explain, seen).matches:
                    print(f"     {match.share:7.1%}  {', '.join(match.tokens[:6])}")


def _explain(options: argparse.Namespace) -> None:
    if options.k < 1:
        raise ValueError(f"k must be at least 1, found {options.k}")
    with _load(options) as model:
        print(model.explain(options.query, options.document, options.k, options.instruction))


def _export(options: argparse.Namespace) -> None:
    import lens
    from lens.model import CONFIG_FILE

    check_output(options.output, options.overwrite, CONFIG_FILE)
    model = lens.load(options.model, "cpu", options.dtype, options.base, pooling=options.pooling)
    model.save(options.output, options.include_backbone, options.overwrite)
    print(f"model in {options.output}")


def _card(options: argparse.Namespace) -> None:
    from lens.export import rewrite_card

    print(f"card in {rewrite_card(options.model, options.results, options.system, options.license, options.overwrite)}")


def _push(options: argparse.Namespace) -> None:
    import lens

    model = lens.load(options.model, "cpu", options.dtype, options.base, pooling=options.pooling)
    url = model.push_to_hub(options.repo, options.private, options.message, options.revision, options.include_backbone)
    print(f"model at {url}")


if __name__ == "__main__":
    sys.exit(main())
