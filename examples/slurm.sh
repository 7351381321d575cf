#!/bin/bash
# Encode a source in eight parts, each in a task of its own, on machines that see the same folders:
#
#   sbatch examples/slurm.sh SOURCE PARTS [options of latentprep encode]
#
# A task that was stopped, or failed, goes on where it was: sbatch --array=3,5 examples/slurm.sh … with the same
# arguments. When all are done: latentprep merge PARTS/part-* --out shards
#
#SBATCH --job-name=latentprep
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --output=latentprep-%A-%a.log
set -eu

parts=8 # as in --array; it stays 8 when only some tasks are submitted again
source=$1 folder=$2
shift 2

# Exit code 3: done, but some images could not be read. They are listed in the part's errors.jsonl.
latentprep encode "$source" "$@" --shard-of "$SLURM_ARRAY_TASK_ID/$parts" \
    --out "$folder/part-$SLURM_ARRAY_TASK_ID" || [ $? -eq 3 ]
