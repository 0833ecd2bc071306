#!/usr/bin/env bash
# Runs each point of a sweep on one of this machine's GPUs:
#
#   export CARDS=4
#   betarank sweep --config=FILE --root=DIR --parallel=4 --on='bash launch/examples/cards.sh {slot} {command}'
#
# CARDS is the number of GPUs; by default, all in CUDA_VISIBLE_DEVICES or, if this isn't set, all that nvidia-smi lists.
# If CUDA_VISIBLE_DEVICES is set, for example by Slurm, only the GPUs in it are used. If --parallel is a multiple of
# CARDS, several points share a card; PER_CARD must then be their number, and divides the card's memory between them.
set -euo pipefail

slot=$1 command=$2 per_card=${PER_CARD:-1}
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
else
  mapfile -t visible < <(seq 0 $((${CARDS:-$(nvidia-smi --list-gpus | wc -l)} - 1)))
fi
cards=${CARDS:-${#visible[@]}}
if [ "$cards" -lt 1 ] || [ "$cards" -gt ${#visible[@]} ]; then
  echo "cards.sh: CARDS=$cards, but there are ${#visible[@]} GPUs; CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-}" >&2
  exit 2
fi
export CUDA_VISIBLE_DEVICES=${visible[slot % cards]}
if [ "$per_card" -gt 1 ]; then
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.$(printf %02d $((90 / per_card)))
  export XLA_PYTHON_CLIENT_MEM_FRACTION
fi
exec bash -c "exec $command"
