#!/usr/bin/env bash
# Runs one point of a sweep as a managed job of SkyPilot (sky.yaml next to this file) and waits for it:
#
#   betarank sweep --config=FILE --root=gs://BUCKET/DIR --parallel=4 --on='bash launch/examples/sky.sh {name} {command}'
#
# On SIGTERM the job is cancelled; the run resumes from its last checkpoint when the sweep is started again.
set -euo pipefail
name=$1 command=$2
here=$(cd "$(dirname "$0")" && pwd)
waiting=''
stop() { # more than once, because the job may not have been submitted yet
  while kill -0 "$waiting" 2>/dev/null; do
    sky jobs cancel --yes --name "$name" || true
    sleep "${POLL_S:-10}"
  done
  exit 143
}
trap stop TERM INT

# Prints the log until the job has ended, and exits with its status.
sky jobs launch --yes --name "$name" --env "COMMAND=$command" "$here/sky.yaml" &
waiting=$!
wait "$waiting"
