#!/usr/bin/env bash
# Runs `fope` on TPU slices of a Kubernetes cluster, through xpk; Kubernetes starts it again on
# other hosts after a preemption.
#
#   xpk.sh --name run1 --cluster tpus --zone us-east5-a --accelerator v5litepod-16 \
#     --image us-docker.pkg.dev/project/images/fope:1 -- \
#     train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1
#   xpk.sh --name run1 --cluster tpus --zone us-east5-a --logs
#   xpk.sh --name run1 --cluster tpus --zone us-east5-a --delete
#
#   --name NAME           of the workload
#   --cluster CLUSTER     made before with `xpk cluster create`
#   --zone ZONE
#   --accelerator TYPE    as in v5litepod-16
#   --slices N            slices in one run (1)
#   --image IMAGE         has fope_jax with its extras tpu and buckets installed
#   --source DIR          without --image: a checkout that xpk puts on --base-image, and that is
#                         installed at the start (the one of this script)
#   --base-image IMAGE    has Python 3.11 or newer (python:3.11)
#   --env NAME=VALUE      environment variable of the run; may be given again
#   --grace SECONDS       that it gets to write its checkpoint (300); spot nodes give 30 at most
#   --max-restarts N      starts after a failure or preemption (20)
#   --logs, --delete      follow or delete the workload
#   --project PROJECT     gcloud's own default where not given
#   --dry-run             prints the commands and runs none
#   --help

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cluster='' accelerator='' slices=1 image='' base_image=python:3.11 max_restarts=20 grace=300 env=()
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) logs='' delete=''
values=(cluster accelerator slices image source base_image max_restarts grace)
lists=(env)
flags=(logs delete)
parse "$@"
require name cluster zone

mapfile -t place < <(where)
if [[ $logs ]]; then follow_pods --namespace=default; fi
if [[ $delete ]]; then
  run xpk workload delete --workload="$name" --cluster="$cluster" "${place[@]}"
  exit
fi

require accelerator
count slices
count max_restarts
count grace
check_env
check_command
# Without exec, the SIGTERM of a preemption would end the shell that xpk starts, and not reach fope.
on_pod="exec fope $(show "${rest[@]}")"
if [[ $image ]]; then
  software=(--docker-image="$image")
else
  software=(--base-docker-image="$base_image" --script-dir="$source")
  on_pod="pip install --quiet -c constraints.txt -e '.[tpu,buckets]' && $on_pod"
fi
run xpk workload create --workload="$name" --cluster="$cluster" "${place[@]}" \
  --tpu-type="$accelerator" --num-slices="$slices" --max-restarts="$max_restarts" \
  --termination-grace-period-seconds="$grace" "${env[@]/#/--env=}" "${software[@]}" \
  --command="$on_pod"
