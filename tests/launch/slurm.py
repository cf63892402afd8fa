"""Slurm's commands for a batch script to call, on this machine."""

from pathlib import Path

# As many tasks as nodes; signals are handed on to them, as Slurm's srun does.
SRUN = """#!/bin/bash
echo "$@" >> "$ASKED.srun"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & tasks+=($!); done
trap 'asked=yes; kill -USR1 "${tasks[@]}"' USR1
worst=0
for task in "${tasks[@]}"; do
    while true; do asked=; wait "$task"; status=$?; [[ $asked ]] || break; done  # a signal also ends `wait`
    ((status > worst)) && worst=$status
done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; exit; fi
echo "$@" >> "$ASKED"
exit "${REFUSES:-0}"
"""


def write_slurm(folder: Path) -> None:
    """Put `srun` and `scontrol` in a folder, for PATH. What is asked of the latter goes to the file $ASKED, and
    of the former to $ASKED.srun; with $REFUSES the latter ends with that status.
    """
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
