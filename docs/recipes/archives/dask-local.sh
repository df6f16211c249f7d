#!/bin/sh
# A Dask cluster of processes on this machine, which ends with the command.
#   sh dask-local.sh scenes.csv OUT [options of batch]
set -eu
scenes=$1 out=$2
shift 2
uknowpan batch "$scenes" -o "$out" --dask local "$@"
