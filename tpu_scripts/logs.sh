#!/usr/bin/env bash
# Follows what a run prints.
#
#   logs.sh --name run1 --zone us-east5-a
#   logs.sh --name run1 --zone us-east5-a --worker all --lines 20 --once
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --worker N|all     host within its slice (0, which prints the progress)
#   --node N|all       slice (0)
#   --lines N          lines to begin with (100)
#   --once             shows these and ends; without it, goes on until Ctrl-C
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

worker=0 node=0 lines=100 once=''
values=(worker node lines)
flags=(once)
parse "$@"
require name zone
count lines

follow='-F '
[[ $once ]] && follow=''
mapfile -t place < <(where)
command=(gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node="$node"
  --worker="$worker" --quiet --command="tail ${follow}-n $lines ~/fope/run.log")
if [[ $dry_run ]]; then show "${command[@]}"; else exec "${command[@]}" </dev/null; fi # no limit
