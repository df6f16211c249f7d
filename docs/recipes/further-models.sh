#!/bin/sh
# The trainings behind the table of docs/models-further.md: both further models on the data, the
# steps, batch and seed of the U-Know student `student-alone`. Every run can be stopped and goes on
# when this script is started again. About 20 minutes each on one CPU core.
#   sh docs/recipes/three-stages/run.sh IMAGERY RUNS     # first: the data and `student-alone`
#   sh docs/recipes/further-models.sh RUNS
set -e
runs=$1
for model in pan-crafter ssdiff; do
    uknowpan train --model "$model" --data "$runs/pairs_train.h5" --data "$runs/qb_train.h5" \
        --out "$runs/$model" --resume -j 1
done
printf '[options]\npan_weight = 0.0\n' > "$runs/without-mars.toml"
uknowpan train --model pan-crafter --data "$runs/pairs_train.h5" --data "$runs/qb_train.h5" \
    --out "$runs/pan-crafter-alone" --config "$runs/without-mars.toml" --resume -j 1
