# shellcheck shell=bash disable=SC2154 # body is set before
# One line: the host, and "running", the exit code of its run, or "none" where none has begun. Of the
# run `body`, where that is not empty: another one that has ended is "none", one under way "other".
is_another() { [ -n "$body" ] && [ "$body" != "$(cat run.body 2>/dev/null)" ]; }

what=$(cat run.exit 2>/dev/null || echo none)
if is_running; then
  what=running
  if is_another; then what=other; fi
elif is_another; then
  what=none
fi
echo "FOPE $(hostname) $what"
