#!/usr/bin/env bash
# Installs fope_jax on every host of a slice, in ~/fope of each.
#
#   install.sh --name run1 --zone us-east5-a
#   install.sh --name run1 --zone us-east5-a --source 'fope-jax[tpu,buckets] @ git+https://HOST/REPOSITORY'
#
#   --name NAME           of the queued resource
#   --zone ZONE
#   --source DIR|PACKAGE  a checkout, which is packed and copied (the one of this script), or
#                         what pip can install
#   --python COMMAND      Python of the hosts, 3.11 or newer (python3)
#   --project PROJECT     gcloud's own default where not given
#   --dry-run             prints the commands and runs none
#   --help

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) python=python3
values=(source python)
parse "$@"
require name zone source python

on_hosts "$python -m venv fope/venv && fope/venv/bin/pip install --quiet --upgrade pip"
if [[ -d $source ]]; then
  archive=${TMPDIR:-/tmp}/fope-source.tar.gz
  run tar -czf "$archive" --exclude=__pycache__ -C "$source" \
    pyproject.toml setup.py README.md LICENSE constraints.txt fope_jax configs experiments
  mapfile -t place < <(where)
  run gcloud compute tpus queued-resources scp "$archive" "$name:" "${place[@]}" \
    --node=all --worker=all --quiet
  on_hosts "mkdir -p fope/source && tar -xzf fope-source.tar.gz -C fope/source && cd fope/source \
&& ../venv/bin/pip install --quiet -c constraints.txt -e '.[tpu,buckets]'"
else
  on_hosts "fope/venv/bin/pip install --quiet '$source'"
fi
on_hosts "fope/venv/bin/fope methods > /dev/null && hostname"
