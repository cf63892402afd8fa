#!/usr/bin/env bash
# Starts one node of a multi-node job. Run the same command on every node, in any order.
#   HEAD=node1:29500 JOB_ID=7b-1 NNODES=4 launch/multinode.sh launch/pretrain.py +model=7b_hybrid run_dir=/shared/7b …
# torchrun numbers nodes and ranks in order of arrival. To restart a lost node, run the same command there: the others
# wait for it, and the run resumes from its last checkpoint. The node named by HEAD hosts the rendezvous: if it is lost,
# restart all nodes.
#
# On SIGTERM or SIGUSR1 the ranks save and stop, and this script exits with status 75 (EXIT_REQUEUE in
# s2train/errors.py), or with 128 + the signal's number under checkpoint.save=false.
#
#   HEAD            host:port of one of the nodes, reachable from all
#   JOB_ID          equal on all nodes, unique per job
#   NNODES          number of nodes (1)
#   NPROC_PER_NODE  processes per node (one per GPU)
#   MAX_RESTARTS    restarts of a node's ranks after a failure on any node (3)
#                   Failures that would repeat are not restarted: rejected settings, a diverged loss.
#   JOIN_TIMEOUT    seconds that the nodes wait for each other (900)
#   SAVE_SECONDS    after SIGTERM or SIGUSR1 until ranks are killed: up to two steps, and the save (240)
#   LOG_DIR         folder for the whole output of each rank; the console shows local rank 0 (runs/logs/JOB_ID)
#   PYTHON          interpreter (python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${HEAD:?is not set: host:port of one of the nodes}" "${JOB_ID:?is not set: a name that all nodes of this job share}"
python=${PYTHON:-python3} log_dir=${LOG_DIR:-runs/logs/$JOB_ID}

# --- NCCL. Variables set in the environment take precedence. See https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
# WARN reports failures; INFO also prints the chosen rings, network devices and versions: check these first.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Bootstrap and TCP traffic. NCCL uses the first interface that is up, which on many nodes is a container bridge or a
# management port. Set the right one (`ip -br addr`); gloo has its own variable.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0         # a prefix; ^docker,lo excludes some; =eth0 is exact
# InfiniBand or RoCE ports (`ibstat`); if unset, NCCL uses all active ones, including storage and management ports.
#   export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5               # a prefix; =mlx5_0:1 is one port exactly
# RoCE: index of the port's address (`show_gids` lists them); 3 is RoCE v2 over IPv4 on most nodes.
#   export NCCL_IB_GID_INDEX=3
# Time without a reply before NCCL gives up on a peer: 4.096 µs × 2^TIMEOUT × RETRY_CNT. 20 and 7: 30 s.
#   export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7                # large or lossy fabrics: 2 min
# NVLink SHARP (multicast), H100 and later: faster all-reduces within a node, at the cost of GPU memory. If fabric
# manager or a virtual machine doesn't support it, start-up fails in `NVLS`: disable it.
#   export NCCL_NVLS_ENABLE=0
# If start-up hangs: NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET, and NCCL_IB_DISABLE=1 to see whether TCP works.

# The process groups' timeout aborts a hanging collective; torch then writes what each rank was waiting for.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$log_dir/nccl_trace_rank_}
# Cache compiled kernels on the node's local disk: local rank 0 writes it, the others read it.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -un)}

# --tee copies the ranks' lines through the launcher's stdout: with buffering, a log would stay empty until 8 KB are
# collected, which a kill would lose.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank${rank}]: '
# launch/job.py is torchrun with the signals and exit statuses that schedulers need.
export PET_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-240}
mkdir -p "$log_dir/$(hostname)"
exec "$python" "$root/launch/job.py" \
    --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id "$JOB_ID" --rdzv-endpoint "$HEAD" --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-900}" \
    --log-dir "$log_dir/$(hostname)" --tee 3 --local-ranks-filter 0 "$@"
