#!/bin/sh
# An array job of AWS Batch: N containers, each does its share.
#   sh aws-submit.sh QUEUE N
set -eu
queue=$1 size=$2
aws batch register-job-definition --cli-input-json "file://$(dirname "$0")/aws-job-definition.json"
aws batch submit-job --job-name sharpen --job-queue "$queue" --array-properties "size=$size" \
    --job-definition uknowpan-batch
