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
#   logs [0|all]            follow the log of worker 0 or of all workers
#   stop                    ask the run to save and stop
#   delete                  delete the slice
#   check                   check the settings and this machine, and start nothing
#
# --dry_run   print the gcloud commands and run none
# --yes       don't ask before creating or deleting
# --delete    delete the slice when babysit ends, whatever the reason
#
# Settings, from the environment:
#   TPU_NAME TPU_PROJECT TPU_ZONE                             always required
#   TPU_TYPE=v5litepod-256 TPU_RUNTIME=v2-alpha-tpuv5-lite    required to create
#   TPU_SPOT=1 or TPU_RESERVED=1                              default: on demand
#   TPU_QUEUED=1                                              request a queued resource, which waits for capacity
#   TPU_SLICES=2                                              number of slices; more than 1 are always queued
#   TPU_NETWORK TPU_SUBNETWORK TPU_SERVICE_ACCOUNT TPU_LABELS=key=value,...
#   TPU_INTERNAL_IPS=1                                        no external addresses: run this inside the slice's network
#   TPU_MAX_HOURS, or TPU_MAX_DOLLARS with TPU_DOLLARS_PER_HOUR (price of all slices): the cap of one babysit
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
poll=${TPU_POLL:-30} # seconds between two polls of the slice, and before the first retry
slices=${TPU_SLICES:-1}
dry_run='' yes='' delete_after=''
created='' # set once babysit has a slice, which costs money

say() { echo "tpu.sh: $*" >&2; }
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
  else
    gcloud "$@"
  fi
}
place() { printf -- '--project=%s\n--zone=%s\n' "$TPU_PROJECT" "$TPU_ZONE"; }
reach() { place && printf '%s' "${TPU_INTERNAL_IPS:+--internal-ip}"; } # flags of ssh and scp
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
  need TPU_TYPE TPU_RUNTIME
  [ -z "${TPU_SPOT:-}" ] || [ -z "${TPU_RESERVED:-}" ] || die 'TPU_SPOT and TPU_RESERVED exclude each other'
  local flags
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
  if ! queued; then
    gc compute tpus tpu-vm create "$TPU_NAME" "${flags[@]}" "--version=$TPU_RUNTIME" --quiet
    return
  fi
  if [ "$slices" -gt 1 ]; then
    flags+=("--node-count=$slices" "--node-prefix=$TPU_NAME")
  else
    flags+=("--node-id=$TPU_NAME")
  fi
  gc compute tpus queued-resources create "$TPU_NAME" "${flags[@]}" "--runtime-version=$TPU_RUNTIME" --quiet
}

delete() {
  local flags
  mapfile -t flags < <(place)
  if queued; then
    gc compute tpus queued-resources delete "$TPU_NAME" "${flags[@]}" --force --quiet
  else
    gc compute tpus tpu-vm delete "$TPU_NAME" "${flags[@]}" --quiet
  fi
}

slice_state() { # READY, NONE, GONE (preempted or failed: delete it), BUSY (being created), or UNKNOWN
  local flags out
  mapfile -t flags < <(place)
  if queued; then
    flags=(queued-resources describe "$TPU_NAME" "${flags[@]}" '--format=value(state.state)')
  else
    flags=(tpu-vm describe "$TPU_NAME" "${flags[@]}" '--format=value(state)')
  fi
  if [ -n "$dry_run" ]; then
    gc compute tpus "${flags[@]}"
    return
  fi
  if ! out=$(gc compute tpus "${flags[@]}" 2>&1); then
    case $out in
      *NOT_FOUND* | *'not found'*) echo NONE ;;
      *) echo "UNKNOWN ${out##*$'\n'}" ;;
    esac
    return
  fi
  case ${out##*$'\n'} in
    READY | ACTIVE) echo READY ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED | SUSPENDING) echo "GONE ${out##*$'\n'}" ;;
    *) echo "BUSY ${out##*$'\n'}" ;;
  esac
}

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

# push sends a commit, so it needs git and a checkout of betarank itself, not a package inside another repository.
check_checkout() {
  local inside
  if ! inside=$(git -C "$here" rev-parse --show-prefix 2>/dev/null) || [ -n "$inside" ]; then
    die "push sends a git commit, and $here is not a git checkout; clone betarank and run its launch/tpu.sh"
  fi
}
push() { # sends the files of the current commit: no ignored file, nothing from the environment
  local folder code=0
  if [ -n "$dry_run" ]; then
    send betarank.tar.gz
    return
  fi
  check_checkout
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

# Sets `command` to what a verb runs on the workers. `betarank` is the one that setup installed there.
command_of() {
  case ${1:-} in
    train | rl | eval) command=(betarank "$@" --coordinator=auto) ;;
    run) command=("${@:2}") ;;
    *) die "'${1:-}' can't be run: train, rl, eval or run" ;;
  esac
  [ ${#command[@]} -gt 0 ] || die 'run: no command'
}
start() { worker_sh start "$(id_of "$@")" "$@"; }
id_of() { printf '%q ' "$@" | cksum | cut -d' ' -f1; } # identifies a command, so that workers can say which one runs

ask_state() { # before the first push a worker has no worker.sh, and no run
  on_workers all "[ ! -f betarank/launch/worker.sh ] && echo betarank-state none || bash betarank/launch/worker.sh state $1"
}
run_state() { # NONE, RUNNING, DONE, STOPPED, FAILED CODE, OTHER (another command runs), or UNREACHABLE
  local out lines
  if ! out=$(ask_state "$(id_of "$@")" 2>&1); then
    say "a worker can't be reached: ${out##*$'\n'}"
    echo UNREACHABLE
    return
  fi
  lines=$(grep -o 'betarank-state .*' <<<"$out" | sort -u | cut -d' ' -f2-)
  case $lines in # one line per distinct state
    *other*) echo OTHER ;;
    *failed*) echo "FAILED $(grep -m 1 failed <<<"$lines" | cut -d' ' -f2)" ;;
    none) echo NONE ;;
    *none* | *lost*) echo 'FAILED lost' ;; # the run is gone on some workers
    *running*) echo RUNNING ;;
    *stopped*) echo STOPPED ;;
    done) echo DONE ;;
    *) echo UNREACHABLE ;;
  esac
}

hours_allowed() {
  local cap=${TPU_MAX_HOURS:-}
  if [ -n "${TPU_MAX_DOLLARS:-}" ]; then
    need TPU_DOLLARS_PER_HOUR
    cap=$(awk -v h="${cap:-1e9}" -v m="$TPU_MAX_DOLLARS" -v p="$TPU_DOLLARS_PER_HOUR" \
      'BEGIN { d = m / p; print d < h ? d : h }')
  fi
  [ -n "$cap" ] || die 'babysit needs a cap: TPU_MAX_HOURS, or TPU_MAX_DOLLARS with TPU_DOLLARS_PER_HOUR'
  echo "$cap"
}
used_up() { awk -v s="$SECONDS" -v h="$1" 'BEGIN { exit !(s >= h * 3600) }'; }

# Runs when babysit ends for any reason: deletes the slice with --delete, else warns that it still costs money.
leave() {
  local code=$?
  trap - EXIT INT TERM
  if [ -n "$created" ] && [ -n "$delete_after" ]; then
    delete || say "error: $TPU_NAME could not be deleted and COSTS MONEY; launch/tpu.sh --yes delete"
  elif [ -n "$created" ]; then
    say "$TPU_NAME still exists and costs money; launch/tpu.sh --yes delete"
  fi
  exit "$code"
}

babysit() {
  local command cap state run wait=$poll failures=0 began='' unreachable=0 error
  command_of "$@"
  cap=$(hours_allowed)
  confirm "$(summary); for $cap hours at most: ${command[*]}"
  if [ -n "$dry_run" ]; then
    create && push && worker_sh setup && start "${command[@]}" && ask_state "$(id_of "${command[@]}")"
    [ -z "$delete_after" ] || delete
    return
  fi
  SECONDS=0
  trap leave EXIT
  trap 'say "asked to stop: the run saves and stops"; worker_sh stop || true; exit 143' TERM
  trap 'say "no longer watching; the run continues"; delete_after=""; exit 130' INT
  while true; do
    if used_up "$cap"; then
      say "the cap of $cap hours is reached: the run saves and stops"
      [ -z "$created" ] || worker_sh stop || true
      exit 4
    fi
    state=$(slice_state)
    case $state in
      READY) created=yes ;;
      NONE)
        say "creating $TPU_NAME"
        error=$(mktemp)
        if create 2> >(tee "$error" >&2); then
          created=yes wait=$poll
        else
          sleep 0.2 # until tee has written the file
          case $(tr '[:upper:]' '[:lower:]' <"$error") in
            *quota*) die 'the project has no quota for this slice; docs/tpu.md says how to request it' 3 ;;
            *permission_denied* | *'does not have permission'* | *invalid_argument* | *'unrecognized arguments'*)
              die 'the slice was refused, and another try would be refused too' 3 ;;
          esac
          say "no slice; next try in $wait s"
          sleep "$wait"
          wait=$(awk -v w="$wait" -v p="$poll" 'BEGIN { print w * 2 < p * 32 ? w * 2 : p * 32 }')
        fi
        rm -f "$error"
        continue
        ;;
      GONE*)
        created=yes
        say "the slice is gone (${state#GONE }): deleting and recreating it"
        delete || sleep "$wait"
        continue
        ;;
      *)
        [ "${state%% *}" = UNKNOWN ] && say "gcloud: ${state#UNKNOWN }" || created=yes
        sleep "$poll"
        continue
        ;;
    esac

    run=$(run_state "${command[@]}")
    [ "$run" = UNREACHABLE ] || unreachable=0
    if [ -z "$began" ]; then # a failure that an earlier babysit left behind doesn't count
      case $run in
        RUNNING) began=$SECONDS ;;
        FAILED*) run=NONE ;;
      esac
    fi
    case $run in
      RUNNING) sleep "$poll" ;;
      DONE)
        say 'done'
        exit 0
        ;;
      OTHER) die "$TPU_NAME runs another command; stop it with launch/tpu.sh stop, or choose another TPU_NAME" ;;
      UNREACHABLE) # normal on a new slice; if it lasts, a host is broken
        unreachable=$((unreachable + 1))
        if [ "$unreachable" -gt 5 ]; then
          say 'still unreachable: deleting and recreating the slice'
          delete || true
          unreachable=0
        fi
        sleep "$wait"
        ;;
      FAILED*)
        worker_sh log 20 || true
        [ "$run" != 'FAILED 2' ] || die 'the run refused its settings (exit 2), so it is not started again' 2
        [ $((SECONDS - began)) -lt 1800 ] || failures=0
        failures=$((failures + 1))
        [ "$failures" -le 3 ] || die "the run failed $failures times in a row (${run#FAILED })" 5
        say "the run failed (${run#FAILED }); next try in $wait s"
        sleep "$wait"
        began=$SECONDS
        { worker_sh stop && start "${command[@]}"; } || sleep "$wait"
        ;;
      NONE | STOPPED)
        began=$SECONDS
        { push && worker_sh setup && start "${command[@]}"; } || sleep "$wait"
        ;;
    esac
  done
}

logs() {
  local flags node worker count follow='tail -n 100 -F betarank-run/log'
  if [ "${1:-0}" != all ]; then
    TPU_NAME=$(nodes | head -n 1) slices=1 on_workers "${1:-0}" "$follow"
    return
  fi
  mapfile -t flags < <(place)
  trap 'kill $(jobs -p) 2>/dev/null || true' EXIT INT TERM
  for node in $(nodes); do # one ssh per worker, because gcloud's --worker=all prints nothing until it ends
    count=$(gc compute tpus tpu-vm describe "$node" "${flags[@]}" '--format=value(networkEndpoints.len())')
    [ -z "$dry_run" ] || { echo "$count"; count=1; }
    for ((worker = 0; worker < count; worker++)); do
      (TPU_NAME=$node slices=1 on_workers "$worker" "$follow" | sed -u "s/^/$node:$worker  /") &
    done
  done
  wait
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
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "TPU_SLICES must be 1 or more, got $slices"
case $verb in
  check) check_checkout ;;
  create)
    need TPU_TYPE TPU_RUNTIME
    confirm "creates $(summary)"
    create
    ;;
  delete)
    confirm "deletes $TPU_NAME in $TPU_ZONE of $TPU_PROJECT"
    delete
    ;;
  push) push ;;
  setup) worker_sh setup ;;
  train | rl | eval | run)
    command_of "$verb" "$@"
    start "${command[@]}"
    ;;
  babysit)
    need TPU_TYPE TPU_RUNTIME
    [ -n "$dry_run" ] || check_checkout
    babysit "$@"
    ;;
  logs) logs "$@" ;;
  status)
    slice_state
    ask_state ''
    ;;
  stop) worker_sh stop ;;
  *) die "$verb: no such verb; launch/tpu.sh help" ;;
esac
