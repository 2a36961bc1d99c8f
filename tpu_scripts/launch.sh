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
#   --keep-going       leaves a run of this slice as it is; without it, it is stopped first
#   --env 'A=1 B=2'    environment variables of the run, as the shell of the hosts reads them:
#                      --env "LIBTPU_INIT_ARGS='--first=1 --second=2'"
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#   -- VERB ...        what `fope` gets; paths of configurations are below the installed source
#
# Output goes to ~/fope/run.log of each host (logs.sh), the exit code to ~/fope/run.exit.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

keep_going='' env=''
values=(env)
flags=(keep_going)
parse "$@"
require name zone
((${#rest[@]})) || fail "nothing to run; give -- train --config ... --workdir DIRECTORY"

stop='tmux kill-session -t fope 2>/dev/null; '
[[ $keep_going ]] && stop='tmux has-session -t fope 2>/dev/null && exit 0; '
body="cd ~/fope/source 2>/dev/null || cd ~/fope; rm -f ~/fope/run.exit;${env:+ export $env;}"
body+=" ~/fope/venv/bin/fope $(show "${rest[@]}") >> ~/fope/run.log 2>&1;"
body+=" echo \$? > ~/fope/run.exit"
on_hosts "${stop}$(show tmux new-session -d -s fope "$body")"
