#!/usr/bin/env bash
#SBATCH --job-name=lens
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lens-%j.log
# The paper's run under SLURM: 4 nodes x 4 GPUs, a global batch of 512 queries.

if [[ ${1:-} == --help || ${1:-} == -h || $# -eq 0 ]]; then
  cat <<'HELP'
sbatch [OPTIONS OF SBATCH] scripts/slurm.sh RECIPE.yaml [--field value ...]

Submit it from the checkout, which all nodes must see. One task a node starts that node's ranks; train/run.py gets the
arguments as they stand. Options of sbatch before the script's name override those at its head:

    sbatch --partition=gpu --nodes=2 scripts/slurm.sh RECIPE.yaml --deepspeed zero1 --output runs/lens

A job that was cut off or requeued goes on from its newest whole checkpoint: submit the same line again.

LENS_LAUNCHER  torchrun (default), or deepspeed, which gets a hostfile of the job's nodes
LENS_RANKS     ranks per node (default: the node's GPUs)
LENS_VENV      the virtual environment (default: .venv in the checkout)
HELP
  exit
fi

set -euo pipefail

fail() {
  printf 'slurm.sh: %s\n' "$*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no SLURM job: submit it with sbatch"
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f train/run.py ]] || fail "$PWD holds no train/run.py: submit from the checkout"
RANKS=${LENS_RANKS:-${SLURM_GPUS_ON_NODE:-}}
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "the nodes have no GPUs (found '$RANKS'): give --gpus-per-node, or LENS_RANKS"
VENV=${LENS_VENV:-.venv}
[[ -x $VENV/bin/python ]] || fail "$VENV holds no Python: make it with scripts/test.sh, or give LENS_VENV"
PATH=$(cd "$VENV/bin" && pwd):$PATH

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
PORT=$((20000 + SLURM_JOB_ID % 20000))
case ${LENS_LAUNCHER:-torchrun} in
  torchrun)
    LAUNCH=(torchrun --nnodes "${#NODES[@]}" --nproc_per_node "$RANKS" --rdzv_id "$SLURM_JOB_ID"
      --rdzv_backend c10d --rdzv_endpoint "${NODES[0]}:$PORT")
    ;;
  deepspeed)
    HOSTFILE=$PWD/lens-$SLURM_JOB_ID.hostfile
    trap 'rm -f "$HOSTFILE"' EXIT
    printf "%s slots=$RANKS\n" "${NODES[@]}" > "$HOSTFILE"
    # --no_ssh: srun has started this on every node; the node's number is known there only.
    # shellcheck disable=SC2016
    LAUNCH=(bash -c 'exec deepspeed --node_rank "$SLURM_NODEID" "$@"' deepspeed --no_ssh --hostfile "$HOSTFILE"
      --master_addr "${NODES[0]}" --master_port "$PORT")
    ;;
  *) fail "LENS_LAUNCHER is torchrun or deepspeed, found '$LENS_LAUNCHER'" ;;
esac

echo "${#NODES[@]} nodes x $RANKS ranks: ${NODES[*]}"
srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${LAUNCH[@]}" train/run.py "$@"
