# shellcheck shell=bash
# What the scripts of this folder share. A script sources this file, sets its defaults, and calls
# parse "$@" and then require for what it cannot do without.
#
#   usage     the comment at the top of the calling script
#   parse     reads --key value and --flag into variables of the same name (- becomes _)
#   require   ends with 2 where one of the named variables is empty
#   run       runs a command, or prints it under --dry-run
#   within    runs a command that gets no terminal and a limited time
#   question  the same for a command whose answer is used
#   state     the state of the queued resource
#
# Every gcloud command has --quiet, no standard input and a time limit: one that waits for an answer
# to a prompt, or for a network that is gone, would stop the script that waits for it.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "bash is $BASH_VERSION; these scripts need 5.1 or newer" >&2
  exit 2
fi
set -euo pipefail

name='' zone='' project='' dry_run=''
rest=()   # what follows --
values=() # options of the calling script that take a value
flags=()  # options of the calling script that take none
common_values=(name zone project)

usage() { sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p;}' "$0"; }

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

among() {
  local wanted=$1 one
  shift
  for one in "$@"; do [[ $one == "$wanted" ]] && return 0; done
  return 1
}

parse() {
  local option key
  while (($#)); do
    option=$1
    shift
    case $option in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        rest=("$@")
        return
        ;;
      --dry-run)
        dry_run=1
        continue
        ;;
      --*) ;;
      *) fail "unknown argument '$option'; see --help" ;;
    esac
    key=${option#--}
    key=${key%%=*}
    key=${key//-/_}
    if among "$key" ${flags[@]+"${flags[@]}"} && [[ $option != *=* ]]; then
      printf -v "$key" 1
    elif among "$key" "${common_values[@]}" ${values[@]+"${values[@]}"}; then
      if [[ $option == *=* ]]; then
        printf -v "$key" '%s' "${option#*=}"
      else
        (($#)) || fail "$option needs a value"
        printf -v "$key" '%s' "$1"
        shift
      fi
    else
      fail "unknown option '$option'; see --help"
    fi
  done
}

require() {
  local key
  for key in "$@"; do
    [[ -n ${!key} ]] || fail "--${key//_/-} is missing; see --help"
  done
}

# count NAME: the variable is a whole number of 1 or more.
count() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "--${1//_/-} = '${!1}'; accepted: 1 or more"; }

# A command as one line that a shell would read as the same command. Words that need no quotes get
# none, so that the line can be read by people too.
show() {
  local word line=''
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s\n' "${line# }"
}

COMMAND_SECONDS=3600 # for a command that does something: a slice of many hosts takes a while

run() {
  if [[ $dry_run ]]; then show "$@"; else
    installed "$1" timeout
    within "$COMMAND_SECONDS" "$@"
  fi
}

installed() {
  local program
  for program in "$@"; do
    command -v "$program" >/dev/null || fail "$program is not installed, or not in PATH"
  done
}

child='' asked=''
# A signal ends the command that is under way too; `timeout` takes its children with it.
ended() {
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  [[ -z $asked ]] || rm -rf "$asked"
  exit "$1"
}
trap 'ended 129' HUP
trap 'ended 130' INT
trap 'ended 143' TERM

# within SECONDS COMMAND...: 124 where it takes longer. In the background, because bash heeds a
# signal at once only while it waits.
within() {
  local seconds=$1 code=0
  shift
  timeout --kill-after=10 "$seconds" "$@" </dev/null &
  child=$!
  wait "$child" || code=$?
  child=''
  return "$code"
}

pause() {
  sleep "$1" >/dev/null 2>&1 &
  child=$!
  wait "$child"
  child=''
}

answer='' complaint=''
# question SECONDS COMMAND...: what it prints, into `answer`. Where it fails, `complaint` says why.
question() {
  local seconds=$1 code=0
  installed "$2" timeout
  asked=$(mktemp -d)
  within "$@" >"$asked/out" 2>"$asked/err" || code=$?
  answer=$(<"$asked/out")
  complaint=$(grep -m 1 '^ERROR' "$asked/err" || tail -n 1 "$asked/err")
  ((code != 124 && code != 137)) || complaint="no answer within $seconds s"
  [[ $complaint ]] || complaint="it ended with code $code"
  rm -rf "$asked"
  asked=''
  return "$code"
}

# The options that say which slice.
where() {
  local words=(--zone="$zone")
  [[ $project ]] && words+=(--project="$project")
  printf '%s\n' "${words[@]}"
}

# hosts_command COMMAND: into `command`, what runs it on every host of every slice.
hosts_command() {
  local place
  mapfile -t place < <(where)
  command=(gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node=all --worker=all
    --quiet --command="$1")
}

on_hosts() {
  local command
  hosts_command "$1"
  run "${command[@]}"
}

describe_command() {
  local place
  mapfile -t place < <(where)
  command=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --quiet
    --format='value(state.state)')
}

STATES=(CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE FAILED SUSPENDING SUSPENDED
  DELETING)

# state SECONDS: into `now`, one of STATES; NONE where the service says that there is no such queued
# resource. UNKNOWN in every other case, with the reason in `complaint`: a token that has expired, a
# quota of requests, a network or service that is down, and half an answer say nothing of the slice.
state() {
  local command
  describe_command
  now=UNKNOWN
  if question "$1" "${command[@]}"; then
    if among "$answer" "${STATES[@]}"; then
      now=$answer
    else
      complaint="its answer is '$answer'"
    fi
  elif is_absent; then
    now=NONE
  fi
}

# Whether `complaint` says that the queued resource is not there. What else may be missing, such as
# the project or the zone, is a NOT_FOUND too, and an error of the network may have any name in its
# address.
is_absent() {
  local said='^ERROR: (\([a-z.-]+\) )?NOT_FOUND:(.*)'
  [[ $complaint =~ $said ]] || return 1
  said=${BASH_REMATCH[2]}
  [[ ! $said =~ /queuedResources/$name([^a-z0-9-]|$) ]] || return 0
  [[ ! ${said,,} =~ project|location|zone|consumer|service|account|api|method|email|/queuedresources/ ]]
}

# wait_until_active TIMEOUT POLL LOOK (seconds): returns when the slice is there, fails with 1
# otherwise.
wait_until_active() {
  local now command absent=0 deadline=$((SECONDS + $1))
  if [[ $dry_run ]]; then
    describe_command
    show "${command[@]}"
    return
  fi
  while true; do
    state "$3"
    printf '%s %s: %s%s\n' "$(date -u +%H:%M:%S)" "$name" "$now" \
      "$([[ $now != UNKNOWN ]] || printf ' (%s)' "$complaint")" >&2
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) break ;;
      NONE) ((++absent < 3)) || break ;; # a new request may not be seen everywhere at once
      *) absent=0 ;;
    esac
    ((SECONDS < deadline)) || break
    pause "$2"
  done
  printf '%s: %s is %s after %d s, not ACTIVE\n' "$(basename "$0")" "$name" "$now" "$SECONDS" >&2
  return 1
}
