#!/usr/bin/env bash
# Follows what a run prints, or saves what every host has printed.
#
#   logs.sh --name run1 --zone us-east5-a
#   logs.sh --name run1 --zone us-east5-a --worker all --lines 20 --once
#   logs.sh --name run1 --zone us-east5-a --save logs/run1
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --worker N|all     host within its slice (0, which prints the progress; all with --save)
#   --node N|all       slice (0; all with --save)
#   --lines N          lines to begin with (100)
#   --once             shows these and ends; without it, goes on until Ctrl-C
#   --save DIRECTORY   writes the whole output of each of these hosts to DIRECTORY/SLICE-WORKER.log
#   --internal-ip, --tunnel-through-iap   how the hosts are reached
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#
# --save goes on where a host does not answer or has no log, names it, and ends with 1.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

worker='' node='' lines=100 once='' save=''
values=(worker node lines save)
flags=(once)
parse "$@"
require name zone
count lines
default=0
[[ ! $save ]] || default=all
node=${node:-$default} worker=${worker:-$default}
for key in node worker; do
  [[ ${!key} =~ ^([0-9]+|all)$ ]] || fail "--$key '${!key}'; accepted: 0 or more, or all"
done

if [[ $save ]]; then
  log=$'set -e\ncat ~/fope/run.log'
  if [[ $dry_run ]]; then
    hosts_command "$log" "$node" "$worker"
    show "${command[@]}"
    exit
  fi
  find_hosts 60 || fail "the hosts are not known: $complaint"
  saved=0 missing=0
  for host in "${hosts[@]}"; do
    read -r in_slice number <<<"$host"
    among "$node" all "$in_slice" || continue
    among "$worker" all "$number" || continue
    mkdir -p "$save"
    if ask_hosts 600 "$log" "$in_slice" "$number"; then
      printf '%s\n' "$answer" >"$save/$in_slice-$number.log"
      saved=$((saved + 1))
    else
      printf 'logs.sh: slice %s, worker %s: %s\n' "$in_slice" "$number" "$complaint" >&2
      missing=$((missing + 1))
    fi
  done
  ((saved + missing)) || fail "there is no host --node $node --worker $worker of ${#hosts[@]}"
  printf '%d of %d logs are in %s\n' "$saved" "$((saved + missing))" "$save"
  ((missing == 0)) || exit 1
  exit
fi

follow='-F '
[[ $once ]] && follow=''
hosts_command "tail ${follow}-n $lines ~/fope/run.log" "$node" "$worker"
command+=(--batch-size=all) # in groups, the second would begin when the first has ended
if [[ $dry_run ]]; then show "${command[@]}"; else exec "${command[@]}" </dev/null; fi # no limit
