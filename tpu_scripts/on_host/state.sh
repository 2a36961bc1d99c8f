# shellcheck shell=bash
# One line: the host, and "running", the exit code of its run, or "none" where none has begun.
if is_running; then
  echo "FOPE $(hostname) running"
else
  echo "FOPE $(hostname) $(cat run.exit 2>/dev/null || echo none)"
fi
