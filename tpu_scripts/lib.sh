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
#   on_hosts  runs a command on every host, and fails where one of them has not done it
#
# Every gcloud command has --quiet, no standard input and a time limit: one that waits for an answer
# to a prompt, or for a network that is gone, would stop the script that waits for it.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "bash is $BASH_VERSION; these scripts need 5.1 or newer" >&2
  exit 2
fi
set -euo pipefail

# `parse` sets these by their names.
# shellcheck disable=SC2034
name='' zone='' project='' dry_run='' internal_ip='' tunnel_through_iap=''
rest=()   # what follows --
values=() # options of the calling script that take a value
lists=()  # those that may be given again and again; an array each
flags=()  # those that take none
common_values=(name zone project)
common_flags=(dry_run internal_ip tunnel_through_iap)

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
  local option key value
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
      --*) ;;
      *) fail "unknown argument '$option'; see --help" ;;
    esac
    key=${option#--}
    key=${key%%=*}
    key=${key//-/_}
    if among "$key" "${common_flags[@]}" "${flags[@]}" && [[ $option != *=* ]]; then
      printf -v "$key" 1
      continue
    fi
    among "$key" "${common_values[@]}" "${values[@]}" "${lists[@]}" ||
      fail "unknown option '$option'; see --help"
    if [[ $option == *=* ]]; then
      value=${option#*=}
    else
      (($#)) || fail "$option needs a value"
      value=$1
      shift
    fi
    if among "$key" "${lists[@]}"; then
      local -n list=$key
      list+=("$value")
    else
      printf -v "$key" '%s' "$value"
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

# check_env: each of `env` is one NAME=VALUE.
check_env() {
  local one
  # shellcheck disable=SC2154 # of the calling script
  for one in "${env[@]}"; do
    [[ $one =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env '$one'; accepted: NAME=VALUE"
    [[ ! $one =~ \ [A-Z_][A-Z0-9_]*= ]] ||
      fail "--env '$one' has two variables; give --env once for each"
  done
}

# check_command: of `rest`, what `fope` gets; into `workdir`, where that writes, if it says so.
check_command() {
  local i
  ((${#rest[@]})) || fail "nothing to run; give -- train --config ... --workdir DIRECTORY"
  workdir=''
  for ((i = 0; i < ${#rest[@]}; i++)); do
    case ${rest[i]} in
      --workdir) workdir=${rest[i + 1]:-} ;;
      --workdir=*) workdir=${rest[i]#*=} ;;
    esac
  done
  # A relative one would lie in the source on each host, apart from those of the others.
  [[ ! $workdir || $workdir == /* || $workdir == gs://* ]] ||
    fail "--workdir '$workdir'; accepted: gs://BUCKET/PATH, or /PATH on a disk that all hosts mount"
}

# write_body: into `body`, what a host runs: `rest` with the variables of `env`.
write_body() {
  local one
  body=''
  for one in "${env[@]}"; do body+="export ${one%%=*}=$(show "${one#*=}"); "; done
  body+="exec ~/fope/venv/bin/fope $(show "${rest[@]}")"
}

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

answer='' errors='' complaint=''
# question SECONDS COMMAND...: what it prints, into `answer` and `errors`. Where it fails,
# `complaint` says why.
question() {
  local seconds=$1 code=0
  installed "$2" timeout
  asked=$(mktemp -d)
  within "$@" >"$asked/out" 2>"$asked/err" || code=$?
  answer=$(<"$asked/out") errors=$(<"$asked/err")
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

# The options that say which hosts, and how they are reached.
reach() { # reach NODE WORKER
  where
  printf '%s\n' --node="$1" --worker="$2" --quiet
  [[ ! $internal_ip ]] || printf '%s\n' --internal-ip
  [[ ! $tunnel_through_iap ]] || printf '%s\n' --tunnel-through-iap
}

# hosts_command COMMAND [NODE WORKER]: into `command`, what runs it on every host of every slice, or
# on one.
hosts_command() {
  local place
  mapfile -t place < <(reach "${2:-all}" "${3:-all}")
  command=(gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --command="$1")
}

# on_host NAME [KEY=VALUE...]: the commands of on_host/NAME.sh, with these variables set.
on_host() {
  local script=$1 one
  shift
  for one in "$@"; do printf '%s=%s\n' "${one%%=*}" "$(show "${one#*=}")"; done
  sed '/^ *#/d' "$(dirname "${BASH_SOURCE[0]}")/on_host/run.sh" \
    "$(dirname "${BASH_SOURCE[0]}")/on_host/$script.sh"
}

# find_slices SECONDS: into `nodes`, the name of each slice, as the service lists them.
find_slices() {
  local place
  mapfile -t place < <(where)
  question "$1" gcloud compute tpus queued-resources describe "$name" "${place[@]}" --quiet \
    --format='value(tpu.nodeSpec[].nodeId)' || return 1
  IFS=';' read -ra nodes <<<"$answer"
}

# ask_slice SECONDS NAME FORMAT: what the service says of one slice, into `answer`.
ask_slice() {
  local place
  mapfile -t place < <(where)
  question "$1" gcloud compute tpus tpu-vm describe "$2" "${place[@]}" --quiet --format="$3"
}

# find_lost_slices SECONDS: into `lost_slices`, "NAME is STATE" of each slice that has been taken
# away, as one of several may be while the queued resource is still ACTIVE.
find_lost_slices() {
  local nodes node
  lost_slices=''
  find_slices "$1" || return 1
  for node in "${nodes[@]}"; do
    ask_slice "$1" "$node" 'value(state)' || return 1
    if among "$answer" PREEMPTED TERMINATED; then
      lost_slices+="${lost_slices:+, }$node is $answer"
    fi
  done
}

hosts=()
# find_hosts SECONDS: into `hosts`, "SLICE WORKER" for each host, as the service lists them.
find_hosts() {
  local nodes node addresses worker found=()
  ((!${#hosts[@]})) || return 0
  find_slices "$1" || return 1
  for node in "${!nodes[@]}"; do
    ask_slice "$1" "${nodes[node]}" 'value(networkEndpoints[].ipAddress)' || return 1
    IFS=';' read -ra addresses <<<"$answer"
    for worker in "${!addresses[@]}"; do found+=("$node $worker"); done
  done
  complaint='the service lists no hosts'
  ((${#found[@]})) || return 1
  hosts=("${found[@]}")
}

DONE='FOPE done'
# ask_hosts SECONDS COMMAND [NODE WORKER]: what every host (or this one) prints, into `answer`; fails
# with a `complaint` unless each of them has done the whole command. gcloud alone does not tell: it
# leaves out a slice that it cannot prepare for ssh, says so in a warning, and ends with 0.
ask_hosts() {
  local command code=0 expected=1 done_by
  if (($# < 3)); then
    find_hosts "$(($1 < 60 ? $1 : 60))" || return 1
    expected=${#hosts[@]}
  fi
  hosts_command "$2"$'\necho '"$DONE" "${@:3}"
  question "$1" "${command[@]}" || code=$?
  # At the end of a line, not on one of its own: what a host prints may end without a newline.
  done_by=$(grep -c --text "$DONE\$" <<<"$answer" || true)
  answer=$(sed "/^$DONE\$/d; s/$DONE\$//" <<<"$answer")
  if ((code == 0 && done_by != expected)); then
    # The last exception of a thread of gcloud, as in "SSHKeyNotInAgent: SSH Key is not present ..."
    complaint=$(grep -E '^[A-Za-z_.]+: ' <<<"$errors" | grep -v '^WARNING' | tail -n 1 || true)
    complaint="$done_by of $expected hosts have done it${complaint:+ ($complaint)}"
    code=1
  fi
  if [[ $errors =~ ssh-agent|SSH\ agent ]] && ((code)); then
    # shellcheck disable=SC2016
    complaint+='; gcloud needs its key in an agent: eval "$(ssh-agent)"; '
    complaint+='ssh-add ~/.ssh/google_compute_engine'
  fi
  return "$code"
}

# on_hosts WHAT COMMAND: the same, shown; ends the script where a host has not done it.
on_hosts() {
  local command code=0
  if [[ $dry_run ]]; then
    hosts_command "$2"
    show "${command[@]}"
    return
  fi
  ask_hosts "$((COMMAND_SECONDS + ${grace:-0}))" "$2" || code=$?
  [[ ! $answer ]] || printf '%s\n' "$answer"
  ((code)) || return 0
  [[ ! $errors ]] || printf '%s\n' "$errors" >&2
  printf '%s: %s: %s has failed: %s\n' "$(basename "$0")" "$name" "$1" "$complaint" >&2
  exit 1
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

# follow_pods OPTION...: follows what the pods of a JobSet print, and ends the script.
follow_pods() {
  local command=(kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$name" --all-containers
    --prefix --max-log-requests=256 --follow "$@")
  if [[ $dry_run ]]; then show "${command[@]}"; else exec "${command[@]}" </dev/null; fi # no limit
  exit
}
