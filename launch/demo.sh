#!/usr/bin/env bash
# The whole path at laptop size, on a CPU with two processes: data, training with one stop and resume, needles.
# `make demo` runs it; each run has a folder of its own under runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=  # the demo shows the path on any machine
run=runs/demo-$(date +%Y%m%d-%H%M%S)
data=$run/corpus
pretrain=(python launch/job.py --nproc-per-node 2 launch/pretrain.py +model=tiny_hybrid "run_dir=$run" "data.path=$data" "$@")

echo "== 1/4 data: the bundled corpus as a Megatron dataset"
python launch/prepare_data.py input=bundled "output=$data"

echo "== 2/4 training, stopped half way"
"${pretrain[@]}" train.exit_step=200

echo "== 3/4 training, resumed from its checkpoint"
"${pretrain[@]}"

echo "== 4/4 needles, read by the trained model"
python launch/job.py --nproc-per-node 2 launch/needle.py "checkpoint=$run"

echo "== pictures"
ls "$run"/*.png "$run"/needle/*.png
