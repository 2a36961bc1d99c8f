# shellcheck shell=bash disable=SC2034 # the parts that follow use what is set here
# A run of `fope` on this host; the other files of this folder follow it. They come through ssh as
# one command, so that a host needs nothing of this repository.
#
#   ~/fope/run.lock      held while a run is under way, whoever has started it
#   ~/fope/run.pid       the process of fope; run.exit its exit code once it has ended
#   ~/fope/run.log       what it prints; run.body the command, run.workdir where it writes
set -eu
mkdir -p ~/fope
cd ~/fope

is_running() {
  code=0
  flock --nonblock --conflict-exit-code 75 run.lock true || code=$?
  case $code in
    0) return 1 ;;
    75) return 0 ;;
    *)
      echo "$(hostname): flock (of util-linux) has failed with code $code" >&2
      exit 1
      ;;
  esac
}

# TERM, which `fope` answers by a checkpoint; the next one begins when that is written, or would find
# the workdir held.
end_run() { # end_run SECONDS
  is_running || return 0
  kill -TERM "$(cat run.pid)" 2>/dev/null || true
  waited=0
  while is_running; do
    if [ "$waited" -ge "$1" ]; then
      echo "$(hostname): the run has not ended within $1 s and is killed" >&2
      kill -KILL "$(cat run.pid)" 2>/dev/null || true
    fi
    if [ "$waited" -ge "$(($1 + 30))" ]; then
      echo "$(hostname): the run cannot be killed" >&2
      exit 1
    fi
    sleep 1
    waited=$((waited + 1))
  done
}
