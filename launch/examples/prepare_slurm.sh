#!/usr/bin/env bash
# Prepares data as a Slurm array, one part per task, then combines the parts; waits for both, and exits with the status:
#
#   betarank data tokenizer --config=FILE         # first, unless the config names a tokenizer
#   export SLURM_OPTIONS='--exclusive --mem=0 --time=12:00:00'
#   bash launch/examples/prepare_slurm.sh 16 --config=FILE [--config.KEY=VALUE ...]
#
# data.dir must be on a disk that all nodes share, or in a bucket. A task whose node fails is requeued, and resumes
# after its last finished shard. If a part fails, the parts aren't combined, and the status is 1. The same command then
# prepares only what is missing.
set -euo pipefail

case $1 in
  --part) exec betarank data prepare --part="$SLURM_ARRAY_TASK_ID/$2" --workers="$SLURM_CPUS_ON_NODE" "${@:3}" ;;
  --finish) exec betarank data finish "${@:2}" ;;
esac
parts=$1
shift
read -ra options <<<"${SLURM_OPTIONS:-}"
common=(--parsable --requeue --open-mode=append "${options[@]}")
array=$(sbatch "${common[@]}" --job-name=prepare --array="1-$parts" --output="${SLURM_LOGS:-prepare-%a.log}" \
  "$0" --part "$parts" "$@")
finish=$(mktemp)
trap 'rm -f "$finish"' EXIT
trap 'scancel "${array%%;*}" $(cut -d";" -f1 "$finish"); exit 143' TERM INT
# It is cancelled if a part fails.
sbatch "${common[@]}" --wait --job-name=prepare-finish --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
  --output="${SLURM_LOGS:-prepare-finish.log}" "$0" --finish "$@" >"$finish" &
code=0
wait $! || code=$?
if [ ! -s "$finish" ]; then # sbatch has refused it
  scancel "${array%%;*}"
elif [ "$code" = 0 ]; then # also if the job was cancelled before it ran
  scontrol show job "$(cut -d';' -f1 "$finish")" | grep -E 'JobState=COMPLET(ED|ING)' >/dev/null || {
    echo 'prepare_slurm.sh: the parts were not combined, or scontrol gave no answer; see the logs of the parts' >&2
    code=1
  }
fi
exit "$code"
