#!/usr/bin/env bash
# The part of launch/tpu.sh that runs on each worker of a slice, in the home folder.
#
#   setup [COMMAND]       install Python and the packages of launch/lock into betarank-venv, unless they are there; run COMMAND
#   start ID COMMAND...   start a command in a tmux session, which outlives ssh; its output goes to betarank-run/log
#   state ID              print betarank-state none|running|done|stopped|asked|failed CODE|lost|other
#   stop ID               send SIGTERM, on which a run saves and stops; wait until it has ended
#   log [LINES]           print the end of the log
#   news KEY              print what was added to the log since the last `news KEY`, with the worker's name on each line
#
# If the command has a --workdir=DIR, the end of the log is copied to WORKDIR/hosts/WORKER.out every few minutes and at the
# end: it outlives the slice there.
#
# ID identifies the command that is meant: the state `other` means that another command runs, and `stop` doesn't stop
# another command. An empty ID matches any; `stop` then leaves a mark, and the state is `asked` until the next start.
# A command that ends with status 130 (Ctrl-C) or 143 (SIGTERM) was asked to stop: it isn't done, and hasn't failed.
set -euo pipefail

tree=$(cd "$(dirname "$0")/.." && pwd)
home=$(dirname "$tree")
run=$home/betarank-run venv=$home/betarank-venv lock=$tree/launch/lock
grace=${STOP_GRACE_S:-600} # a checkpoint of a large model takes minutes

log_every=${LOG_EVERY_S:-300}

keep_log() { # keep_log WORKDIR: copies the last megabyte, to a bucket too
  local copy='import sys; from etils import epath; path = epath.Path(sys.argv[1])
path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(sys.stdin.buffer.read())'
  tail -c 1000000 "$run/log" | timeout 120 "$venv/bin/python" -P -c "$copy" "$1/hosts/$(hostname).out" ||
    echo "worker.sh: the log could not be copied to $1" >>"$run/log"
}
alive() { # the command, or `child`, which still copies the log
  [ -f "$run/pid" ] && [ ! -f "$run/exit" ] && { kill -0 "$(cat "$run/pid")" || kill -0 "$(cat "$run/child")"; } 2>/dev/null
}

case $1 in
  setup)
    wanted=$(cat "$tree/setup.py" "$lock"/*.txt | cksum)
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
      # pycosat is published as C source only, so it needs a compiler.
      { command -v tmux && command -v gcc; } >/dev/null || {
        # A new machine may be installing its own updates, which holds the lock.
        sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
        sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet tmux gcc libc6-dev
      }
      # uv downloads Python 3.12, which the image may not have, and checks its hash.
      python3 -m pip install --quiet --user --require-hashes -r "$lock/uv.txt"
      python3 -m uv venv --quiet --clear --python 3.12 "$venv"
      install() { python3 -m uv pip install --quiet --python "$venv/bin/python" "$@"; }
      install --require-hashes -r "$lock/build.txt"
      install --require-hashes --no-build-isolation -r "$lock/tpu.txt"
      install --no-build-isolation --no-deps -e "$tree"
      echo "$wanted" >"$venv/installed"
    fi
    if [ -n "${2:-}" ]; then bash -c "$2"; fi
    ;;
  start)
    if alive; then
      echo 'error: a command is running already; stop it first' >&2
      exit 1
    fi
    mkdir -p "$run"
    rm -f "$run/exit" "$run/pid" "$run/asked" "$run"/seen-*
    echo "$2" >"$run/id"
    printf '%q ' "${@:3}" >"$run/command"
    tmux kill-session -t betarank 2>/dev/null || true
    tmux new-session -d -s betarank -c "$tree" bash "$tree/launch/worker.sh" child
    for _ in $(seq 100); do
      [ ! -f "$run/pid" ] || exit 0
      sleep 0.1
    done
    echo 'error: tmux started nothing' >&2
    exit 1
    ;;
  child)
    export PATH="$venv/bin:$PATH" PYTHONUNBUFFERED=1
    eval "set -- $(cat "$run/command")" # start has quoted it
    echo "\$ $(cat "$run/command")" >>"$run/log"
    workdir=''
    for argument; do
      case $argument in --workdir=?*) workdir=${argument#*=} ;; esac
    done
    "$@" >>"$run/log" 2>&1 &
    pid=$!
    echo "$$" >"$run/child"
    echo "$pid" >"$run/pid"
    if [ -n "$workdir" ]; then
      (while sleep "$log_every" && kill -0 "$pid" 2>/dev/null; do keep_log "$workdir"; done) &
    fi
    code=0
    wait "$pid" || code=$?
    [ -z "$workdir" ] || keep_log "$workdir"
    echo "$code" >"$run/exit" # last: babysit may delete the slice once it sees this
    ;;
  state)
    if [ ! -f "$run/id" ]; then
      state=none
    elif [ -n "${2:-}" ] && [ "$2" != "$(cat "$run/id")" ]; then
      state=none
      if alive; then state=other; fi
    elif [ -f "$run/exit" ]; then
      case $(cat "$run/exit") in
        0) state='done' ;;
        130 | 143) state=stopped ;;
        *) state="failed $(cat "$run/exit")" ;;
      esac
      if [ "$state" != 'done' ] && [ -f "$run/asked" ]; then state=asked; fi
    elif alive; then
      state=running
    else
      state=lost # the machine was restarted, or the tmux session killed
    fi
    echo "betarank-state $state"
    ;;
  stop)
    if [ -n "${2:-}" ]; then # asked by babysit, which ends or starts again
      rm -f "$run/asked"
    elif [ -d "$run" ]; then
      touch "$run/asked"
    fi
    if alive && { [ -z "${2:-}" ] || [ "$2" = "$(cat "$run/id")" ]; }; then
      kill -TERM "$(cat "$run/pid")" 2>/dev/null || true
      for _ in $(seq "$grace"); do
        alive || exit 0
        sleep 1
      done
      kill -KILL "$(cat "$run/pid")" 2>/dev/null || true
    fi
    ;;
  log) tail -n "${2:-100}" "$run/log" ;;
  news)
    if [ -f "$run/log" ]; then
      size=$(stat --format=%s "$run/log")
      if [ -f "$run/seen-$2" ]; then
        tail -c "+$(($(cat "$run/seen-$2") + 1))" "$run/log" | head -c "$((size - $(cat "$run/seen-$2")))"
      else
        head -c "$size" "$run/log" | tail -n 100
      fi | sed "s/^/$(hostname): /"
      echo "$size" >"$run/seen-$2"
    fi
    ;;
  *)
    echo "error: $1: no such verb" >&2
    exit 2
    ;;
esac
