# shellcheck shell=bash disable=SC2034,SC2154 # variables shared with tpu.sh
# Watches a run on a slice until it is finished; sourced by tpu.sh. docs/tpu.md has a table of what it does when.
#
# Everything that can go wrong on a billed slice is bounded. Failures in a row end the watch (TPU_TRIES), with a wait
# between them that doubles; the time that the slice was READY is capped (TPU_MAX_HOURS); a call of gcloud that hangs is
# ended (TPU_CALL_LIMIT seconds, and TPU_ASK_LIMIT if it only asks how the run is). The last line says what is still
# billed.

tries=${TPU_TRIES:-5}
created=''            # set once there may be a slice to answer for: from the first create on
seen=''               # set once there was a slice
failures=0            # in a row, of anything but the run itself; a run that is seen RUNNING resets it
pause=$poll           # seconds before the next try
ready_s=0 ready_at='' # seconds that the slice was READY; when it was last seen to be
accepted_s=600        # a run that ran for so long has accepted its settings; it exits with 2 if its bucket fails, too
errors=''             # file with the messages of the last call

end_call() { [ -z "$call" ] || kill "$call" 2>/dev/null || true; }
nap() { # a sleep that a signal interrupts
  sleep "$1" &
  wait "$!" || true
}
back_off() {
  nap "$pause"
  pause=$(awk -v w="$pause" -v p="$poll" 'BEGIN { print w * 2 < p * 32 ? w * 2 : p * 32 }')
}
failed() { # failed WHAT REASON
  failures=$((failures + 1))
  [ "$failures" -lt "$tries" ] || die "$1 failed, the failure number $failures in a row: $2" 6
  say "$1 failed ($failures of $tries failures in a row): $2; next try in $pause s"
  back_off
}
reason() { # the message of the server or of gcloud in $errors: one line
  local text
  # gcloud prints the error of an operation as JSON, in several lines that end with { or a comma.
  text=$(awk '/ERROR/ { on = 1 } on { sub(/^ +/, " "); printf "%s", $0; if (!/[{,]$/) exit }' "$errors")
  # Where ssh fails, the lines after its message are gcloud's traceback.
  text=${text:-$(grep -m 1 -E '^(ssh|scp): |Permission denied' "$errors")} || true
  text=${text:-$(grep . "$errors" | tail -n 1)} || true
  echo "${text:-no message; a call of gcloud that hangs is ended}" | cut -c1-500
}
attempt() { # attempt WHAT COMMAND...: runs the command; false, after counting it and waiting, if it fails
  local what=$1
  shift
  if "$@" 2> >(tee "$errors" >&2); then return 0; fi
  sleep 0.2 # until tee has written the file
  failed "$what" "$(reason)"
  return 1
}

# mentions TEXT WORDS: whether a message has one of the words a|b|c. In a name, as my-quota-project, they don't count.
mentions() {
  grep -qiE "(^|[^[:alnum:]/-])($2)([^[:alnum:]-]|\$)" <<<"$1"
}
# Ends the watch if a message of the server means that another try would fail too.
end_if_final() {
  # Quotas of requests per minute limit only how often the server may be asked.
  if mentions "$1" quota && ! mentions "$1" 'per minute'; then
    die "the project has no quota for this slice; docs/tpu.md says how to request it: $1" 3
  fi
  case $(tr '[:upper:]' '[:lower:]' <<<"$1") in
    *permission_denied* | *'does not have permission'* | *unauthenticated* | *'active account'* | *reauthentication* | \
      *invalid_argument* | *'unrecognized arguments'* | *'invalid choice'* | *not_found* | *'not found'*)
      die "the slice was refused, and another try would be refused too: $1" 3
      ;;
  esac
}
create_slice() {
  local message
  say "creating $TPU_NAME"
  created=yes # at once, because the server continues if this call is ended
  if create 2> >(tee "$errors" >&2); then
    seen=yes
    return
  fi
  sleep 0.2
  message=$(cat "$errors")
  end_if_final "$message"
  if mentions "$message" 'capacity|exhausted|stockout|unavailable' && ! mentions "$message" quota; then
    say "no capacity; next try in $pause s: $(reason)"
    back_off
  else
    failed create "$(reason)"
  fi
}
replace_slice() { # after a preemption or failure, whose name is $1
  local message
  created=yes
  if [ "$1" = FAILED ]; then
    message=$(describe state.failedData.error.message healthDescription 2>/dev/null) || true
    end_if_final "$message"
    if attempt delete delete; then failed 'creating the slice' "${message:-the server gave no reason}"; fi
    return
  fi
  say "the slice is gone ($1): deleting and recreating it"
  attempt delete delete || return 0
  [ -n "$ran" ] || back_off # one that is preempted before the run has started may be so again at once
  ran=''
}

# NONE, RUNNING, DONE, STOPPED, ASKED (stopped with launch/tpu.sh stop), FAILED CODE, OTHER (another command runs), or
# UNREACHABLE.
run_state() {
  local out lines call_limit=$ask_limit # gcloud tries ten times to connect to a worker, for 20 minutes if none answers
  if ! out=$(ask_state "$(id_of "$@")" 2>&1); then
    printf '%s\n' "$out" >"$errors"
    say "a worker can't be reached: $(reason)"
    echo UNREACHABLE
    return
  fi
  lines=$(grep -o 'betarank-state .*' <<<"$out" | sort -u | cut -d' ' -f2-)
  case $lines in # one line per distinct state
    *other*) echo OTHER ;;
    *asked*running*) echo RUNNING ;; # until all have stopped
    *asked*) echo ASKED ;;
    *failed*) echo "FAILED $(grep -m 1 failed <<<"$lines" | cut -d' ' -f2)" ;;
    none) echo NONE ;;
    *none* | *lost*) echo 'FAILED lost' ;; # the run is gone on some workers
    *running*) echo RUNNING ;;
    *stopped*) echo STOPPED ;;
    done) echo DONE ;;
    *) echo UNREACHABLE ;;
  esac
}

stop_run() { worker_sh stop "$(id_of "${command[@]}")"; } # leaves another command alone

run_ended() { # counts the end of the run, whose state is $1, and waits; ends the watch if another start is of no use
  local how="failed (${1#FAILED })"
  if [ "$1" = ASKED ]; then
    say 'the run was stopped with launch/tpu.sh stop, so it is not started again'
    exit 143
  fi
  worker_sh log 20 || true
  if [ "$1" = 'FAILED 2' ] && [ -z "$accepted" ]; then
    stop_run || true # ends its processes on other workers
    die 'the run refused its settings (exit 2), so it is not started again' 2
  fi
  [ "$1" != STOPPED ] || how='was asked to stop, for instance by a maintenance notice'
  [ $((SECONDS - began)) -lt 1800 ] || crashes=0
  crashes=$((crashes + 1))
  if [ "$crashes" -gt 3 ]; then
    stop_run || true
    die "the run ended $crashes times in a row; the last time it $how" 5
  fi
  say "the run $how; next try in $pause s"
  back_off
}

hours_allowed() {
  local cap=${TPU_MAX_HOURS:-}
  if [ -n "${TPU_MAX_DOLLARS:-}" ]; then
    cap=$(awk -v h="${cap:-1e9}" -v m="$TPU_MAX_DOLLARS" -v p="$TPU_DOLLARS_PER_HOUR" \
      'BEGIN { d = m / p; print d < h ? d : h }')
  fi
  [ -n "$cap" ] || die 'babysit needs a cap: TPU_MAX_HOURS, or TPU_MAX_DOLLARS with TPU_DOLLARS_PER_HOUR'
  echo "$cap"
}
count_ready() { # counts the time since the last poll, if the slice was READY then; unreadable states count as READY
  [ -z "$ready_at" ] || ready_s=$((ready_s + SECONDS - ready_at))
  case $1 in
    READY | ODD*) ready_at=$SECONDS ;;
    UNKNOWN*) [ -z "$ready_at" ] || ready_at=$SECONDS ;;
    *) ready_at='' ;;
  esac
}
used_up() { awk -v s="$ready_s" -v h="$1" 'BEGIN { exit !(s >= h * 3600) }'; }
used() { # hours READY, and their price if it is known
  awk -v s="$ready_s" -v p="${TPU_DOLLARS_PER_HOUR:-}" \
    'BEGIN { printf "%.2f hours READY", s / 3600; if (p != "") printf " ($%.2f)", p * s / 3600 }'
}

# On SIGTERM, and with --delete on SIGHUP (a closed terminal).
asked_to_stop() {
  trap '' HUP TERM # a second signal would end the wait for the run, before it has saved
  say 'asked to stop: the run saves and stops'
  end_call
  # A slice that was there already, and wasn't looked at yet, may run another command. Such a slice isn't deleted.
  [ -n "$created" ] || [ "$(run_state "${command[@]}")" = OTHER ] || created=yes
  stop_run || true
  exit 143
}

# Runs when babysit ends for any reason: deletes the slice with --delete, and says what is still billed.
leave() {
  local code=$? state deleted=''
  trap - EXIT INT
  trap '' HUP TERM # neither ends the deletion
  call_limit=600
  if [ -n "$created" ] && [ -n "$delete_after" ] && [ "$(slice_state)" != NONE ]; then
    for _ in 1 2 3; do
      if delete 2>"$errors"; then
        deleted=yes
        break
      fi
      sleep "$poll"
    done
    [ -n "$deleted" ] ||
      say "error: $TPU_NAME could not be deleted and COSTS MONEY; launch/tpu.sh --yes delete ($(reason))"
  fi
  state=$(slice_state)
  count_ready "$state"
  rm -f "$errors"
  case $state in
    NONE) say "$TPU_NAME does not exist: nothing of it is billed; $(used)" ;;
    GONE*) say "$TPU_NAME is ${state#GONE } and not billed; $(used); launch/tpu.sh --yes delete removes it" ;;
    UNKNOWN*) say "the state of $TPU_NAME can't be read, so it MAY COST MONEY; $(used); launch/tpu.sh --yes delete" ;;
    BUSY*) say "$TPU_NAME is ${state#BUSY } and will cost money; $(used); launch/tpu.sh --yes delete" ;;
    *)
      say "$TPU_NAME still exists and costs money${TPU_DOLLARS_PER_HOUR:+, \$$TPU_DOLLARS_PER_HOUR an hour}; $(used);" \
        'launch/tpu.sh --yes delete'
      ;;
  esac
  exit "$code"
}

babysit() {
  local command cap state run message crashes=0 began='' accepted='' unreachable=0 ran=''
  command_of "$@"
  cap=$(hours_allowed)
  confirm "$(summary); for $cap hours at most: ${command[*]}"
  if [ -n "$dry_run" ]; then
    create && push && setup && start "${command[@]}" && ask_state "$(id_of "${command[@]}")"
    [ -z "$delete_after" ] || delete
    return
  fi
  SECONDS=0 errors=$(mktemp) call_limit=${TPU_CALL_LIMIT:-1800} ask_limit=${TPU_ASK_LIMIT:-180}
  trap '' PIPE # Ctrl-C ends a `tee` that reads the messages too; that must not end babysit before its trap has run
  trap leave EXIT
  trap asked_to_stop TERM
  trap '[ -z "$delete_after" ] || asked_to_stop; exit 129' HUP
  trap 'delete_after=""; say "no longer watching; the run continues"; end_call; exit 130' INT
  while true; do
    state=$(slice_state)
    count_ready "$state"
    if used_up "$cap"; then
      say "the cap of $cap hours is reached: the run saves and stops"
      case $state in READY | ODD*) stop_run || true ;; esac
      exit 4
    fi
    case $state in NONE | UNKNOWN*) ;; *) seen=yes ;; esac
    case $state in
      READY) ;;
      ODD*) say "the slice is ${state#ODD }" ;; # billed: deleted if its workers stay out of reach
      NONE)
        create_slice
        continue
        ;;
      GONE*)
        replace_slice "${state#GONE }"
        continue
        ;;
      UNKNOWN*) # a run may be in progress, so only before there is a slice does this end the watch
        if [ -z "$seen" ]; then
          end_if_final "${state#UNKNOWN }"
          failed 'gcloud describe' "${state#UNKNOWN }"
        else
          say "gcloud: ${state#UNKNOWN }"
          nap "$poll"
        fi
        continue
        ;;
      *)
        created=yes
        nap "$poll"
        continue
        ;;
    esac

    run=$(run_state "${command[@]}")
    if [ "$run" = OTHER ]; then
      created='' # the slice isn't ours to delete: its run would be lost
      die "$TPU_NAME runs another command; stop it with launch/tpu.sh stop, or choose another TPU_NAME" 7
    fi
    case $run,$state in UNREACHABLE,ODD*) ;; *) created=yes ;; esac # such a slice may run another command
    [ "$run" = UNREACHABLE ] || unreachable=0
    if [ -z "$began" ] && [ "$run" = RUNNING ]; then began=$SECONDS; fi
    case $run in
      RUNNING)
        failures=0 pause=$poll ran=yes
        [ $((SECONDS - began)) -lt "$accepted_s" ] || accepted=yes
        nap "$poll"
        ;;
      DONE)
        say 'done'
        exit 0
        ;;
      UNREACHABLE) # normal on a new slice; if it lasts, a host is broken
        unreachable=$((unreachable + 1))
        if [ "$unreachable" -le 5 ]; then
          nap "$poll"
        else
          unreachable=0 message=$(reason)
          [ -n "$created" ] || die "$TPU_NAME can't be reached, and may run another command; delete it yourself: $message" 6
          say 'still unreachable: deleting and recreating the slice'
          if attempt delete delete; then failed ssh "$message"; fi
        fi
        ;;
      FAILED* | STOPPED | ASKED)
        if [ -n "$began" ]; then # otherwise an earlier babysit left it behind
          run_ended "$run"
          [ "$(run_state "${command[@]}")" != ASKED ] || run_ended ASKED # stopped during the wait
        fi
        began=''
        attempt stop stop_run || continue
        ;;&
      NONE | FAILED* | STOPPED | ASKED)
        if attempt push push && attempt setup setup && attempt start start "${command[@]}"; then began=$SECONDS; fi
        ;;
    esac
  done
}
