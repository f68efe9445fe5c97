# Sourced by scripts/test.sh and scripts/quickstart.sh: from a bare Python >= 3.11 to a complete virtual environment.
#
#   LENS_VENV  the virtual environment (default: .venv in the checkout)
#   PYTHON     the Python to make it with (default: the first of python3.13, 3.12, 3.11, python3 that is >= 3.11)
#
# A stamp inside the environment holds a hash of all that decides its content and the extras installed; while it fits,
# pip is not called. `$VENV.installing/` exists while an install runs: one that was killed is started afresh.
# shellcheck shell=bash

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LENS_VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
VENV=${VENV%/}
LOCK=$VENV.installing
LOG=$VENV/lens-install.log
STAMP=$VENV/lens-stamp
CPU_INDEX=https://download.pytorch.org/whl/cpu
LOCK_HELD=""

export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUTF8=1
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads leave the core to whoever has work

say() { if [[ -t 1 ]]; then printf '\033[1m==> %s\033[0m\n' "$*"; else printf '==> %s\n' "$*"; fi; }

fail() { # one line: what is wrong and the remedy
  [[ -z $LOCK_HELD ]] || rm -rf "$LOCK"
  printf 'error: %s\n' "$*" >&2
  exit 1
}

timed() { # timed TEXT COMMAND...: says what runs and how long it took, returns the command's status
  local text=$1 start=$SECONDS status=0
  shift
  say "$text"
  "$@" || status=$?
  printf '    %d s\n' $((SECONDS - start))
  return "$status"
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

torch_kind() { # cuda | cpu | plain
  if has_gpu; then echo cuda; elif [[ $(uname -s) == Linux ]]; then echo cpu; else echo plain; fi
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

find_python() { # sets BASE_PYTHON
  local candidate version seen=""
  for candidate in ${PYTHON:+"$PYTHON"} $([[ -n ${PYTHON:-} ]] || echo python3.13 python3.12 python3.11 python3); do
    version=$(version_of "$candidate")
    [[ -n $version ]] || continue
    seen+="${seen:+, }$candidate is $version"
    if ((${version%%.*} > 3 || (${version%%.*} == 3 && ${version#*.} >= 11))); then
      BASE_PYTHON=$candidate
      return
    fi
  done
  fail "LENS needs Python 3.11 or newer (${seen:-${PYTHON:-python3} was not found or does not run}): install one," \
    "or name it: PYTHON=/path/to/python3.12 bash $0"
}

check_disk() { # check_disk GIGABYTES
  local folder=$VENV free
  while [[ ! -d $folder ]]; do folder=$(dirname "$folder"); done
  [[ -w $folder ]] || fail "cannot write in $folder: set LENS_VENV to a folder where the environment may lie"
  free=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
  ((free >= $1 * 1000 * 1000)) ||
    fail "too little disk: the environment needs about $1 GB, $folder has $((free / 1000 / 1000)) GB free;" \
      "make room, or set LENS_VENV to a folder on a larger disk"
}

fingerprint() { # of all that decides what the environment holds, extras aside
  "$VENV/bin/python" - "$ROOT" "$(torch_kind)" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([*parts, sys.version.encode(), *map(str.encode, sys.argv[1:])])).hexdigest())
PYTHON
}

# shellcheck disable=SC2094 # pip and the shell both append to the log
pip_install() { # pip_install ARGUMENTS...: quiet, everything in the log; returns pip's status
  (cd "$ROOT" && "$VENV/bin/python" -m pip install --quiet --progress-bar off --log "$LOG" -c constraints.txt "$@") \
    >>"$LOG" 2>&1
}

known_trouble() { # fails with one line if the log tells of damage, a full disk or no network while installing WHAT
  local what=$1
  if grep -q 'DO NOT MATCH THE HASHES' "$LOG"; then
    fail "hash mismatch while installing $what: a download is damaged or was altered; run 'pip cache purge' and try" \
      "again, and if it stays ask whoever runs your package index ($LOG)"
  elif grep -qi 'No space left on device' "$LOG"; then
    fail "no space left on the disk while installing $what: make room, also in ${TMPDIR:-/tmp} ($LOG)"
  elif grep -qiE 'Failed to establish a new connection|connection broken by|Max retries exceeded|name resolution|Name or service not known|Network is unreachable|ConnectTimeout|Read timed out|ProxyError|Connection refused|nodename nor servname' "$LOG"; then
    fail "no network: pip could not reach its package index while installing $what; check the connection, the proxy" \
      "and pip's settings (pip config list; $LOG)"
  fi
}

explain_pip() { # fails with one line for what the log says went wrong with WHAT
  local what=$1 line
  known_trouble "$what"
  line=$(grep -oE 'ERROR: .*' "$LOG" | tail -n 1 || true)
  fail "pip could not install $what: ${line#ERROR: } (the whole story: $LOG)"
}

install_torch() {
  local pin kind
  pin=$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")
  kind=$(torch_kind)
  : >"$LOG"
  if [[ $kind == cpu ]]; then
    pip_install "torch==$pin+cpu" && return
    known_trouble "torch $pin"
    pip_install "torch==$pin+cpu" --extra-index-url "$CPU_INDEX" || explain_pip "torch $pin from $CPU_INDEX"
  else
    if [[ $kind == cuda && $(torch_version) == *+cpu ]]; then
      "$VENV/bin/python" -m pip uninstall --yes torch >>"$LOG" 2>&1 || explain_pip "torch $pin"
    fi
    pip_install "torch==$pin" || explain_pip "torch $pin"
  fi
}

torch_version() {
  "$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

install_extras() { # install_extras "a,b,c"
  local before
  before=$(torch_version)
  pip_install -e ".[$1]" || explain_pip "the packages"
  [[ $(torch_version) == "$before" ]] ||
    fail "installing the packages replaced torch $before by $(torch_version): remove $VENV and report this ($LOG)"
}

take_lock() { # also clears away what a killed install left
  local owner
  if [[ -d $LOCK ]]; then
    owner=$(cat "$LOCK/pid" 2>/dev/null || true)
    if [[ -n $owner ]] && kill -0 "$owner" 2>/dev/null; then
      fail "another install into $VENV is running (process $owner): wait for it, or stop it and remove $LOCK"
    fi
    if [[ -e $LOCK/creating || -e $VENV/lens-made ]]; then
      say "An earlier install was interrupted: starting afresh"
      rm -rf "$VENV"
    fi
    rm -rf "$LOCK"
  fi
  { mkdir -p "$(dirname "$VENV")" && mkdir "$LOCK"; } 2>/dev/null || fail "cannot write in $(dirname "$VENV"): choose another LENS_VENV"
  LOCK_HELD=yes
  echo $$ >"$LOCK/pid"
}

make_venv() {
  if [[ -d $VENV && -n $(ls -A "$VENV") ]]; then
    [[ -f $VENV/pyvenv.cfg ]] || fail "$VENV is a folder, but no virtual environment: choose another LENS_VENV"
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    [[ -e $VENV/lens-made ]] || fail "$VENV has no working pip: remove it, or choose another LENS_VENV"
    rm -rf "$VENV"
  fi
  find_python
  "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$BASE_PYTHON has no venv module: install it (Debian, Ubuntu: apt install python$(version_of "$BASE_PYTHON")-venv)"
  touch "$LOCK/creating"
  timed "Making a virtual environment with $BASE_PYTHON ($(version_of "$BASE_PYTHON")) in $VENV" \
    "$BASE_PYTHON" -m venv "$VENV" || fail "$BASE_PYTHON could not make a virtual environment in $VENV"
  touch "$VENV/lens-made"
  rm "$LOCK/creating"
}

set_up() { # set_up EXTRA...: the environment has these extras of the package; no call of pip when it has them already
  local print="" have="" extra wanted
  if [[ -x $VENV/bin/python && -f $STAMP && ! -d $LOCK ]]; then
    print=$(fingerprint) || print=""
    if [[ -n $print && $(sed -n 1p "$STAMP") == "$print" ]]; then
      have=$(sed -n 2p "$STAMP")
      for extra in "$@"; do
        [[ ",$have," == *",$extra,"* ]] || print=""
      done
      if [[ -n $print ]]; then
        say "Environment: $VENV is complete"
        return
      fi
    fi
  fi
  [[ -x $VENV/bin/python ]] || find_python
  check_disk "$(has_gpu && echo 9 || echo 4)"
  take_lock
  make_venv
  wanted=$have
  for extra in "$@"; do
    [[ ",$wanted," == *",$extra,"* ]] || wanted+=${wanted:+,}$extra
  done
  rm -f "$STAMP"
  timed "Installing torch $(sed -n 's/^torch==//p' "$ROOT/constraints.txt") ($(torch_kind); log: $LOG)" install_torch
  timed "Installing the packages for: ${wanted//,/, }" install_extras "$wanted"
  printf '%s\n%s\n' "$(fingerprint)" "$wanted" >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  rm -rf "$LOCK"
  LOCK_HELD=""
}
