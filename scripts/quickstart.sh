#!/usr/bin/env bash
# From a bare Python >= 3.11 to a trained, evaluated, searched lexical embedder, in one command.

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  cat <<'HELP'
bash scripts/quickstart.sh [--data DIR] [--model PATH] [--output DIR] [--k N] [--restart] [-- TRAINING OVERRIDES]

Makes the virtual environment where it is missing, then clusters a vocabulary, trains a small lexical embedder on the
documentation of Python's standard library, evaluates it on modules that it never saw, answers three questions and
shows why each answer matched. A second call runs only what is missing or changed.

--data DIR     your own BEIR folder (corpus.jsonl, and where you have them queries.jsonl and qrels/*.tsv)
--model PATH   another backbone: a folder, or a name on the Hugging Face hub (default: MiniLM from the package index)
--output DIR   where everything goes (default: runs/quickstart; the report is report.html in it)
--k N          number of token clusters, the width of an embedding (default: 4000)
--restart      run every step again
-- ...         the rest goes to train/run.py, for example: -- --max_steps 300

LENS_VENV      the virtual environment (default: .venv in the checkout)
PYTHON         the Python to make it with (default: the newest of python3.13, python3.12, python3.11, python3)
HELP
  exit
fi

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_up mini cluster train eval
export LENS_SETUP_SECONDS=$SECONDS
exec "$VENV/bin/python" "$ROOT/scripts/quickstart.py" "$@"
