#!/usr/bin/env bash
# Inside a Slurm batch job: a program on all of its nodes, and the job queued again when its time is up (requeue.sh).
#   exec launch/slurm/run.sh launch/pretrain.py +model=7b_hybrid …
# The job wants one task a node and `--signal=B:USR1@300`. Settings: launch/multinode.sh.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD=$head:$((20000 + SLURM_JOB_ID % 12000)) JOB_ID=$SLURM_JOB_ID NNODES=$SLURM_JOB_NUM_NODES

# A node whose ranks fail for good must not take the others' last words with it: each ends by itself.
# --export: after `sbatch --export=…` srun would hand on no more than that of what this script has set.
# --cpus-per-task: srun of Slurm 22.05 to 23.02 doesn't take it over from sbatch, and tasks would have one core.
exec "$here/requeue.sh" srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
    --export=ALL ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$here/../multinode.sh" "$@"
