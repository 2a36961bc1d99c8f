#!/usr/bin/env bash
# Deletes a slice and its request. What is in the bucket stays.
#
#   delete.sh --name run1 --zone us-east5-a
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "$@"
require name zone

mapfile -t place < <(where)
run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
