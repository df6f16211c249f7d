#!/bin/bash
#SBATCH --job-name=sharpen
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
# Each task of the array does its share; --gpus-per-task=1 gives each a GPU.
#   sbatch slurm.sh scenes.csv OUT [options of batch]
set -euo pipefail
scenes=$1 out=$2
shift 2
srun uknowpan batch "$scenes" -o "$out" -j "${SLURM_CPUS_PER_TASK:-1}" "$@"
