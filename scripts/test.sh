#!/usr/bin/env bash
# All checks of the project, from a bare Python >= 3.11: lint, format, types, tests.

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  cat <<'HELP'
bash scripts/test.sh [PYTEST ARGUMENTS]

Makes the virtual environment where it is missing, then runs ruff check, ruff format --check, mypy --strict on lens/
and pytest with all tests, the slow ones included, and those marked gpu where there is a GPU. Arguments go to pytest:

    bash scripts/test.sh -k pooling

LENS_VENV  the virtual environment (default: .venv in the checkout)
PYTHON     the Python to make it with (default: the newest of python3.13, python3.12, python3.11, python3)
HELP
  exit
fi

# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_up mini cluster train eval mteb quantized dev
# Its own requirement, pytrec_eval, does not build everywhere; pytrec-eval-terrier provides the same module.
"$VENV/bin/python" -c 'import air_benchmark' 2>/dev/null || pip_install --no-deps air-benchmark || explain_pip air-benchmark

BIN=$VENV/bin
FAILED=()
cd "$ROOT" || exit
export HF_HUB_OFFLINE=1

check() { # check NAME COMMAND...
  local name=$1 start=$SECONDS status=ok
  shift
  say "$name"
  "$@" || { status=FAILED && FAILED+=("$name"); }
  SUMMARY+=$(printf '    %-12s %-6s %5d s' "$name" "$status" $((SECONDS - start)))$'\n'
}

SUMMARY=""
check "ruff check" "$BIN/ruff" check .
check "ruff format" "$BIN/ruff" format --check .
check "mypy" "$BIN/mypy" --strict lens
check "pytest" "$BIN/python" -m pytest -m "$(has_gpu && echo 'not network' || echo 'not network and not gpu')" "$@"

say "Summary after $SECONDS s"
printf '%s' "$SUMMARY"
((${#FAILED[@]} == 0)) || fail "failed: $(printf '%s, ' "${FAILED[@]}" | sed 's/, $//'); the output above says why"
