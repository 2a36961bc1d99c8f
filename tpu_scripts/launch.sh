#!/usr/bin/env bash
# Starts `fope` on every host of a slice; it goes on when this machine is switched off.
#
#   launch.sh --name run1 --zone us-east5-a -- \
#     train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1
#
# The hosts find each other. A start that is repeated goes on from the newest checkpoint. Workdir
# and token cache (--config.data.cache_dir) are in a bucket, or on a disk that every host mounts.
#
#   --name NAME        of the queued resource
#   --zone ZONE
#   --keep-going       leaves a run of this slice as it is; without it, it is stopped first (stop.sh),
#                      unless VERB is none
#   --grace SECONDS    that it gets to write its checkpoint (300)
#   --env NAME=VALUE   environment variable of the run; may be given again:
#                      --env LIBTPU_INIT_ARGS='--first=1 --second=2' --env HF_HOME=/tmp/hub
#   --internal-ip, --tunnel-through-iap   how the hosts are reached
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#   -- VERB ...        what `fope` gets; paths of configurations are below the installed source
#
# Output goes to ~/fope/run.log of each host (logs.sh), the exit code to ~/fope/run.exit (status.sh).

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

keep_going='' env=() grace=300
values=(grace)
lists=(env)
flags=(keep_going)
parse "$@"
require name zone
count grace
check_env
check_command
write_body
on_hosts launching "$(on_host launch keep_going="$keep_going" grace="$grace" workdir="$workdir" \
  verb="${rest[0]}" body="$body")"
