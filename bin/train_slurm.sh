#!/usr/bin/env bash
# Trains on N nodes with M GPUs each under SLURM. Options of sbatch come first, those of train last:
#
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 bin/train_slurm.sh \
#     --config explicit.py --workdir runs/big --set data.path=/scratch/big.h5
#
# Submit the same command again to continue a run that was stopped, also on another number of nodes or GPUs.
#
# There is one process per GPU. Each collates its own batches, so that the GPUs of a node do not queue for
# one Python; and JAX expects this of SLURM: task k of a node takes GPU k. All GPUs of a node must be
# visible to all its tasks (--gpus-per-node, not --gpus-per-task), or NCCL could not use NVLink.
# The workdir and the data must be on a file system that all nodes see.
#
#SBATCH --job-name=relaxnet-jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Three minutes before the time limit, training is told to write a checkpoint and end.
#SBATCH --signal=TERM@180
set -euo pipefail

die() {
  echo "train_slurm.sh: error: $*" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || die "not in a SLURM job; start it with: sbatch bin/train_slurm.sh --config …"
[ $# -gt 0 ] || die "give the options of relaxnet-jax train, e.g. --config explicit.py --workdir runs/big"

tasks="${SLURM_NTASKS_PER_NODE:-1}" gpus="${SLURM_GPUS_ON_NODE:-0}"
[ "$gpus" = 0 ] || [ "$tasks" = "$gpus" ] ||
  die "$tasks tasks on a node with $gpus GPUs; give --ntasks-per-node=$gpus, one task per GPU"

# The repository's own environment if sbatch was called from the repository (SLURM runs a copy of this
# script, whose own location says nothing); otherwise what is on the PATH.
relaxnet="${RELAXNET_JAX:-relaxnet-jax}"
if [ -z "${RELAXNET_JAX:-}" ] && [ -x "${SLURM_SUBMIT_DIR:-.}/.venv/bin/relaxnet-jax" ]; then
  relaxnet="${SLURM_SUBMIT_DIR:-.}/.venv/bin/relaxnet-jax"
fi
command -v "$relaxnet" >/dev/null ||
  die "$relaxnet: not found; activate its environment before sbatch, or set RELAXNET_JAX to its path"

# A run with a checkpoint is resumed; otherwise it is started.
workdir="" previous=""
for argument in "$@"; do
  case "$argument" in --workdir=*) workdir="${argument#--workdir=}" ;; esac
  [ "$previous" != --workdir ] || workdir="$argument"
  previous="$argument"
done
[ -n "$workdir" ] || die "give --workdir DIR, so that the run can be found again"
resume=()
for folder in "$workdir"/checkpoints/latest/[0-9]*; do
  # The name of a checkpoint that orbax has not finished is longer.
  case "${folder##*/}" in *[!0-9]*) ;; *) resume=(--resume) ;; esac
done

# srun no longer takes --cpus-per-task from the job (since SLURM 22.05).
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# The data are only read, and some parallel file systems have no locks.
export HDF5_USE_FILE_LOCKING="${HDF5_USE_FILE_LOCKING:-BEST_EFFORT}"

echo "job $SLURM_JOB_ID: ${SLURM_JOB_NUM_NODES:-1} node(s) × $tasks process(es)"
# If one process dies, the others are ended too, instead of waiting for it.
exec srun --kill-on-bad-exit=1 --ntasks-per-node="$tasks" "$relaxnet" train ${resume[@]+"${resume[@]}"} "$@"
