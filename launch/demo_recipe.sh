#!/usr/bin/env bash
# Trains the hybrid that the demo ships (launch/results/demo/model), on one GPU in about two minutes.
#
#   bash launch/demo_recipe.sh data ROOT               documents of 64, 128 and 512 tokens, and their tokenizer
#   bash launch/demo_recipe.sh train ROOT [SETTING…]   one phase; settings go to launch/pretrain.py
#   bash launch/demo_recipe.sh export ROOT             ROOT/model, as launch/export.py writes it
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: bash launch/demo_recipe.sh data|train|export ROOT [SETTING…]"
action=${1:?$usage} root=${2:?$usage}
shift 2
tokenizer=$root/data/64-tokenizer.json

# documents LENGTH COUNT SETTING…: facts, each told again later among noise, as a Megatron dataset
documents() {
  local length=$1 count=$2
  shift 2
  python launch/prepare_data.py input=needles "output=$root/data/$length" "needles.length=$length" \
    "needles.documents=$count" "needles.workers=$(nproc)" "seed=$length" "$@"
}

case $action in
data)  # the shortest documents end the plateau early, the longest teach distance
  documents 64 150000 tokenizer=bpe:768 'needles.share=[0.5,1.0]'
  documents 128 50000 "tokenizer=$tokenizer" 'needles.share=[0.15,1.0]' 'needles.facts=[1,4]' needles.questions_last=0.3 &
  documents 512 30000 "tokenizer=$tokenizer" 'needles.share=[0.05,1.0]' 'needles.facts=[1,16]' needles.questions_last=0.5
  wait $!
  ;;
train)
  exec python launch/pretrain.py +model=demo_hybrid "run_dir=$root/run" "data.tokenizer=$tokenizer" \
    "data.path=[0.3,$root/data/64,0.2,$root/data/128,0.5,$root/data/512]" "data.cache=$root/data/cache" \
    data.split=[99,1,0] data.attention_within_documents=true train.seq_length=512 train.global_batch_size=64 \
    train.micro_batch_size=64 train.precision=bf16 train.steps=1500 checkpoint.interval=500 checkpoint.keep=1 \
    evaluation.interval=500 evaluation.batches=2 tracking.log_interval=25 elementwise=torch loss=torch "$@"
  ;;
export)
  python launch/export.py "checkpoint=$root/run" "output=$root/model"
  ;;
*)
  echo "$usage" >&2
  exit 2
  ;;
esac
