#!/usr/bin/env bash
# Trains a hybrid and a dense model of the same shape with the same settings, and compares them.
#   launch/hybrid_vs_dense.sh SIZE OUTPUT [setting=value …]      e.g. 125m launch/results/2026-11-22-h100-125m train.steps=300
set -euo pipefail
usage="usage: launch/hybrid_vs_dense.sh SIZE OUTPUT [setting=value …]"
size=${1:?$usage} output=${2:?$usage}
output=${output%.json}
shift 2
runs=runs/compare-$(basename "$output")
for kind in hybrid dense; do
    python3 "$(dirname "$0")/job.py" --standalone --nproc-per-node "${NPROC:-1}" "$(dirname "$0")/pretrain.py" "+model=${size}_$kind" "run_dir=$runs/${size}_$kind" "$@"
done
python3 "$(dirname "$0")/compare.py" "$output" "$runs/${size}_hybrid" "$runs/${size}_dense" \
    --command "launch/hybrid_vs_dense.sh $size $output $*"
