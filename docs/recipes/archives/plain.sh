#!/bin/sh
# One process after another on one machine. Started again, it goes on where it was stopped.
#   sh plain.sh scenes.csv OUT [options of batch]
set -eu
scenes=$1 out=$2
shift 2
uknowpan batch "$scenes" -o "$out" "$@"
