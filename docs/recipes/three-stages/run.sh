#!/bin/sh
# The runs behind docs/training.md: simulate, three stages, ablations. Every run can be stopped and
# goes on when this script is started again. About three hours on one CPU core.
#   sh docs/recipes/three-stages/run.sh IMAGERY RUNS
set -e
images=$1 runs=$2 here=$(dirname "$0")
mkdir -p "$runs"
pair() { echo "$images/$1_pan.tif;$images/$1_ms.tif"; }
if [ ! -e "$runs/pairs_train.h5" ]; then
    uknowpan simulate --pair "$(pair pairs/vhr_melbourne_2)" --pair "$(pair pairs/vhr_melbourne_3)" \
        --pair "$(pair pairs/vhr_melbourne_4)" --pair "$(pair pairs/spot6_cropland)" \
        --pair "$(pair pairs/pleiades_urban)" \
        --pair "$images/scenes/vhr_henan_4band/pan.tif;$images/scenes/vhr_henan_4band/ms.tif" \
        --coregister shift --max-value 4095 --stride 24 --split 70,30,0 -o "$runs/pairs.h5"
fi
if [ ! -e "$runs/qb_train.h5" ]; then
    set --
    for i in 1 2 3 4 5 6 7; do set -- "$@" --ms-only "$images/ms_only/quickbird_toulouse_$i.tif"; done
    uknowpan simulate --sensor QB "$@" --pan-weights 0.1,0.2,0.3,0.4 --stride 48 --split 85,15,0 \
        -o "$runs/qb.h5"
fi
train() { # stage, name, further options
    stage=$1 name=$2
    shift 2
    uknowpan train --stage "$stage" --data "$runs/pairs_train.h5" --data "$runs/qb_train.h5" \
        --out "$runs/$name" --resume -j 1 "$@"
}
train prior prior
train fsa-t teacher --prior "$runs/prior/best.safetensors" --config "$here/teacher.toml"
for file in pairs qb; do
    [ -e "$runs/${file}_cache.h5" ] || uknowpan distill-cache --teacher "$runs/teacher/best.safetensors" \
        --data "$runs/${file}_train.h5" -o "$runs/${file}_cache.h5" --resume -j 1
done
cache="--cache $runs/pairs_cache.h5 --cache $runs/qb_cache.h5"
train fsa-s student $cache --config "$here/student.toml"
train fsa-s student-alone --config "$here/student.toml"
for seed in 0 1; do
    for name in ablation-teacher dead-prior raw-residual; do
        train fsa-t "$name-$seed" --prior "$runs/prior/best.safetensors" --config "$here/$name-$seed.toml"
    done
    for name in ablation-student raw-uncertainty; do
        train fsa-s "$name-$seed" $cache --config "$here/$name-$seed.toml"
    done
    train fsa-s "ablation-alone-$seed" --config "$here/ablation-student-$seed.toml"
done
