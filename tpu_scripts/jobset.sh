#!/usr/bin/env bash
# Runs `fope` on TPU slices of a GKE cluster as a JobSet; Kubernetes starts it again on other hosts
# after a preemption. The cluster has node pools of the slice and the JobSet controller.
#
#   jobset.sh --name run1 --slice v5e:4x4 --image us-docker.pkg.dev/project/images/fope:1 -- \
#     train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1
#   jobset.sh --name run1 --status
#   jobset.sh --name run1 --logs
#   jobset.sh --name run1 --delete
#
#   --name NAME             of the JobSet
#   --slice VERSION:SHAPE   as for `fope plan`: v4:2x2x2, v5e:4x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x2
#   --slices N              slices in one run, each in a node pool of its own (1)
#   --chips-per-host N      of the node pool's machine type (4, or all of a smaller slice)
#   --image IMAGE           has fope_jax with its extras tpu and buckets installed
#   --env NAME=VALUE        environment variable of the run; may be given again
#   --spot                  on nodes that may be taken away
#   --grace SECONDS         that a run gets to write its checkpoint (300); spot nodes give 30 at most
#   --max-restarts N        starts after a failure or preemption (20)
#   --namespace NAMESPACE   (default)
#   --service-account NAME  of Kubernetes, which may use the bucket (default)
#   --status, --logs, --delete
#   --dry-run               prints the manifest, or the commands, and runs none
#   --help

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

slice='' slices=1 chips_per_host='' image='' spot='' grace=300 max_restarts=20 env=()
namespace=default service_account=default status='' logs='' delete=''
values=(slice slices chips_per_host image grace max_restarts namespace service_account)
lists=(env)
flags=(spot status logs delete)
parse "$@"
require name namespace

if [[ $logs ]]; then follow_pods --namespace="$namespace"; fi
if [[ $status ]]; then
  run kubectl get jobset "$name" --namespace="$namespace"
  run kubectl get pods --namespace="$namespace" --output=wide \
    --selector="jobset.sigs.k8s.io/jobset-name=$name"
  exit
fi
if [[ $delete ]]; then
  run kubectl delete jobset "$name" --namespace="$namespace"
  exit
fi

require slice image service_account
for key in slices grace max_restarts; do count "$key"; done
check_env
check_command
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name '$name'; accepted: up to 40 lower-case letters, digits and -, a letter first"

declare -A accelerators=([v4]=tpu-v4-podslice [v5e]=tpu-v5-lite-podslice [v5p]=tpu-v5p-slice
  [v6e]=tpu-v6e-slice [tpu7x]=tpu7x)
accelerator=${accelerators[${slice%%:*}]:-}
topology=${slice#*:}
[[ $accelerator && $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  fail "--slice '$slice'; accepted: v4, v5e, v5p, v6e or tpu7x, and its shape, as in v5e:4x4"
chips=$((${topology//x/*}))
[[ $chips_per_host ]] || chips_per_host=$((chips < 4 ? chips : 4))
count chips_per_host
((chips % chips_per_host == 0)) ||
  fail "--slice $slice has $chips chips, no whole hosts of --chips-per-host $chips_per_host"
((slices == 1 || chips > chips_per_host)) ||
  fail "--slices $slices: --slice $slice is one host; GKE joins only slices of several hosts"

# A string of JSON, which is one of YAML too.
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  printf '"%s"' "${text//$'\t'/\\t}"
}

arguments='[' variables='[' on_spot=''
for word in fope "${rest[@]}"; do arguments+="$(quoted "$word"), "; done
for one in "${env[@]}"; do
  variables+="{name: ${one%%=*}, value: $(quoted "${one#*=}")}, "
done

manifest=$(<"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")
fill() { manifest=${manifest//"{{$1}}"/"$2"}; } # fill NAME VALUE
fill name "$name"
fill namespace "$(quoted "$namespace")"
fill image "$(quoted "$image")"
fill service_account "$(quoted "$service_account")"
fill max_restarts "$max_restarts"
fill grace "$grace"
fill slices "$slices"
fill hosts "$((chips / chips_per_host))"
fill chips "$chips_per_host"
fill accelerator "$accelerator"
fill topology "$topology"
[[ ! $spot ]] || on_spot=$'\n              cloud.google.com/gke-spot: "true"'
fill spot "$on_spot"
fill env "${variables%, }]"
fill command "${arguments%, }]" # last: what the user gives is not filled in again
if [[ $dry_run ]]; then
  printf '%s\n' "$manifest"
else
  installed kubectl
  kubectl apply --filename=- <<<"$manifest"
fi
