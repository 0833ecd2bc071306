#!/usr/bin/env bash
# Runs one point of a sweep as a JobSet (jobset.yaml next to this file) and waits for it:
#
#   export IMAGE=... QUEUE=...            # the image of the Dockerfile; a LocalQueue of Kueue
#   betarank sweep --config=FILE --root=gs://BUCKET/DIR --parallel=4 --on='bash launch/examples/jobset.sh {name} {command}'
#
# A JobSet that exists already, since this script was killed while its job lived on, is waited for. If someone else
# deletes it, the script ends with status 1. While the cluster can't be reached, the script tries again; only before a
# JobSet was seen or created it gives up, after 20 polls (ten minutes). On SIGTERM the JobSet is deleted: its pods get
# SIGTERM and have ten minutes to save.
set -euo pipefail
name=$1 command=$2
: "${IMAGE:?IMAGE is not set}" "${QUEUE:?QUEUE is not set}"
here=$(cd "$(dirname "$0")" && pwd)

quoted() { # as a YAML string in single quotes
  local text=${1//\'/\'\'}
  printf "'%s'" "$text"
}
manifest() {
  local text
  text=$(cat "$here/jobset.yaml")
  text=${text//__NAME__/"$name"}
  text=${text//__QUEUE__/"$QUEUE"}
  text=${text//__IMAGE__/"$IMAGE"}
  printf '%s\n' "${text//__COMMAND__/"$(quoted "exec $command --coordinator=auto")"}"
}
if [ "${1:-}" = --print ]; then
  name=$2 command=$3
  manifest
  exit
fi

state() { # "is STATE", where STATE is empty while the job runs; "missing"; "unknown" if the cluster doesn't answer
  local found
  found=$(kubectl get jobset "$name" --ignore-not-found --output=jsonpath='is {.status.terminalState}') || found=unknown
  echo "${found:-missing}"
}
gone() { # gone FLAGS: deletes the JobSet
  for _ in {1..20}; do
    if kubectl delete jobset "$name" --ignore-not-found "$@"; then return; fi
    sleep "${POLL_S:-30}"
  done
  echo "jobset.sh: JobSet $name could not be deleted; kubectl's messages are above" >&2
}
trap 'gone --wait=true; exit 143' TERM INT

seen='' polls=0
while true; do
  case $(state) in
    unknown | missing)
      if [ -z "$seen" ] && [ "$((polls += 1))" -gt 20 ]; then
        echo "jobset.sh: JobSet $name could not be found or created; kubectl's messages are above" >&2
        exit 1
      fi
      ;;&
    unknown) ;;
    missing)
      if [ "$seen" ]; then
        echo "jobset.sh: JobSet $name is gone, but this script didn't delete it" >&2
        exit 1
      fi
      if manifest | kubectl create --filename=-; then seen=yes; fi
      ;;
    "is Completed")
      gone --wait=false
      exit 0
      ;;
    "is Failed")
      kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --tail=20 >&2 || true
      gone --wait=false # so that the next launch may try again
      exit 1
      ;;
    *) seen=yes ;;
  esac
  sleep "${POLL_S:-30}" &
  wait $! || true
done
