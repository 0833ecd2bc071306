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
#   the job is submitted again. On Ctrl-C a job that hasn't started is cancelled.
# - Two jobs of one point never run at once, even if this script was killed and its job lives on: they have the same name,
#   and --dependency=singleton makes the second one wait.
set -euo pipefail

if [ "$1" = --inside ]; then # in the job
  command=$2
  [ "${SLURM_NTASKS:-1}" -eq 1 ] || command+=' --coordinator=auto'
  exec srun --kill-on-bad-exit=0 bash -c "exec $command"
fi

name=$1 command=$2 asked='' cancelled='' signalled='' waiting=''
read -ra options <<<"${SLURM_OPTIONS:-}"
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT

# Asks the job to stop: cancels it if it is waiting; sends SIGTERM to its tasks if it runs, which save and exit with 143.
# Tries until Slurm has done so, because sbatch may not have printed the job's id yet, a job may have no tasks yet, and
# Slurm's controller may not answer for a while.
stop() {
  local id
  asked=yes interrupted=yes
  while kill -0 "$waiting" 2>/dev/null; do
    id=$(cut -d';' -f1 "$output/job") # a federation prints ID;CLUSTER
    if [ -n "$id" ]; then
      if squeue --noheader --states=PENDING --jobs="$id" --format=%i | grep . >/dev/null; then
        cancelled=yes
        scancel --state=PENDING "$id" || true
      fi
      if squeue --noheader --steps --jobs="$id" --format=%i | grep -x " *$id\.0" >/dev/null &&
        scancel --signal=TERM "$id"; then
        signalled=yes
        return 0 # a plain return in a trap would have the status from before the trap
      fi
    fi
    sleep 1
  done
}
trap stop TERM INT

while true; do
  sbatch --wait --parsable --job-name="$name" --dependency=singleton --requeue --open-mode=append --signal=TERM@600 \
    --output="${SLURM_LOGS:-slurm-%x.log}" "${options[@]}" "$0" --inside "$command" >"$output/job" &
  waiting=$!
  [ -z "$asked" ] || stop # the signal arrived before there was anything to stop
  while true; do
    interrupted='' code=0
    wait "$waiting" || code=$?
    [ -n "$interrupted" ] || break # otherwise a signal ended the wait, not the job
  done
  # sbatch ends with 0 if its job was cancelled before it ran.
  if [ "$code" = 0 ] && [ -n "$cancelled" ] && [ -z "$signalled" ]; then code=143; fi
  # 143: asked to stop and saved. If this script has not asked, it was the time limit.
  [ "$code" = 143 ] && [ -z "$asked" ] || exit "$code"
done
