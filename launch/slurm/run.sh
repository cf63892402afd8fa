#!/usr/bin/env bash
# Runs a program on all nodes of a Slurm batch job, and requeues the job at its time limit (requeue.sh).
#   exec launch/slurm/run.sh launch/pretrain.py +model=7b_hybrid …
# The job needs one task per node and `--signal=B:USR1@300`. Settings: launch/multinode.sh.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD=$head:$((20000 + SLURM_JOB_ID % 12000)) JOB_ID=$SLURM_JOB_ID NNODES=$SLURM_JOB_NUM_NODES

# --kill-on-bad-exit=0: each node exits by itself, so that a failed node doesn't cut off the others' error messages.
# --export: after `sbatch --export=…` srun would only pass on the variables named there, not those set by this script.
# --cpus-per-task: srun of Slurm 22.05 to 23.02 doesn't inherit it from sbatch, and tasks would have one core.
exec "$here/requeue.sh" srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    --export=ALL ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$here/../multinode.sh" "$@"
