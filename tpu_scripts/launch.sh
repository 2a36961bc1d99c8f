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
#   --grace SECONDS    that it gets to write its checkpoint (300)
#   --env 'A=1 B=2'    environment variables of the run, as the shell of the hosts reads them:
#                      --env "LIBTPU_INIT_ARGS='--first=1 --second=2'"
#   --project PROJECT  gcloud's own default where not given
#   --dry-run          prints the commands and runs none
#   --help
#   -- VERB ...        what `fope` gets; paths of configurations are below the installed source
#
# Output goes to ~/fope/run.log of each host (logs.sh), the exit code to ~/fope/run.exit.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

keep_going='' env='' grace=300
values=(env grace)
flags=(keep_going)
parse "$@"
require name zone
count grace
((${#rest[@]})) || fail "nothing to run; give -- train --config ... --workdir DIRECTORY"

# A run is asked to end by SIGTERM, which it answers by a checkpoint; the next one begins when that is
# written, or would find the workdir held.
if [[ $keep_going ]]; then
  first='tmux has-session -t fope 2>/dev/null && exit 0;'
else
  first='if tmux has-session -t fope 2>/dev/null; then'
  # shellcheck disable=SC2016 # the hosts expand it
  first+=' shell=$(tmux list-panes -t fope -F "#{pane_pid}"); pkill -TERM -P $shell;'
  first+=" for i in \$(seq $grace); do tmux has-session -t fope 2>/dev/null || break; sleep 1; done;"
  # shellcheck disable=SC2016
  first+=' if tmux has-session -t fope 2>/dev/null; then'
  first+=" echo the earlier run has not ended within $grace s and is killed;"
  # shellcheck disable=SC2016
  first+=' pkill -KILL -P $shell; sleep 1; tmux kill-session -t fope 2>/dev/null; fi; fi;'
fi
body="cd ~/fope/source 2>/dev/null || cd ~/fope; rm -f ~/fope/run.exit;${env:+ export $env;}"
body+=" ~/fope/venv/bin/fope $(show "${rest[@]}") >> ~/fope/run.log 2>&1;"
body+=" echo \$? > ~/fope/run.exit"
on_hosts "$first $(show tmux new-session -d -s fope "$body")"
