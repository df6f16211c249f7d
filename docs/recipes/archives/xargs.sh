#!/bin/bash
# No batch at all: IN/ID_pan.tif and IN/ID_ms.tif, one `uknowpan sharpen` each, JOBS at a time.
#   JOBS=4 bash xargs.sh IN OUT [options of sharpen]
set -euo pipefail
in=$1 out=$2
shift 2
mkdir -p "$out"
one() { # PAN, folder, options
    local pan=$1 sharp=$2/$(basename "$1" _pan.tif)_sharp.tif
    shift 2
    [ -e "$sharp" ] || uknowpan sharpen "$pan" "${pan%_pan.tif}_ms.tif" -o "$sharp" --resume -q "$@"
}
export -f one
find "$in" -name '*_pan.tif' -print0 | sort -z |
    xargs -0 -r -P "${JOBS:-2}" -I '{}' bash -c 'one "$@"' one '{}' "$out" -j "${THREADS:-1}" "$@"
