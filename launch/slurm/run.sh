#!/usr/bin/env bash
# Inside a Slurm batch job: a program on all of its nodes, and the job queued again when its time is up.
#   exec launch/slurm/run.sh launch/pretrain.py +model=7b_hybrid …
# The job wants one task a node and `--signal=B:USR1@300`: at SIGUSR1 the ranks save and stop, then the same job waits
# in the queue again and goes on from there. A cancelled or a failed job is not queued again; one whose node died is,
# by Slurm itself (`--requeue`). Settings: launch/multinode.sh.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD=$head:$((20000 + SLURM_JOB_ID % 12000)) JOB_ID=$SLURM_JOB_ID NNODES=$SLURM_JOB_NUM_NODES

# A node whose ranks fail for good must not take the others' last words with it: each ends by itself.
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "$here/../multinode.sh" "$@" &
step=$!
time_is_up=
trap 'time_is_up=yes; kill -USR1 "$step" 2>/dev/null' USR1
while true; do  # a signal ends `wait` too
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done
# What saves nothing would start afresh each time.
if [[ $time_is_up && $status -ne 0 && " $* " != *" checkpoint.save=false "* ]]; then
    echo "time is up: queued again as $SLURM_JOB_ID (status $status)"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
