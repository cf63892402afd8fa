#!/usr/bin/env bash
# Runs a command in a Slurm batch job, and requeues the job at its time limit.
#   exec launch/slurm/requeue.sh python launch/job.py --standalone --nproc-per-node 8 launch/pretrain.py +model=…
# The job needs `--signal=B:USR1@300`. This script forwards SIGUSR1 to the command, whose ranks save and stop. It then
# requeues the job, which resumes from the checkpoint. Cancelled and failed jobs are not requeued; after a node failure
# Slurm itself requeues the job (`--requeue`).
# SAVE_SECONDS: time for up to two steps and the save, out of the 300 s (240). Then the ranks are killed, and the job is
# still requeued.
set -uo pipefail
export PET_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-240}

"$@" &
command=$!
time_is_up= interrupted=
trap 'time_is_up=yes interrupted=yes; kill -USR1 "$command" 2>/dev/null' USR1
# If a job is cancelled or preempted, Slurm signals only the batch script, and kills everything when the script exits. The
# tasks of srun receive SIGTERM directly; srun itself would kill them on SIGTERM.
[[ $1 == srun ]] || trap 'interrupted=yes; kill -TERM "$command" 2>/dev/null' TERM
while true; do  # a signal also ends `wait`
    interrupted=
    wait "$command"
    status=$?
    [[ $interrupted ]] || break
done

# 138 is 128 + SIGUSR1: the command exited without saving, because of checkpoint.save=false or before the ranks handled
# signals. It would start from scratch each time.
if [[ $time_is_up && $status -ne 0 && $status -ne 138 ]]; then
    echo "time limit reached: requeuing job $SLURM_JOB_ID (status $status)"  # before scontrol: Slurm ends this script
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "error: job $SLURM_JOB_ID was not requeued: scontrol requeue failed. Submit the same command again to resume" >&2
fi
exit "$status"
