# shellcheck shell=bash disable=SC2154 # keep_going, grace, verb, body and workdir are set before
# Starts `body`, which ends in `exec fope ...`, in a session of its own: it goes on without ssh.

if is_running && [ -n "$keep_going" ]; then
  echo "$(hostname): goes on"
else
  if is_running && ! problem=$(venv/bin/fope "$verb" --help 2>&1 >/dev/null); then
    echo "$(hostname): the run goes on; of the command that is to follow it: $problem" >&2
    exit 1
  fi
  end_run "$grace"
  rm -f run.exit run.pid
  printf '%s\n' "$workdir" >run.workdir
  printf '%s\n' "$body" >run.body
  # The shell that holds the lock outlives signals, so that the exit code of fope is written.
  # shellcheck disable=SC2016 # the inner shell expands it
  setsid bash -c 'exec 9>run.lock; flock --wait 10 9 || exit 1
    trap : HUP INT TERM
    (cd source 2>/dev/null || true; eval "$1") >>run.log 2>&1 9>&- &
    echo $! >run.pid.new; mv run.pid.new run.pid
    while true; do code=0; wait $! || code=$?; kill -0 $! 2>/dev/null || break; done
    echo "$code" >run.exit.new; mv run.exit.new run.exit' bash "$body" </dev/null >/dev/null 2>&1 &
  waited=0
  until [ -f run.pid ]; do
    if [ "$waited" -ge 100 ]; then
      echo "$(hostname): the run has not begun" >&2
      exit 1
    fi
    sleep 0.1
    waited=$((waited + 1))
  done
  echo "$(hostname): begun"
fi
