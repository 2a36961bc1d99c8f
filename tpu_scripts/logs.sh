#!/usr/bin/env bash
# Follows what a run prints, or saves what every host has printed.
#
#   logs.sh --name run1 --zone us-east5-a
#   logs.sh --name run1 --zone us-east5-a --worker all --lines 20 --once
#   logs.sh --name run1 --zone us-east5-a --save logs/run1
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --worker N|all     host within its slice (0, which prints the progress)
#   --node N|all       slice (0)
#   --lines N          lines to begin with (100)
#   --once             shows these and ends; without it, goes on until Ctrl-C
#   --save DIRECTORY   writes the whole output of each host to DIRECTORY/SLICE-WORKER.log
#   --internal-ip, --tunnel-through-iap   how the hosts are reached
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#
# --save goes on where a host does not answer, names it at the end, and ends with 1.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

worker=0 node=0 lines=100 once='' save=''
values=(worker node lines save)
flags=(once)
parse "$@"
require name zone
count lines

if [[ $save ]]; then
  if [[ $dry_run ]]; then
    hosts_command 'cat ~/fope/run.log' "$node" "$worker"
    show "${command[@]}"
    exit
  fi
  find_hosts 60 || fail "the hosts are not known: $complaint"
  mkdir -p "$save"
  missing=0
  for host in "${hosts[@]}"; do
    read -r node worker <<<"$host"
    if ask_hosts 600 'cat ~/fope/run.log' "$node" "$worker"; then
      printf '%s\n' "$answer" >"$save/$node-$worker.log"
    else
      printf 'logs.sh: slice %s, worker %s: %s\n' "$node" "$worker" "$complaint" >&2
      missing=$((missing + 1))
    fi
  done
  printf '%d of %d logs are in %s\n' "$((${#hosts[@]} - missing))" "${#hosts[@]}" "$save"
  ((missing == 0)) || exit 1
  exit
fi

follow='-F '
[[ $once ]] && follow=''
hosts_command "tail ${follow}-n $lines ~/fope/run.log" "$node" "$worker"
command+=(--batch-size=all) # in groups, the second would begin when the first has ended
if [[ $dry_run ]]; then show "${command[@]}"; else exec "${command[@]}" </dev/null; fi # no limit
