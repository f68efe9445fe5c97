#!/usr/bin/env bash
# The table of lexical systems on your data, every row trained on the same pairs from the same backbone.

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  cat <<'HELP'
bash scripts/compare_lexical.sh --beir DIR [DIR ...] [--pairs FILE ...] [--output DIR] [--steps N] [--rows NAME ...]

Makes the virtual environment where it is missing, trains every row, evaluates all of them and writes report.md,
plot.svg and results.json. A second call runs only what is missing or changed.

--beir DIR     folders in BEIR layout that all rows are evaluated on, and that none is trained on
--pairs FILE   training pairs, .jsonl(.gz) with `query` and `positive`; without them the first folder's qrels/train.tsv
--text FILE    more raw text for the MLM head (default: the pairs' own)
--model PATH   the backbone: an encoder's folder or hub name (default: MiniLM from the package index)
--output DIR   where everything goes (default: runs/compare)
--steps N      optimizer steps of each trained row (default: 200)
--batch-size N queries of a step (default: 32)
--length N     tokens that documents are cut to, by all rows with a model (default: 256)
--limit N      training queries at most (default: all)
--k N          clusters of LENS (default: 4000)
--rows NAME    only these rows: tfidf doc2query deepct sparterm splade-v1-l1 splade-v1-flops splade-max splade-doc
               splade-distil splade-clusters lens dense (BM25 is always there)
--restart      run every step again

LENS_VENV and PYTHON are those of scripts/quickstart.sh.
HELP
  exit
fi

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_up mini cluster train eval
exec "$VENV/bin/python" "$ROOT/scripts/compare_lexical.py" "$@"
