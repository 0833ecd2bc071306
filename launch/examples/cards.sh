#!/usr/bin/env bash
# Runs each point of a sweep on one of this machine's GPUs:
#
#   export CARDS=4
#   betarank sweep --config=FILE --root=DIR --parallel=4 --on='bash launch/examples/cards.sh {slot} {command}'
#
# CARDS is the number of GPUs; by default, all that nvidia-smi lists. If --parallel is a multiple of CARDS, several points
# share a card; PER_CARD must then be their number, and divides the card's memory between them.
set -euo pipefail

slot=$1 command=$2 per_card=${PER_CARD:-1}
cards=${CARDS:-$(nvidia-smi --list-gpus | wc -l)}
export CUDA_VISIBLE_DEVICES=$((slot % cards))
if [ "$per_card" -gt 1 ]; then
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.$(printf %02d $((90 / per_card)))
  export XLA_PYTHON_CLIENT_MEM_FRACTION
fi
exec bash -c "exec $command"
