#!/bin/sh
# One process per GPU of this machine, each with its share of the scenes.
#   GPUS=4 sh torchrun.sh scenes.csv OUT [options of batch]
set -eu
scenes=$1 out=$2
shift 2
# torchrun stops all processes when one fails; one that ends with 7 has done its share.
torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --no-python \
    sh -c 'uknowpan batch "$@" || [ $? = 7 ]' sh "$scenes" -o "$out" "$@"
uknowpan batch --report "$out"
