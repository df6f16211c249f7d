#!/bin/sh
# One process per GPU of this machine, each with its share of the scenes.
#   GPUS=4 sh torchrun.sh scenes.csv OUT [options of batch]
set -eu
scenes=$1 out=$2
shift 2
torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m uknowpan_cli batch "$scenes" -o "$out" "$@"
