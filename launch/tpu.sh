#!/usr/bin/env bash
# A TPU slice from first to last, through gcloud.           docs/tpu.md goes from an empty project to a run
#
#   launch/tpu.sh [--dry_run] [--yes] [--delete] VERB [ARGUMENTS]
#
#   create                      the slice (or several, TPU_SLICES)        delete    the same, away
#   push                        this commit's files to every worker       setup     Python and packages there, once
#   train|rl|eval ARGS          betarank train ARGS on every worker, as one job; lives on when ssh doesn't
#   run COMMAND...              any command, the same way
#   babysit VERB ARGS           create, push, setup and run; again after a preemption, until done or TPU_MAX_...
#   logs [0|all]   status   stop        stop asks the run to save and end
#
# --dry_run prints the gcloud commands and runs none. --yes answers the question before what costs or deletes.
# --delete deletes the slice when babysit is through, however that ends.
#
# Settings, from the environment:
#   TPU_NAME TPU_PROJECT TPU_ZONE                  needed always
#   TPU_TYPE=v5litepod-256 TPU_RUNTIME=v2-alpha-tpuv5-lite       needed to create
#   TPU_SPOT=1 | TPU_RESERVED=1                    otherwise on demand
#   TPU_QUEUED=1                                   a queued resource: waits for capacity. TPU_SLICES=N always is one
#   TPU_NETWORK TPU_SUBNETWORK TPU_SERVICE_ACCOUNT TPU_LABELS=key=value,...
#   TPU_INTERNAL_IPS=1                             no external addresses: run this from inside the slice's network
#   TPU_MAX_HOURS, or TPU_MAX_DOLLARS with TPU_DOLLARS_PER_HOUR (of all slices): what one babysit may use
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
poll=${TPU_POLL:-30} # seconds between looks at the slice; the first wait after a failure
slices=${TPU_SLICES:-1}
dry_run='' yes='' delete_after=''
created='' # whether this babysit has a slice to answer for

say() { echo "tpu.sh: $*" >&2; }
die() {
  say "error: $1"
  exit "${2:-2}"
}
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || die "$name is not set; see the head of launch/tpu.sh"
  done
}

# All calls of gcloud go through here.
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
reach() { place && printf '%s' "${TPU_INTERNAL_IPS:+--internal-ip}"; } # of ssh and scp
queued() { [ -n "${TPU_QUEUED:-}" ] || [ "$slices" -gt 1 ]; }
nodes() {
  local i
  if [ "$slices" -eq 1 ]; then
    echo "$TPU_NAME"
    return
  fi
  for ((i = 0; i < slices; i++)); do echo "$TPU_NAME-$i"; done
}
chips() { # a type of v4, v5p and older counts cores, two a chip
  local count=${TPU_TYPE##*-}
  case $TPU_TYPE in
    v5litepod-* | v5e-* | v6e-*) ;;
    *) count=$((count / 2)) ;;
  esac
  echo $((count * slices))
}

confirm() { # prints what is about to be done; goes on with --yes, or where a person at a terminal says so
  say "$1"
  [ -z "$dry_run$yes" ] || return 0
  [ -t 0 ] || die 'nothing was done: add --yes'
  local answer
  read -r -p 'Go on? [y/N] ' answer
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

slice_state() { # READY, NONE, GONE (preempted or failed: delete it), BUSY (on its way), or UNKNOWN
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

# Runs a command line on a worker, or on all, of every slice. What reaches the worker's shell is one quoted argument.
on_workers() {
  local worker=$1 command=$2 node flags
  mapfile -t flags < <(reach)
  for node in $(nodes); do
    gc compute tpus tpu-vm ssh "$node" "${flags[@]}" "--worker=$worker" "--command=$command" --quiet || return 1
  done
}
worker_sh() { # worker_sh VERB ARGUMENTS: launch/worker.sh on every worker
  local command
  command="bash betarank/launch/worker.sh$(printf ' %q' "$@")"
  on_workers all "$command"
}

push() { # what git has of this commit and nothing else: no ignored file, nothing from the environment
  local folder code=0
  folder=$(mktemp -d)
  send "$folder/betarank.tar.gz" || code=1
  rm -rf "$folder"
  return "$code"
}
send() {
  local commit flags node
  commit=$(git -C "$here" rev-parse --short=12 HEAD) || return 1
  [ -z "$(git -C "$here" status --porcelain)" ] || say "changes that aren't committed stay here; $commit is sent"
  git -C "$here" archive --format=tar.gz --output="$1" HEAD || return 1
  mapfile -t flags < <(reach)
  for node in $(nodes); do
    gc compute tpus tpu-vm scp "$1" "$node:betarank.tar.gz" "${flags[@]}" --worker=all --quiet || return 1
  done
  on_workers all "rm -rf betarank.new && mkdir betarank.new && tar -xzf betarank.tar.gz -C betarank.new && \
echo $commit > betarank.new/.commit && rm -rf betarank && mv betarank.new betarank"
}

# The command of a verb: train ARGS is betarank train ARGS. `betarank` is the one that setup installed.
command_of() {
  case ${1:-} in
    train | rl | eval) command=(betarank "$@" --coordinator=auto) ;;
    run) command=("${@:2}") ;;
    *) die "'${1:-}' can't be run: train, rl, eval or run" ;;
  esac
  [ ${#command[@]} -gt 0 ] || die 'run: no command'
}
start() { worker_sh start "$(id_of "$@")" "$@"; }
id_of() { printf '%q ' "$@" | cksum | cut -d' ' -f1; } # tells whose run a worker is at

ask_state() { # a worker that nothing was pushed to yet is at nothing
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
  case $lines in # a line for each different state
    *other*) echo OTHER ;;
    *failed*) echo "FAILED $(grep -m 1 failed <<<"$lines" | cut -d' ' -f2)" ;;
    none) echo NONE ;;
    *none* | *lost*) echo 'FAILED lost' ;; # some workers have lost what others still run
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

# How babysit ends, always: the slice is deleted if that was asked for, else it is said that it costs money.
leave() {
  local code=$?
  trap - EXIT INT TERM
  if [ -n "$created" ] && [ -n "$delete_after" ]; then
    delete || say "error: $TPU_NAME could not be deleted and COSTS MONEY; launch/tpu.sh --yes delete"
  elif [ -n "$created" ]; then
    say "$TPU_NAME is still there and costs money; launch/tpu.sh --yes delete"
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
  trap 'say "asked to end: the run saves and stops"; worker_sh stop || true; exit 143' TERM
  trap 'say "no longer watching; the run goes on"; delete_after=""; exit 130' INT
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
          sleep 0.2 # for tee
          case $(tr '[:upper:]' '[:lower:]' <"$error") in
            *quota*) die 'there is no quota for this slice: docs/tpu.md says how to ask for it' 3 ;;
            *permission_denied* | *'does not have permission'* | *invalid_argument* | *'unrecognized arguments'*)
              die 'the slice is refused, and would be again' 3 ;;
          esac
          say "no slice; again in $wait s"
          sleep "$wait"
          wait=$(awk -v w="$wait" -v p="$poll" 'BEGIN { print w * 2 < p * 32 ? w * 2 : p * 32 }')
        fi
        rm -f "$error"
        continue
        ;;
      GONE*)
        created=yes
        say "the slice is gone (${state#GONE }): it is deleted and made anew"
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
    if [ -z "$began" ]; then # what an earlier babysit left: a failure of its code is no reason to stop this one
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
      OTHER) die "$TPU_NAME is at another command; launch/tpu.sh stop, or another TPU_NAME" ;;
      UNREACHABLE) # a fresh slice takes a while; one that stays so has a broken host
        unreachable=$((unreachable + 1))
        if [ "$unreachable" -gt 5 ]; then
          say 'still unreachable: it is deleted and made anew'
          delete || true
          unreachable=0
        fi
        sleep "$wait"
        ;;
      FAILED*)
        worker_sh log 20 || true
        [ "$run" != 'FAILED 2' ] || die 'the run was refused (exit 2): nothing is tried again' 2
        [ $((SECONDS - began)) -lt 1800 ] || failures=0
        failures=$((failures + 1))
        [ "$failures" -le 3 ] || die "the run ended badly $failures times in a row (${run#FAILED })" 5
        say "the run ended badly (${run#FAILED }); again in $wait s"
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
  for node in $(nodes); do # one ssh a worker: gcloud's --worker=all shows nothing until its end
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
    --dry_run) dry_run=yes ;;
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
