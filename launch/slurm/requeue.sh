#!/usr/bin/env bash
# Inside a Slurm batch job: a command, and the job queued again when its time is up.
#   exec launch/slurm/requeue.sh python launch/job.py --standalone --nproc-per-node 8 launch/pretrain.py +model=…
# The job wants `--signal=B:USR1@300`: SIGUSR1 goes on to the command, whose ranks save and stop; then the same job waits
# in the queue again and goes on from there. A cancelled or a failed job is not queued again; one whose node died is, by
# Slurm itself (`--requeue`).
# SAVE_SECONDS: that the ranks have to save, of the 300 (240); then they are killed, and the job is still queued again.
set -uo pipefail
export PET_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-240}

"$@" &
command=$!
time_is_up= interrupted=
trap 'time_is_up=yes interrupted=yes; kill -USR1 "$command" 2>/dev/null' USR1
# A job that is cancelled or makes way for another: Slurm signals the batch script alone, and kills all when it has ended.
# The tasks of srun get a SIGTERM of their own; srun would answer one by killing them.
[[ $1 == srun ]] || trap 'interrupted=yes; kill -TERM "$command" 2>/dev/null' TERM
while true; do  # a signal ends `wait` too
    interrupted=
    wait "$command"
    status=$?
    [[ $interrupted ]] || break
done

# 138 is 128 + SIGUSR1: ended without saving, by checkpoint.save=false or before the ranks listened. It would start
# afresh each time.
if [[ $time_is_up && $status -ne 0 && $status -ne 138 ]]; then
    echo "time is up: queued again as $SLURM_JOB_ID (status $status)"  # first: Slurm ends this script for it
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "error: $SLURM_JOB_ID was not queued again: scontrol requeue failed. The same command submitted again goes on" >&2
fi
exit "$status"
