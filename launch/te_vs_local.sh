#!/usr/bin/env bash
# Compares transformer-engine with Megatron's own layers: the same steps from the same checkpoint with
# layer_backend=local, layer_backend=te, and FP8 linear layers. A second local run with other attention kernels shows how
# much two equivalent bf16 runs diverge.
#   launch/te_vs_local.sh SIZE OUTPUT [setting=value …]   e.g.
#   launch/te_vs_local.sh 125m runs/te train.steps=100 optim.warmup_steps=10 train.global_batch_size=8 train.micro_batch_size=4
set -euo pipefail
usage="usage: launch/te_vs_local.sh SIZE OUTPUT [setting=value …]"
size=${1:?$usage} output=${2:?$usage}
output=${output%.json}
shift 2
here=$(dirname "$0")
runs=runs/te-$(basename "$output")
pretrain=(python3 "$here/job.py" --standalone --nproc-per-node "${NPROC:-1}" "$here/pretrain.py" "+model=${size}_hybrid" tracking.log_interval=1 "$@")
# Saved with layer_backend=local, so that the runs also test loading across layer backends.
"${pretrain[@]}" "run_dir=$runs/start" layer_backend=local train.exit_step=1 profile.steps=null
start=$runs/start/checkpoints/iter_0000001
compared=("${pretrain[@]}" "checkpoint.resume=$start" checkpoint.save=false)
"${compared[@]}" "run_dir=$runs/local" layer_backend=local
"${compared[@]}" "run_dir=$runs/local_other_kernels" layer_backend=local attention_backend="${OTHER_KERNELS:-portable}"
"${compared[@]}" "run_dir=$runs/te" layer_backend=te
"${compared[@]}" "run_dir=$runs/te_fp8" layer_backend=te fp8=hybrid
python3 "$here/compare.py" "$output" "$runs"/{local,local_other_kernels,te,te_fp8} --command "launch/te_vs_local.sh $size $output $*"
python3 "$here/loss_gap.py" "$runs"/{local,local_other_kernels,te,te_fp8} --output "$output-loss-gap.json"
