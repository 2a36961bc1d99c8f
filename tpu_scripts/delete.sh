#!/usr/bin/env bash
# Ends the run of a slice and deletes the slice and its request. What is in the bucket stays.
#
#   delete.sh --name run1 --zone us-east5-a
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --at-once          without ending the run first: what it has not saved is trained again
#   --grace SECONDS    that the run gets to write its checkpoint (300)
#   --internal-ip, --tunnel-through-iap   how the hosts are reached
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#
# Where a host does not answer, nothing is deleted and it ends with 1; --at-once deletes all the
# same. A slice that is not ACTIVE has no run to end.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

at_once='' grace=300
values=(grace)
flags=(at_once)
parse "$@"
require name zone
count grace

mapfile -t place < <(where)
if [[ ! $at_once ]]; then
  if [[ ! $dry_run ]]; then
    state 60
    [[ $now != UNKNOWN ]] ||
      fail "its state is not known ($complaint); --at-once deletes all the same"
  fi
  if [[ $dry_run || $now == ACTIVE ]]; then
    on_hosts 'ending the run (--at-once deletes without it)' "$(on_host stop grace="$grace")"
  fi
fi
run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
