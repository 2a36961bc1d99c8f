#!/usr/bin/env bash
# Ends the run on every host of a slice by SIGTERM, which `fope` answers by a checkpoint, and waits.
#
#   stop.sh --name run1 --zone us-east5-a
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --grace SECONDS    after which it is killed, and goes on from the checkpoint before (300)
#   --internal-ip, --tunnel-through-iap   how the hosts are reached
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#
# Ends with 1 where a host has not answered. The slice stays, and costs; see delete.sh.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

grace=300
values=(grace)
parse "$@"
require name zone
count grace
on_hosts stopping "$(on_host stop grace="$grace")"
