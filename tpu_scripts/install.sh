#!/usr/bin/env bash
# Installs fope_jax on every host of a slice, in ~/fope of each, with the Python that it needs.
#
#   install.sh --name run1 --zone us-east5-a
#   install.sh --name run1 --zone us-east5-a --source 'fope-jax[tpu,buckets] @ git+https://HOST/REPOSITORY'
#
#   --name NAME           of the queued resource
#   --zone ZONE
#   --source DIR|PACKAGE  a checkout, which is packed and copied (the one of this script), or
#                         what pip can install
#   --python COMMAND      Python of the hosts, 3.11 or newer. Where not given: the newest that is
#                         there, else what uv brings (itself from pip), else python3.11 of apt-get
#   --internal-ip, --tunnel-through-iap   how the hosts are reached
#   --project PROJECT     gcloud's own default where not given
#   --dry-run             prints the commands and runs none
#   --help
#
# The commit of the checkout goes along, with "-dirty" where files differ from it, and is recorded in
# the run. Ends with 1 where one host has not all of it; the command may be repeated.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) python=''
values=(source python)
parse "$@"
require name zone source

files=(pyproject.toml setup.py README.md LICENSE constraints.txt fope_jax configs experiments)

if [[ ! -d $source ]]; then
  on_hosts installing "$(on_host install python="$python" package="$source" sum= \
    files="${files[*]} COMMIT")"
  exit
fi

# write_commit DIRECTORY: COMMIT there, as fope_jax reads it where .git has stayed behind.
write_commit() {
  local changes
  if git -C "$source" rev-parse HEAD >"$1/COMMIT" 2>/dev/null; then
    changes=$(git -C "$source" status --porcelain --untracked-files=no)
    [[ ! $changes ]] || printf '%s-dirty\n' "$(<"$1/COMMIT")" >"$1/COMMIT"
  elif [[ -f $source/COMMIT ]]; then
    cp "$source/COMMIT" "$1/COMMIT"
  else
    printf 'install.sh: %s is no git checkout; the runs will name no commit\n' "$source" >&2
    printf 'unknown\n' >"$1/COMMIT"
  fi
}

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
archive=$packed/fope-source.tar.gz sum=SHA256
write_commit "$packed"
run tar -czf "$archive" --exclude=__pycache__ -C "$source" "${files[@]}" \
  -C "$packed" COMMIT
[[ $dry_run ]] || sum=$(sha256sum "$archive" | cut -d ' ' -f 1)
mapfile -t place < <(reach all all)
run gcloud compute tpus queued-resources scp "$archive" "$name:" "${place[@]}"
on_hosts installing "$(on_host install python="$python" package= sum="$sum" \
  files="${files[*]} COMMIT")"
