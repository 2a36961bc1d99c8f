#!/usr/bin/env bash
# Watches a run on a spot slice; when the slice is taken away, asks for another, installs, and
# launches again. The run goes on from its newest checkpoint in the bucket.
#
#   resume.sh --name run1 --zone us-east5-a --accelerator v5litepod-16 --spot -- \
#     train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1
#
#   --limit N          losses after which it gives up (20)
#   --poll SECONDS     between two looks at the slice and the run (60)
#   --source, --python as for install.sh
#   --env              as for launch.sh
#   --accelerator, --runtime, --slices, --spot, --reserved, --valid-for, --timeout
#                      as for create.sh
#   --name, --zone, --project
#   --dry-run          prints the commands of one round after a loss, and runs none
#   --help
#
# Ends with 0 when the run has ended well on every host, 1 when the limit is reached, and with the
# run's own code (1 to 127) when it ends with an error of its own, which another slice does not mend.
# A run that a signal ended on a slice that is still there is launched again, and counts as lost.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# `with` reads these by their names.
# shellcheck disable=SC2034
{
  accelerator='' runtime='' slices='' spot='' reserved='' valid_for='' timeout='' poll=60
  limit=20 source='' python='' env=''
}
values=(accelerator runtime slices valid_for timeout poll limit source python env)
flags=(spot reserved)
parse "$@"
require name zone accelerator
count limit
count poll
((${#rest[@]})) || fail "nothing to run; give -- train --config ... --workdir DIRECTORY"

here=$(dirname "${BASH_SOURCE[0]}")
common=(--name "$name" --zone "$zone")
[[ $project ]] && common+=(--project "$project")
[[ $dry_run ]] && common+=(--dry-run)

# with KEY...: those of the options that are set, into the array `given`.
with() {
  local key
  given=()
  for key in "$@"; do
    [[ -n ${!key} ]] || continue
    given+=("--${key//_/-}")
    among "$key" "${flags[@]}" || given+=("${!key}")
  done
}

create() {
  local given
  with accelerator runtime slices spot reserved valid_for timeout poll
  bash "$here/create.sh" "${common[@]}" "${given[@]}"
}

install_and_launch() {
  local given
  with source python
  bash "$here/install.sh" "${common[@]}" ${given[@]+"${given[@]}"} &&
    with env &&
    bash "$here/launch.sh" "${common[@]}" --keep-going ${given[@]+"${given[@]}"} -- "${rest[@]}"
}

# Of each host one line: the exit code of its run, "running", or "none" where no run has begun.
question='if tmux has-session -t fope 2>/dev/null; then echo FOPE running;'
# shellcheck disable=SC2016 # the hosts expand it
question+=' elif test -f fope/run.exit; then echo "FOPE $(cat fope/run.exit)"; else echo FOPE none; fi'

lose() {
  if ((lost == limit)); then
    printf 'resume.sh: %s was lost %d times; giving up\n' "$name" "$((lost + 1))" >&2
    exit 1
  fi
  lost=$((lost + 1))
  printf 'resume.sh: %s: %s; starting it again (%d of %d)\n' "$name" "$1" "$lost" "$limit" >&2
}

if [[ $dry_run ]]; then
  on_hosts "$question"
  bash "$here/delete.sh" "${common[@]}"
  create
  install_and_launch
  exit 0
fi

lost=0
while true; do
  now=$(state)
  case $now in
    ACTIVE)
      # Nothing where the hosts cannot be reached, as while they are being taken away.
      mapfile -t said < <(on_hosts "$question" 2>/dev/null | sed -n 's/^FOPE //p')
      if ((${#said[@]} == 0)) || among running "${said[@]}"; then
        :
      elif among none "${said[@]}"; then
        install_and_launch || lose 'it could not be launched'
      else
        [[ $(printf '%s\n' "${said[@]}" | sort -u) == 0 ]] && exit 0
        for code in "${said[@]}"; do
          if ((code > 0 && code < 128)); then
            printf 'resume.sh: %s: the run has ended with code %d; see logs.sh\n' \
              "$name" "$code" >&2
            exit "$code"
          fi
        done
        lose "the run was ended by a signal (codes ${said[*]})"
        install_and_launch || true
      fi
      ;;
    SUSPENDING | SUSPENDED | FAILED | NONE)
      lose "the slice is $now"
      bash "$here/delete.sh" "${common[@]}" || true
      create || true
      ;;
  esac
  sleep "$poll"
done
