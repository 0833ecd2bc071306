#!/usr/bin/env bash
# Runs one point of a sweep as a Slurm job and waits for it:
#
#   export SLURM_OPTIONS='--nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=2-00:00:00'
#   betarank sweep --config=FILE --root=DIR --parallel=8 --on='bash launch/examples/slurm.sh {name} {command}'
#
# The root, and betarank itself, must be on a disk that all nodes share; the root may also be in a bucket. With several
# tasks, one process per task, they join into one run. SLURM_OPTIONS is passed to sbatch.
#
# - A job whose node fails is requeued by Slurm, and the run resumes from its last checkpoint.
# - Ten minutes before the time limit, and on Ctrl-C of the sweep, the run is asked to save and stop. After a time limit
#   the job is submitted again.
# - Two jobs of one point never run at once, even if this script was killed and its job lives on: they have the same name,
#   and --dependency=singleton makes the second one wait.
set -euo pipefail

if [ "$1" = --inside ]; then # in the job
  command=$2
  [ "${SLURM_NTASKS:-1}" -eq 1 ] || command+=' --coordinator=auto'
  exec srun --kill-on-bad-exit=0 bash -c "exec $command"
fi

name=$1 command=$2 asked=''
read -ra options <<<"${SLURM_OPTIONS:-}"
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT

stop() { # srun's tasks get the signal, save and exit with 143; then the job ends
  asked=yes
  scancel --signal=TERM "$(cat "$output/job")" || true
}
trap stop TERM INT

while true; do
  sbatch --wait --parsable --job-name="$name" --dependency=singleton --requeue --open-mode=append --signal=TERM@600 \
    --output="${SLURM_LOGS:-slurm-%x.log}" "${options[@]}" "$0" --inside "$command" >"$output/job" &
  waiting=$! code=0
  wait "$waiting" || code=$?
  while kill -0 "$waiting" 2>/dev/null; do # a signal ended the wait, not the job
    code=0
    wait "$waiting" || code=$?
  done
  # 143: asked to stop and saved. If this script has not asked, it was the time limit.
  [ "$code" = 143 ] && [ -z "$asked" ] || exit "$code"
done
