#!/usr/bin/env bash
# Runs betarank on a TPU slice through gcloud. docs/tpu.md leads from an empty project to a run.
#
#   launch/tpu.sh [--dry_run] [--yes] [--delete] VERB [ARGUMENTS]
#
#   create                  create the slice (or several, TPU_SLICES)
#   push                    copy the files of the current commit to every worker
#   setup                   install Python and the packages on every worker, once
#   train|rl|eval ARGS      start `betarank train ARGS` on every worker, as one job that outlives ssh
#   run COMMAND...          start any other command in the same way
#   babysit VERB ARGS       create, push, setup and start; start again after a preemption, until the run is finished
#   status                  print the state of the slice and of the run
#   state                   print the state of the slice only
#   logs [0|all]            follow the log of worker 0 or of all workers
#   stop                    ask the run to save and stop; a babysit of it ends too
#   delete                  delete the slice
#   check                   check the settings and this machine, and start nothing
#   help                    print this text
#
# --dry_run   print the gcloud commands and run none
# --yes       don't ask before creating or deleting
# --delete    delete the slice when babysit ends, except after Ctrl-C or if it runs another command
#
# Settings, from the environment:
#   TPU_NAME TPU_PROJECT TPU_ZONE                             always required
#   TPU_TYPE=v5litepod-256 TPU_RUNTIME=v2-alpha-tpuv5-lite    required to create
#   TPU_SPOT=1 or TPU_RESERVED=1                              default: on demand
#   TPU_QUEUED=1                                              request a queued resource, which waits for capacity
#   TPU_SLICES=2                                              number of slices; more than 1 are always queued
#   TPU_NETWORK TPU_SUBNETWORK TPU_SERVICE_ACCOUNT TPU_LABELS=key=value,...
#   TPU_INTERNAL_IPS=1                                        no external addresses: run this inside the slice's network
#   TPU_FLAGS='--valid-until-duration=6h'                     more flags of gcloud's create, such as the server's limits
#   TPU_TRACK=alpha                                           create through `gcloud alpha`, for flags that only it has
#   TPU_ENV='LIBTPU_INIT_ARGS="--a --b" NAME=VALUE'           environment of train, rl, eval and run on the workers
#   TPU_SETUP='mountpoint -q DIR || sudo mount ...'           a command that setup runs on every worker, each time
#   TPU_MAX_HOURS, or TPU_MAX_DOLLARS with TPU_DOLLARS_PER_HOUR (price of all slices): the cap of one babysit, in time
#                                                             that the slice was READY
#   TPU_TRIES=5                                               failures in a row after which babysit ends
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
poll=${TPU_POLL:-30} # seconds between two polls of the slice, and before the first retry
slices=${TPU_SLICES:-1}
dry_run='' yes='' delete_after=''
call_limit='' call='' # seconds that one call of gcloud may take, which babysit sets; the process id of the last one

say() { echo "tpu.sh: $*" >&2 || true; } # the terminal may be closed
die() {
  say "error: $1"
  exit "${2:-2}"
}
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || die "$name is not set; launch/tpu.sh help lists the settings"
  done
}

# Calls gcloud, or prints the command in a dry run. Nothing else calls gcloud.
gc() {
  if [ -n "$dry_run" ]; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  elif [ -n "$call_limit" ]; then
    timeout --kill-after=30 "$call_limit" gcloud "$@" </dev/null &
    call=$!
    wait "$call" # in the background, so that a signal to this script is handled at once
  else
    gcloud "$@"
  fi
}
place() { printf -- '--project=%s\n--zone=%s\n' "$TPU_PROJECT" "$TPU_ZONE"; }
reach() { place && printf '%s' "${TPU_INTERNAL_IPS:+--internal-ip}"; } # flags of ssh and scp
words() { [ -z "$1" ] || xargs -n 1 printf '%s\n' <<<"$1"; } # splits at blanks outside quotes; nothing is expanded
queued() { [ -n "${TPU_QUEUED:-}" ] || [ "$slices" -gt 1 ]; }
nodes() {
  local i
  if [ "$slices" -eq 1 ]; then
    echo "$TPU_NAME"
    return
  fi
  for ((i = 0; i < slices; i++)); do echo "$TPU_NAME-$i"; done
}
chips() { # the number in the name of v5p, v4 and older types counts cores, two per chip
  local count=${TPU_TYPE##*-}
  case $TPU_TYPE in
    v5litepod-* | v5e-* | v6e-*) ;;
    *) count=$((count / 2)) ;;
  esac
  echo $((count * slices))
}
several_workers() { # more chips than one host has
  [ -n "${TPU_TYPE:-}" ] || return 1
  case $TPU_TYPE in
    v5litepod-* | v5e-* | v6e-*) [ "$(chips)" -gt 8 ] ;;
    *) [ "$(chips)" -gt 4 ] ;;
  esac
}

check_settings() {
  [[ $TPU_NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#TPU_NAME} -le 60 ]] ||
    die "TPU_NAME must be at most 60 lower-case letters, digits and hyphens and begin with a letter, got '$TPU_NAME'"
  [[ $TPU_ZONE =~ ^[a-z0-9-]+$ ]] || die "TPU_ZONE must be a zone such as us-west4-a, got '$TPU_ZONE'"
  [[ $TPU_PROJECT =~ ^[a-z0-9:.-]+$ ]] || die "TPU_PROJECT must be a project's id, not its title, got '$TPU_PROJECT'"
  [[ $slices =~ ^[1-9][0-9]{0,2}$ ]] || die "TPU_SLICES must be 1 or more, and at most 999, got $slices"
  [[ ${TPU_TYPE:-v5litepod-8} =~ ^[a-z0-9]+-[1-9][0-9]{0,5}$ ]] ||
    die "TPU_TYPE must be a type such as v5litepod-256, got '$TPU_TYPE'"
  [ -z "${TPU_SPOT:-}" ] || [ -z "${TPU_RESERVED:-}" ] || die 'TPU_SPOT and TPU_RESERVED exclude each other'
  local name variables
  for name in TPU_ENV TPU_FLAGS; do
    words "${!name:-}" >/dev/null 2>&1 || die "$name has a quote without an end: ${!name}"
  done
  mapfile -t variables < <(words "${TPU_ENV:-}")
  for name in "${variables[@]}"; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "TPU_ENV must be NAME=VALUE, with quotes around blanks, got '$name'"
  done
}

# What the cap is computed from. awk reads a text such as '$307', nan or inf as some number, and there would be no cap.
check_numbers() {
  local name number='^[0-9]{1,12}(\.[0-9]{1,12})?$'
  for name in TPU_MAX_HOURS TPU_MAX_DOLLARS TPU_DOLLARS_PER_HOUR; do
    [[ ${!name:-1} =~ $number && ${!name:-1} =~ [1-9] ]] ||
      die "$name must be a number above 0, such as 307.2, without units or commas, got '${!name}'"
  done
  for name in TPU_TRIES TPU_CALL_LIMIT TPU_ASK_LIMIT; do
    [[ ${!name:-1} =~ ^[1-9][0-9]{0,8}$ ]] || die "$name must be a whole number of 1 or more, got '${!name}'"
  done
  [[ $poll =~ $number ]] || die "TPU_POLL must be a number of seconds, got '$poll'"
  [ -z "${TPU_MAX_DOLLARS:-}" ] || need TPU_DOLLARS_PER_HOUR
}

# What would fail only once there is a slice, which costs money by then.
check_machine() {
  check_checkout
  check_agent
}
# push sends a commit, so it needs git and a checkout of betarank itself, not a package inside another repository.
check_checkout() {
  local inside
  if ! inside=$(git -C "$here" rev-parse --show-prefix 2>/dev/null) || [ -n "$inside" ]; then
    die "push sends a git commit, and $here is not a git checkout; clone betarank and run its launch/tpu.sh"
  fi
}
# gcloud refuses to copy to several workers if an ssh-agent runs that has keys, but not gcloud's own.
check_agent() {
  local key=$HOME/.ssh/google_compute_engine held fingerprint
  if ! several_workers || ! held=$(ssh-add -l 2>/dev/null); then return; fi
  [ -f "$key" ] ||
    die "gcloud has no ssh key yet, and needs it in your ssh-agent: ssh-keygen -t rsa -f $key && ssh-add $key"
  fingerprint=$(ssh-keygen -lf "$key" | cut -d' ' -f2)
  case $held in
    *"$fingerprint"*) ;;
    *) die "your ssh-agent doesn't hold gcloud's key, so gcloud would refuse to copy to several workers: ssh-add $key" ;;
  esac
}

confirm() { # prints what is about to be done and asks, except with --yes
  say "$1"
  [ -z "$dry_run$yes" ] || return 0
  [ -t 0 ] || die 'nothing was done: add --yes'
  local answer
  read -r -p 'Continue? [y/N] ' answer
  [ "$answer" = y ] || die 'nothing was done'
}
summary() {
  local kind='on demand' price='price not given (TPU_DOLLARS_PER_HOUR)'
  [ -z "${TPU_SPOT:-}" ] || kind=spot
  [ -z "${TPU_RESERVED:-}" ] || kind=reserved
  [ -z "${TPU_DOLLARS_PER_HOUR:-}" ] || price="\$$TPU_DOLLARS_PER_HOUR an hour"
  echo "$TPU_NAME: $slices x $TPU_TYPE ($(chips) chips, $kind) in $TPU_ZONE of $TPU_PROJECT, $price"
}

create() {
  local flags more gcloud=(compute tpus)
  mapfile -t flags < <(place)
  flags+=("--accelerator-type=$TPU_TYPE")
  [ -z "${TPU_SPOT:-}" ] || flags+=(--spot)
  [ -z "${TPU_RESERVED:-}" ] || flags+=(--reserved)
  [ -z "${TPU_NETWORK:-}" ] || flags+=("--network=$TPU_NETWORK")
  [ -z "${TPU_SUBNETWORK:-}" ] || flags+=("--subnetwork=$TPU_SUBNETWORK")
  [ -z "${TPU_SERVICE_ACCOUNT:-}" ] ||
    flags+=("--service-account=$TPU_SERVICE_ACCOUNT" --scopes=https://www.googleapis.com/auth/cloud-platform)
  [ -z "${TPU_LABELS:-}" ] || flags+=("--labels=$TPU_LABELS")
  [ -z "${TPU_INTERNAL_IPS:-}" ] || flags+=(--internal-ips)
  mapfile -t more < <(words "${TPU_FLAGS:-}")
  flags+=("${more[@]}")
  [ -z "${TPU_TRACK:-}" ] || gcloud=("$TPU_TRACK" "${gcloud[@]}")
  if ! queued; then
    gc "${gcloud[@]}" tpu-vm create "$TPU_NAME" "${flags[@]}" "--version=$TPU_RUNTIME" --quiet
    return
  fi
  if [ "$slices" -gt 1 ]; then
    flags+=("--node-count=$slices" "--node-prefix=$TPU_NAME")
  else
    flags+=("--node-id=$TPU_NAME")
  fi
  gc "${gcloud[@]}" queued-resources create "$TPU_NAME" "${flags[@]}" "--runtime-version=$TPU_RUNTIME" --quiet
}

delete() { # succeeds if the slice doesn't exist
  local flags delete=(tpu-vm delete "$TPU_NAME")
  mapfile -t flags < <(place)
  if queued; then delete=(queued-resources delete "$TPU_NAME") flags+=(--force); fi
  gc compute tpus "${delete[@]}" "${flags[@]}" --quiet || [ "$(slice_state)" = NONE ]
}

describe() { # describe FIELD: of a queued resource, of a slice
  local flags
  mapfile -t flags < <(place)
  if queued; then
    gc compute tpus queued-resources describe "$TPU_NAME" "${flags[@]}" "--format=value($1)"
  else
    gc compute tpus tpu-vm describe "$TPU_NAME" "${flags[@]}" "--format=value($2)"
  fi
}
# READY, NONE, GONE (preempted or failed: delete it), BUSY (being created or deleted, and not billed), ODD (billed, but
# its workers may not answer), or UNKNOWN (can't be read).
slice_state() {
  local out missing="NOT_FOUND: .*/(nodes|queuedResources)/$TPU_NAME([^-a-z0-9]|\$)" # the server's status and resource
  if [ -n "$dry_run" ]; then
    describe state.state state
    return
  fi
  if ! out=$(describe state.state state 2>&1); then
    # gcloud's hints may follow the line with ERROR. If python or the shell failed, there is none.
    if [[ $out =~ $missing ]]; then echo NONE; else echo "UNKNOWN $(first_error "$out")"; fi
    return 0 # a plain return in a trap would have the status from before the trap
  fi
  case ${out##*$'\n'} in
    READY | ACTIVE) echo READY ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED | SUSPENDING) echo "GONE ${out##*$'\n'}" ;;
    CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | DELETING) echo "BUSY ${out##*$'\n'}" ;;
    *) echo "ODD ${out##*$'\n'}" ;; # REPAIRING, HIDDEN, UNKNOWN after a failed repair, ...
  esac
}
first_error() { { grep -m 1 ERROR <<<"$1" || tail -n 1 <<<"$1"; } | cut -c1-500; }

# Runs a command line on one worker or on all workers of every slice. gcloud passes it on as one quoted argument.
on_workers() {
  local worker=$1 command=$2 node flags
  mapfile -t flags < <(reach)
  for node in $(nodes); do
    gc compute tpus tpu-vm ssh "$node" "${flags[@]}" "--worker=$worker" "--command=$command" --quiet || return 1
  done
}
worker_sh() { # runs launch/worker.sh on every worker
  local command
  command="bash betarank/launch/worker.sh$(printf ' %q' "$@")"
  on_workers all "$command"
}
setup() {
  if [ -n "${TPU_SETUP:-}" ]; then worker_sh setup "$TPU_SETUP"; else worker_sh setup; fi
}

push() { # sends the files of the current commit: no ignored file, nothing from the environment
  local folder code=0
  if [ -n "$dry_run" ]; then
    send betarank.tar.gz
    return
  fi
  folder=$(mktemp -d)
  send "$folder/betarank.tar.gz" || code=1
  rm -rf "$folder"
  return "$code"
}
send() {
  local commit=COMMIT flags node
  if [ -z "$dry_run" ]; then
    commit=$(git -C "$here" rev-parse --short=12 HEAD) || return 1
    [ -z "$(git -C "$here" status --porcelain)" ] || say "uncommitted changes are not sent; $commit is"
    git -C "$here" archive --format=tar.gz --output="$1" HEAD || return 1
  fi
  mapfile -t flags < <(reach)
  for node in $(nodes); do
    gc compute tpus tpu-vm scp "$1" "$node:betarank.tar.gz" "${flags[@]}" --worker=all --quiet || return 1
  done
  on_workers all "rm -rf betarank.new && mkdir betarank.new && tar -xzf betarank.tar.gz -C betarank.new && \
echo $commit > betarank.new/.commit && rm -rf betarank && mv betarank.new betarank"
}

# Sets `command` to what a verb runs on the workers. `betarank` is the one that setup installed there. Compiled programs
# are cached in the bucket of the workdir, so that a restart doesn't compile again; TPU_ENV may name another place.
command_of() {
  local variables bucket argument
  mapfile -t variables < <(words "${TPU_ENV:-}")
  case ${1:-} in
    train | rl | eval)
      command=(betarank)
      for argument; do # `--workdir DIR` becomes --workdir=DIR, which worker.sh looks for
        case "${command[-1]} $argument" in
          '--workdir '[!-]* | '--checkpoint '[!-]*) command[-1]+="=$argument" ;;
          *) command+=("$argument") ;;
        esac
      done
      command+=(--coordinator=auto)
      bucket=$(grep -oE -m 1 -- '^--(workdir|checkpoint)=gs://[^/]+' < <(printf '%s\n' "${command[@]}") || true)
      [ -z "$bucket" ] || variables=("JAX_COMPILATION_CACHE_DIR=${bucket#*=}/jax-compilation-cache" "${variables[@]}")
      ;;
    run) command=("${@:2}") ;;
    *) die "'${1:-}' can't be run: train, rl, eval or run" ;;
  esac
  [ ${#command[@]} -gt 0 ] || die 'run: no command'
  [ ${#variables[@]} -eq 0 ] || command=(env "${variables[@]}" "${command[@]}")
}
start() { worker_sh start "$(id_of "$@")" "$@"; }
id_of() { printf '%q ' "$@" | cksum | cut -d' ' -f1; } # identifies a command, so that workers can say which one runs

ask_state() { # before the first push a worker has no worker.sh, and no run
  on_workers all "[ ! -f betarank/launch/worker.sh ] && echo betarank-state none || bash betarank/launch/worker.sh state $1"
}

logs() {
  local follow='tail -n 100 -F betarank-run/log' key=$$
  if [ "${1:-0}" != all ]; then
    TPU_NAME=$(nodes | head -n 1) slices=1 on_workers "${1:-0}" "$follow"
    return
  fi
  while true; do # gcloud's --worker=all prints nothing until it ends, so new lines are asked for again and again
    worker_sh news "$key" || true
    [ -z "$dry_run" ] || return 0
    sleep "$poll"
  done
}

while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry_run | --dry-run) dry_run=yes ;;
    --yes) yes=yes ;;
    --delete) delete_after=yes ;;
    *) die "$1: no such flag; flags come before the verb" ;;
  esac
  shift
done
verb=${1:-help}
[ $# -eq 0 ] || shift
case $verb in
  help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
need TPU_NAME TPU_PROJECT TPU_ZONE
check_settings
[ -n "$dry_run" ] || command -v gcloud >/dev/null || die 'gcloud is not installed'
case $verb in
  create | babysit | check)
    need TPU_TYPE TPU_RUNTIME
    check_numbers
    ;;&
  create | push | babysit | check) [ -n "$dry_run" ] || check_machine ;;
esac
case $verb in
  check) ;;
  create)
    confirm "creates $(summary)"
    create
    ;;
  delete)
    confirm "deletes $TPU_NAME in $TPU_ZONE of $TPU_PROJECT"
    delete
    ;;
  push) push ;;
  setup) setup ;;
  train | rl | eval | run)
    command_of "$verb" "$@"
    start "${command[@]}"
    ;;
  babysit)
    # shellcheck source=launch/babysit.sh
    . "$here/launch/babysit.sh"
    babysit "$@"
    ;;
  logs) logs "$@" ;;
  state) slice_state ;;
  status)
    slice_state
    ask_state ''
    ;;
  stop) worker_sh stop ;;
  *) die "$verb: no such verb; launch/tpu.sh help" ;;
esac
