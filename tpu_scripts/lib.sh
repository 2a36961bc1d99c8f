# shellcheck shell=bash
# What the scripts of this folder share. A script sources this file, sets its defaults, and calls
# parse "$@" and then require for what it cannot do without.
#
#   usage     the comment at the top of the calling script
#   parse     reads --key value and --flag into variables of the same name (- becomes _)
#   require   ends with 2 where one of the named variables is empty
#   run       runs a command, or prints it under --dry-run
#   ask       the same for a command whose answer is used: nothing is asked under --dry-run

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

run() {
  if [[ $dry_run ]]; then show "$@"; else "$@"; fi
}

ask() {
  if [[ $dry_run ]]; then show "$@" >&2; else "$@"; fi
}

# The options that say which slice.
where() {
  local words=(--zone="$zone")
  [[ $project ]] && words+=(--project="$project")
  printf '%s\n' "${words[@]}"
}

# on_hosts COMMAND: runs a command on every host of every slice.
on_hosts() {
  local place
  mapfile -t place < <(where)
  run gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node=all --worker=all \
    --command="$1"
}

# The state of the queued resource: ACTIVE, SUSPENDED, ...; NONE where there is none.
state() {
  local place
  mapfile -t place < <(where)
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

# wait_until_active TIMEOUT POLL (seconds): returns when the slice is there, fails with 1 otherwise.
wait_until_active() {
  local now place deadline=$((SECONDS + $1))
  if [[ $dry_run ]]; then
    mapfile -t place < <(where)
    show gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format='value(state.state)'
    return
  fi
  while now=$(state); do
    printf '%s %s: %s\n' "$(date -u +%H:%M:%S)" "$name" "$now" >&2
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) break ;;
    esac
    ((SECONDS < deadline)) || break
    sleep "$2"
  done
  printf '%s: %s is %s after %d s, not ACTIVE\n' "$(basename "$0")" "$name" "$now" "$SECONDS" >&2
  return 1
}
