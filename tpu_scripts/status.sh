#!/usr/bin/env bash
# What a slice and its run are doing: state, hosts, step, loss, speed, last checkpoint.
#
#   status.sh --name run1 --zone us-east5-a
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --look SECONDS     that gcloud gets to answer one question (60)
#   --internal-ip, --tunnel-through-iap   how the hosts are reached
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#
# Ends with 0 when the run is under way or has ended well on every host, 1 when not, and 3 when that
# could not be found out.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

look=60
values=(look)
parse "$@"
require name zone
count look

if [[ $dry_run ]]; then
  describe_command
  show "${command[@]}"
  on_hosts asking "$(on_host state body=)"
  hosts_command "$(on_host progress)" 0 0
  show "${command[@]}"
  exit
fi
state "$look"
printf '%s: %s%s\n' "$name" "$now" "$([[ $now != UNKNOWN ]] || printf ' (%s)' "$complaint")"
[[ $now != UNKNOWN ]] || exit 3
[[ $now == ACTIVE ]] || exit 1

code=0
ask_hosts "$look" "$(on_host state body=)" || code=3
declare -A found=()
while read -r word host what; do
  [[ $word == FOPE ]] || continue
  found[$what]+=" $host"
done <<<"$answer"
for what in "${!found[@]}"; do
  read -ra names <<<"${found[$what]}"
  case $what in
    running) printf '  %d of %d hosts: running\n' "${#names[@]}" "${#hosts[@]}" ;;
    none)
      printf '  %d of %d hosts: no run has begun (%s)\n' "${#names[@]}" "${#hosts[@]}" "${names[*]}"
      ;;
    *)
      printf '  %d of %d hosts: ended with code %s (%s)\n' "${#names[@]}" "${#hosts[@]}" \
        "$what" "${names[*]}"
      ;;
  esac
  [[ $what == running || $what == 0 ]] || ((code)) || code=1
done
((${#found[@]} < 2)) || ((code)) || code=1 # some run, others do not
if ((code == 3)); then
  printf '  not all hosts have answered: %s\n' "$complaint"
  find_lost_slices "$look" || true
  [[ ! $lost_slices ]] || printf '  lost: %s\n' "$lost_slices"
elif ask_hosts "$look" "$(on_host progress)" 0 0; then
  [[ ! $answer ]] || printf '  %s\n' "$answer"
else
  printf '  its files could not be read: %s\n' "$complaint"
fi
exit "$code"
