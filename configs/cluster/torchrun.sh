#!/bin/bash
# bash configs/cluster/torchrun.sh NODE HEAD_ADDRESS CONFIG RUN_FOLDER [options of fit]
# One fit over two nodes without SLURM: the same command on both, NODE 0 on the one that HEAD_ADDRESS names, 1 on the other.
# RUN_FOLDER lies on a file system that both see. PROCESSES is the number of GPUs of a node (4 unless set).
set -euo pipefail
if (( $# < 4 )); then
    sed -n '2,4p' "$0" >&2
    exit 2
fi
node=$1 head=$2 config=$3 run=$4
processes=${PROCESSES:-4}
shift 4
exec torchrun --nnodes 2 --node_rank "$node" --nproc_per_node "$processes" --master_addr "$head" --master_port 29500 \
    -m fusionlab fit --config "$config" --trainer.default_root_dir "$run" \
    --trainer.num_nodes 2 --trainer.devices "$processes" --trainer.strategy ddp "$@"
