#!/usr/bin/env bash
# One node's part of a job over several: the same command on every node, in any order.
#   HEAD=node1:29500 JOB_ID=7b-1 NNODES=4 launch/multinode.sh launch/pretrain.py +model=7b_hybrid run_dir=/shared/7b …
# torchrun numbers nodes and ranks as they come. A node that was lost can be started again by the same command: the
# others wait for it, and the run goes on from its last checkpoint. The node that HEAD names keeps the rendezvous: if
# that one is lost, start all again.
#
# SIGTERM or SIGUSR1: the ranks save and stop, and this script ends with status 75 (EXIT_REQUEUE in s2train/errors.py),
# or with 128 + the signal's number under checkpoint.save=false.
#
#   HEAD            host:port of one of the nodes, reachable from all
#   JOB_ID          the same on all nodes, another for each job
#   NNODES          how many (1)
#   NPROC_PER_NODE  processes on each (one for each GPU)
#   MAX_RESTARTS    how often a node starts its ranks again after a failure, its own or another node's (3)
#                   Not after what would come again: settings that are refused, a loss that diverged.
#   JOIN_TIMEOUT    seconds that the nodes wait for each other (900)
#   SAVE_SECONDS    that ranks have to save and end after SIGTERM or SIGUSR1, then they are killed (240)
#   LOG_DIR         folder for each rank's output, whole; the console has local rank 0's (runs/logs/JOB_ID)
#   PYTHON          interpreter (python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${HEAD:?is not set: host:port of one of the nodes}" "${JOB_ID:?is not set: a name that all nodes of this job share}"
python=${PYTHON:-python3} log_dir=${LOG_DIR:-runs/logs/$JOB_ID}

# --- NCCL. What is set outside wins. See https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
# WARN names what fails; INFO also prints the chosen rings, network devices and versions: the first thing to look at.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Bootstrap and TCP traffic. NCCL takes the first interface that is up, which on many nodes is a container bridge or a
# management port. Name the right one (`ip -br addr`); gloo has a setting of its own.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0         # a prefix; ^docker,lo leaves some out; =eth0 is exact
# InfiniBand or RoCE ports (`ibstat`); without it NCCL takes all active ones, storage and management ports too.
#   export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5               # a prefix; =mlx5_0:1 is one port exactly
# RoCE: which of a port's addresses, `show_gids` lists them; 3 is RoCE v2 over IPv4 on most.
#   export NCCL_IB_GID_INDEX=3
# Seconds of silence on a link before NCCL gives a peer up: 4.096 µs × 2^TIMEOUT, times RETRY_CNT. 20 and 7: 30 s.
#   export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7                # large or lossy fabrics: 2 min
# NVLink SHARP (multicast), H100 and later: faster all-reduces within a node, for memory on each GPU. Where fabric
# manager or a virtual machine doesn't offer it, start-up fails in `NVLS`: turn it off.
#   export NCCL_NVLS_ENABLE=0
# If start-up hangs: NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET, and NCCL_IB_DISABLE=1 to see whether TCP works.

# A collective that hangs is ended by the process groups' time limit; then torch writes what each rank was waiting for.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$log_dir/nccl_trace_rank_}
# One hardware queue: kernels start in the order of the host's calls, so that Megatron's communication, called first,
# overlaps the matrix products that follow.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Compiled kernels on the node's own disk: local rank 0 fills it, the others read it.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -un)}

# --tee copies the ranks' lines through the launcher's stdout: buffered, a log would stay empty until 8 KB have gathered,
# and they would be lost with a kill.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank${rank}]: '
# launch/job.py is torchrun with the signals and statuses that schedulers want.
export PET_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-240}
mkdir -p "$log_dir/$(hostname)"
exec "$python" "$root/launch/job.py" \
    --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id "$JOB_ID" --rdzv-endpoint "$HEAD" --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-900}" \
    --log-dir "$log_dir/$(hostname)" --tee 3 --local-ranks-filter 0 "$@"
