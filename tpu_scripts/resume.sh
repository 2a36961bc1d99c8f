#!/usr/bin/env bash
# Watches a run on a spot slice; when the slice is taken away, asks for another, installs, and
# launches again. The run goes on from its newest checkpoint in the bucket.
#
#   resume.sh --name run1 --zone us-east5-a --accelerator v5litepod-16 --spot -- \
#     train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1
#
#   --limit N           losses after which it gives up (20)
#   --poll SECONDS      between two looks at the slice and the run (60)
#   --look SECONDS      that gcloud gets to answer one of them (60)
#   --patience SECONDS  without one answer, after which it gives up (3600)
#   --source, --python  as for install.sh
#   --env               as for launch.sh
#   --accelerator, --runtime, --slices, --spot, --reserved, --valid-for, --timeout,
#   --service-account, --network, --subnetwork, --internal-ips, --data-disk, --startup-script
#                       as for create.sh
#   --name, --zone, --project, --internal-ip, --tunnel-through-iap
#   --dry-run           prints the commands of one round after a loss, and runs none
#   --help
#
# Ends with 0 when the run has ended well on every host, 1 when the limit or the patience is over,
# and with the run's own code (1 to 127) when it ends with an error of its own, which another slice does
# not mend. A run that a signal ended on a slice that is still there is launched again, and counts as
# lost.
#
# Slices are deleted only where the service says that the request is SUSPENDING, SUSPENDED or FAILED,
# or that one of them is PREEMPTED or TERMINATED; a run needs all of its slices. Where gcloud gives no
# answer (a token that has expired, a quota, the network, the service itself), nothing is done but to
# say so and look again.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# `with` reads these by their names.
# shellcheck disable=SC2034
{
  accelerator='' runtime='' slices='' spot='' reserved='' valid_for='' timeout='' poll=60 look=60
  service_account='' network='' subnetwork='' internal_ips='' startup_script='' data_disk=()
  limit=20 patience=3600 source='' python='' env=()
}
created=(accelerator runtime slices spot reserved valid_for timeout poll look service_account
  network subnetwork internal_ips startup_script data_disk)
values=(accelerator runtime slices valid_for timeout poll look service_account network subnetwork
  startup_script limit patience source python)
lists=(data_disk env)
flags=(spot reserved internal_ips)
parse "$@"
require name zone accelerator
for key in limit poll look patience; do count "$key"; done
check_env
check_command

write_body
here=$(dirname "${BASH_SOURCE[0]}")
common=(--name "$name" --zone "$zone")
[[ $project ]] && common+=(--project "$project")
for key in "${common_flags[@]}"; do
  [[ ! ${!key} ]] || common+=("--${key//_/-}")
done

# with KEY...: those of the options that are set, into the array `given`.
with() {
  local key one
  given=()
  for key in "$@"; do
    local -n value=$key
    for one in "${value[@]}"; do
      [[ -n $one ]] || continue
      given+=("--${key//_/-}")
      among "$key" "${flags[@]}" || given+=("$one")
    done
  done
}

# other SCRIPT ARGUMENT...: runs another of these scripts; a signal to this one ends it too.
other() {
  local script=$1 code=0
  shift
  bash "$here/$script.sh" "${common[@]}" "$@" &
  child=$!
  wait "$child" || code=$?
  child=''
  return "$code"
}

create() {
  local given
  with "${created[@]}"
  other create "${given[@]}"
}

install_and_launch() {
  local given
  with source python
  other install "${given[@]}" &&
    with env &&
    other launch --keep-going "${given[@]}" -- "${rest[@]}"
}

if [[ $dry_run ]]; then
  on_hosts asking "$(on_host state body="$body")"
  other delete --at-once
  create
  install_and_launch
  exit 0
fi

# runs: into `said`, what the hosts say: "running", "none", "other" or an exit code; fails with a
# `complaint` where one of them says nothing, as while they are being taken away. Of the others
# "running" is enough to know.
runs() {
  local code=0 word what
  ask_hosts "$look" "$(on_host state body="$body")" || code=$?
  said=()
  while read -r word _ what; do
    [[ $word == FOPE && $what =~ ^(running|other|none|[0-9]+)$ ]] && said+=("$what")
  done <<<"$answer"
  among running "${said[@]}" && return 0
  ((code == 0)) || return 1
  ((${#said[@]} == ${#hosts[@]})) && return 0
  complaint="the hosts answer '${answer//$'\n'/ }'"
  return 1
}

lose() {
  if ((lost == limit)); then
    printf 'resume.sh: %s was lost %d times; giving up\n' "$name" "$((lost + 1))" >&2
    exit 1
  fi
  lost=$((lost + 1))
  printf 'resume.sh: %s: %s; starting it again (%d of %d)\n' "$name" "$1" "$lost" "$limit" >&2
}

# unanswered WHAT: what could not be asked or done now is tried again, up to the patience.
unanswered() {
  local waited=$((SECONDS - answered))
  printf 'resume.sh: %s: %s; the slice stays as it is, trying again\n' "$name" "$1" >&2
  if ((waited >= patience)); then
    printf 'resume.sh: %s: nothing has worked for %d s (--patience); giving up, see above. ' \
      "$name" "$waited" >&2
    printf 'The slice and the run are as they were\n' >&2
    exit 1
  fi
}

# A slice that is lost stays so until there is another request: `lost` counts it once, however often
# deleting it or asking for another has to be tried.
lost=0 replacing='' seen='' answered=$SECONDS

replace() {
  local code=0
  hosts=()
  create || code=$?
  case $code in
    0 | 1) replacing='' seen=1 answered=$SECONDS ;; # there is a request; the next look tells the rest
    2) exit 2 ;;
    *) unanswered 'no slice could be asked for' ;;
  esac
}

# delete_and_replace WHY: the request with all its slices, and another one.
delete_and_replace() {
  [[ $replacing ]] || lose "$1"
  replacing=1
  if other delete --at-once; then
    replace
  else
    unanswered 'the lost slice could not be deleted'
  fi
}

while true; do
  state "$look"
  case $now in
    ACTIVE)
      seen=1 unknown='' lost_slices=''
      if ! runs; then
        unknown="the hosts could not be asked ($complaint)"
        find_lost_slices "$look" || true
      fi
      [[ $lost_slices ]] || replacing=''
      if [[ $lost_slices ]]; then
        delete_and_replace "$lost_slices"
      elif [[ $unknown ]]; then
        unanswered "$unknown"
      elif among other "${said[@]}"; then
        fail "$name runs another command; wait for it, or end it by stop.sh"
      elif among running "${said[@]}"; then
        answered=$SECONDS
      elif among none "${said[@]}"; then
        if install_and_launch; then answered=$SECONDS; else unanswered 'it could not be launched'; fi
      else
        answered=$SECONDS
        [[ $(printf '%s\n' "${said[@]}" | sort -u) == 0 ]] && exit 0
        for code in "${said[@]}"; do
          if ((code > 0 && code < 128)); then
            printf 'resume.sh: %s: the run has ended with code %d; see logs.sh\n' \
              "$name" "$code" >&2
            exit "$code"
          fi
        done
        lose "the run was ended by a signal (codes ${said[*]})"
        install_and_launch || unanswered 'it could not be launched'
      fi
      ;;
    SUSPENDING | SUSPENDED | FAILED)
      delete_and_replace "the slice is $now"
      ;;
    NONE)
      if [[ $seen && ! $replacing ]]; then
        lose 'the slice is gone'
      elif [[ ! $replacing ]]; then
        printf 'resume.sh: %s: there is no such slice yet; asking for it\n' "$name" >&2
      fi
      replacing=1
      replace
      ;;
    UNKNOWN) unanswered "its state is not known ($complaint)" ;;
    *) seen=1 answered=$SECONDS ;; # the service is at work
  esac
  pause "$poll"
done
