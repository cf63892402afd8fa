#!/usr/bin/env bash
# A tiny hybrid starts to learn to retrieve needles, on a CPU with two processes: data, training with one stop and
# resume. Beside it stands launch/results/demo/model, the same model as launch/demo_recipe.sh trained it for longer.
# `make demo` runs it in minutes; each run has its own folder under runs/. Settings given to the script go to
# training: `bash launch/demo.sh seed=2`.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=  # the demo shows the path on any machine
run=runs/demo-$(date +%Y%m%d-%H%M%S)
shipped=launch/results/demo/model
least=0.75  # share of needles that the shipped model must retrieve
job=(python launch/job.py --nproc-per-node 2)
pretrain=("${job[@]}" launch/pretrain.py +model=demo_hybrid "run_dir=$run/fresh" "data.path=$run/data/64"
  "data.tokenizer=$shipped/tokenizer.json" "data.cache=$run/data/cache" "$@")

# needles CHECKPOINT: keys and values that no training document holds
needles() {
  "${job[@]}" launch/needle.py "checkpoint=$1" 'lengths=[64,128,256,512]' trials=16 batch_size=40
}

echo "== 1/5 data: documents of 64 tokens, facts that are repeated later, as a Megatron dataset"
python launch/prepare_data.py input=needles "output=$run/data/64" "tokenizer=$shipped/tokenizer.json" \
  needles.length=64 needles.documents=30000 'needles.share=[0.5,1.0]'

echo "== 2/5 training, stopped early"
"${pretrain[@]}" train.exit_step=100

echo "== 3/5 training, resumed from its checkpoint"
"${pretrain[@]}"

echo "== 4/5 the trained model that comes with s2train, imported"
python launch/import.py "weights=$shipped" "output=$run/shipped" precision=fp32 "conf=$run/conf"

echo "== 5/5 needles, read by both"
needles "$run/fresh"
needles "$run/shipped"

echo "== pictures"
python launch/show_layout.py +model=demo_hybrid seq_length=512 "output=$run/layout"
ls "$run"/fresh/loss.png "$run"/layout/layout.png
python launch/demo_picture.py "$run/needle.png" "trained in this demo=$run/fresh/needle/needle.json" \
  "shipped checkpoint=$run/shipped/needle/needle.json" --least $least
