#!/usr/bin/env bash
# Measures which layers should be dense, and whether different offsets per head help. Trains one small model with a fixed
# number of tokens and two seeds: all dense; all sparse with equal (homogeneous) and with shifted heads; dense layers first,
# last and interleaved; one dense layer in 3, 7 and 17.
#   launch/dense_layers.sh FOLDER [setting=value …]     e.g. launch/dense_layers.sh runs/sweeps/layouts hydra.launcher.n_jobs=3
# FOLDER/sweep.{csv,png} contain losses and tokens/s. After an interruption the same command resumes.
set -euo pipefail
usage="usage: launch/dense_layers.sh FOLDER [setting=value …]"
folder=${1:?$usage}
shift
launch=$(dirname "$0")
common=(+model=30m_hybrid seed=1,2 hydra.sweep.dir="$folder" "$@")
python3 "$launch/pretrain.py" -m "${common[@]}" layout.layers=D,S,D4S13,S13D4,D1S4x3-D1S1,D1S2x5-D1S1,D1S6x2-D1S2,D1S16
python3 "$launch/pretrain.py" -m "${common[@]}" layout.layers=S schedule=homogeneous layout.allow_partial_coverage=true
