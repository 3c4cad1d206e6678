#!/bin/bash
# bash configs/cluster/slurm.sh CONFIG RUN_FOLDER TASK...
# Submits one job per task into one run folder, then one job that fuses and scores, then one that tests a fused model.
# Tasks are names or mappings as in --data.tasks; give paths that all nodes see. Set FUSIONLAB_RULE for the last job.
set -euo pipefail
if (( $# < 3 )); then
    sed -n '2,4p' "$0" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
config=$1 run=$2
shift 2
all="[$(IFS=,; echo "$*")]"
mkdir -p "$run/logs"
submit() { sbatch --parsable --requeue --output="$run/logs/%x-%A_%a.log" "$@"; }

train=$(submit --array="0-$(($# - 1))" "$here/train.sbatch" "$config" "$run" "$@")
fuse=$(submit --dependency="afterok:$train" "$here/fuse.sbatch" "$config" "$run" "$all")
test=$(submit --dependency="afterok:$fuse" "$here/test.sbatch" "$config" "$run" "$all" "${FUSIONLAB_RULE:-metagpt}")
echo "train $train (array of $#), fuse $fuse, test $test: $run"
