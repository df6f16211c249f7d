#!/bin/sh
# Leave one sensor out: short trainings with all scenes and without each of three sensors, then the
# scores on those sensors' validation scenes. Every run can be stopped and goes on when this script
# is started again. About 70 minutes on one CPU core.
#   sh docs/recipes/leave-one-out.sh IMAGERY RUNS
set -e
images=$1 runs=$2 here=$(dirname "$0") root=$(dirname "$0")/../..
mkdir -p "$runs"
row() { grep ",$1," "$here/generic-scenes.csv"; }
names() { row "$1" | grep ",valid," | cut -d, -f1 | paste -sd, -; }
train() { # name of the run, sensor to leave out
    if [ ! -e "$runs/$1.h5" ]; then
        sed "/,$2,/s/,train,/,skip,/" "$here/generic-scenes.csv" > "$runs/$1.csv"
        uknowpan pack "$runs/$1.csv" --root "$images" -o "$runs/$1.h5"
    fi
    uknowpan train --stage fsa-s --data "$runs/$1.h5" --out "$runs/$1" --config "$here/short.toml" \
        --resume -j 1
}
compare() { # validation scenes, names of runs
    scenes=$1
    shift
    for run in "$@"; do set -- "$@" --model "$runs/$run/last.safetensors"; shift; done
    python "$root/tests/benchmarks/validate.py" "$runs/all.h5" --only "$scenes" "$@"
}
train all none
train without-gaofen-2 GaoFen-2
train without-quickbird QuickBird
train without-landsat-7 "Landsat-7 ETM+"
compare "$(names GaoFen-2)" all without-gaofen-2
compare "$(names QuickBird)" all without-quickbird
compare "$(names "Landsat-7 ETM+")" all without-landsat-7
# Sensors that none of the runs was trained on (WorldView-2 but for one MS of 100 x 100 pixels).
compare "$(names Pleiades),$(names SPOT-6),$(names WorldView-2),$(names "Landsat-8 OLI"),henan" \
    all without-gaofen-2 without-quickbird without-landsat-7
