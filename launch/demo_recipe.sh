#!/usr/bin/env bash
# Trains the hybrid that the demo ships, launch/results/demo/model, in ROOT. Run the actions in this order:
#
#   bash launch/demo_recipe.sh data ROOT                documents of 64, 128 and 512 tokens for both phases, and their tokenizer
#   bash launch/demo_recipe.sh train ROOT [SETTING…]    16M tokens at a high learning rate, on one GPU
#   bash launch/demo_recipe.sh anneal ROOT [SETTING…]   3M tokens while the learning rate falls, on two CPU cores
#   bash launch/demo_recipe.sh export ROOT              ROOT/model, as launch/export.py writes it, in bf16
#   bash launch/demo_recipe.sh longer ROOT [SETTING…]   the shipped model at 2,048 tokens, four times the length it was
#                                                       trained on: as it is, under YaRN, and continued under YaRN;
#                                                       two CPU cores, about ten minutes
#
# Settings go to launch/pretrain.py. The scores and the machines are in launch/results/demo/model/provenance.json.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: bash launch/demo_recipe.sh data|train|anneal|export|longer ROOT [SETTING…]"
action=${1:?$usage} root=${2:?$usage}
shift 2
tokenizer=$root/train/64-tokenizer.json

# documents PHASE SEED LENGTH COUNT SETTING…: facts, each asked for later, among noise, as a Megatron dataset
documents() {
  local phase=$1 seed=$2 length=$3 count=$4
  shift 4
  python launch/prepare_data.py input=needles "output=$root/$phase/$length" "seed=$((seed + length))" \
    "needles.length=$length" "needles.documents=$count" "$@"
}

# phase PHASE SEED COUNT64 COUNT128 COUNT512 TOKENIZER: the shortest documents are learned from first, the longest teach distance
phase() {
  documents "$1" "$2" 64 "$3" "tokenizer=$6" 'needles.share=[0.5,1.0]'
  documents "$1" "$2" 128 "$4" "tokenizer=$tokenizer" 'needles.share=[0.15,1.0]' 'needles.facts=[1,4]' needles.questions_last=0.3
  documents "$1" "$2" 512 "$5" "tokenizer=$tokenizer" 'needles.share=[0.05,1.0]' 'needles.facts=[1,16]' needles.questions_last=0.5
}

# pretrain PHASE SETTING…: sequences of 512 tokens, of one document or of several in a row
pretrain() {
  local data=$root/$1
  shift
  python launch/job.py --nproc-per-node "$processes" launch/pretrain.py +model=demo_hybrid "data.tokenizer=$tokenizer" \
    "data.path=[0.3,$data/64,0.2,$data/128,0.5,$data/512]" "data.cache=$data/cache" train.seq_length=512 seed=3 "$@"
}

# continued NAME SETTING…: from the shipped weights at 2,048 tokens, with RoPE scaled by YaRN
continued() {
  local name=$1
  shift
  python launch/job.py --nproc-per-node 2 launch/pretrain.py +model=demo_hybrid "run_dir=$root/$name" \
    "checkpoint.resume=$root/shipped" checkpoint.allow_changes=true train.seq_length=2048 train.global_batch_size=4 \
    train.micro_batch_size=2 'model.rope_scaling={kind:yarn,factor:4,original_length:512}' "data.path=$root/longer/2048" \
    "data.tokenizer=$shipped/tokenizer.json" "data.cache=$root/data/cache" data.split=[98,2,0] evaluation.batches=2 "$@"
}

# needles NAME: into ROOT/needle-NAME
needles() {
  python launch/job.py --nproc-per-node 2 launch/needle.py "checkpoint=$root/$1" "output=$root/needle-$1" \
    'lengths=[2048]' trials=10 batch_size=10
}

shipped=launch/results/demo/model
case $action in
data)
  phase train 0 150000 50000 30000 bpe:768
  phase anneal 1000 16000 6000 4000 "$tokenizer"
  ;;
train)
  processes=1 pretrain train "run_dir=$root/first" train.precision=bf16 train.global_batch_size=64 \
    train.micro_batch_size=64 train.steps=1500 train.exit_step=501 data.split=[99,1,0] evaluation.interval=500 \
    evaluation.batches=2 elementwise=torch loss=torch "$@"
  python launch/export.py "checkpoint=$root/first" "output=$root/first-weights"
  ;;
anneal)
  python launch/import.py "weights=$root/first-weights" "output=$root/start" precision=fp32 "conf=$root/conf"
  processes=2 pretrain anneal "run_dir=$root/last" "checkpoint.resume=$root/start" train.precision=fp32 \
    train.global_batch_size=8 train.micro_batch_size=4 train.steps=700 optim.lr=2e-3 optim.warmup_steps=30 \
    data.split=[98,2,0] evaluation.batches=4 "$@"
  ;;
export)
  python launch/export.py "checkpoint=$root/last" "output=$root/fp32"
  python launch/import.py "weights=$root/fp32" "output=$root/bf16" precision=bf16 "conf=$root/conf"
  python launch/export.py "checkpoint=$root/bf16" "output=$root/model"
  ;;
longer)
  python launch/import.py "weights=$shipped" "output=$root/shipped" precision=fp32 "conf=$root/conf"
  documents longer 7 2048 1000 "tokenizer=$shipped/tokenizer.json" 'needles.share=[0.05,0.6]' 'needles.facts=[1,32]' \
    needles.questions_last=0.5
  as_they_are=(train.steps=1 optim.lr=1e-9 optim.warmup_steps=0)  # a checkpoint of the same weights, and its held-out loss
  unscaled='model.rope_scaling={kind:none,factor:null,original_length:null}'
  continued plain "${as_they_are[@]}" "$unscaled"
  continued scaled "${as_they_are[@]}"
  continued trained train.steps=60 optim.lr=5e-4 optim.warmup_steps=6 "$@"
  for name in shipped scaled trained; do needles "$name"; done
  ;;
*)
  echo "$usage" >&2
  exit 2
  ;;
esac
