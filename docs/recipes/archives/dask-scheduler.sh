#!/bin/bash
# A scheduler of one's own with WORKERS processes; on other machines start more workers with the
# same scheduler file (or address) while it runs.
#   WORKERS=4 bash dask-scheduler.sh scenes.csv OUT [options of batch]
set -euo pipefail
scenes=$1 out=$2
shift 2
mkdir -p "$out"
file=$(mktemp -d)/scheduler.json
dask scheduler --host "${HOST:-127.0.0.1}" --port 0 --no-dashboard --scheduler-file "$file" \
    2> "$out/dask-scheduler.log" &
scheduler=$!
dask worker --scheduler-file "$file" --nworkers "${WORKERS:-2}" --nthreads 1 --memory-limit 0 \
    --no-dashboard 2> "$out/dask-workers.log" &
workers=$!
trap 'kill $workers; wait $workers || true; kill $scheduler; wait' EXIT
until [ -s "$file" ]; do sleep 0.2; done
address=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$file")
uknowpan batch "$scenes" -o "$out" -j 1 --dask "$address" "$@"
