#!/usr/bin/env bash
# Asks for a TPU slice (a queued resource) and waits until it is there.
#
#   create.sh --name run1 --zone us-east5-a --accelerator v5litepod-16
#
#   --name NAME           of the queued resource and its slices
#   --zone ZONE           as in us-east5-a
#   --accelerator TYPE    as in v5litepod-16, v4-32, v6e-64
#   --runtime VERSION     software of the hosts; found by the accelerator where not given
#   --slices N            slices in one run, joined over the data centre's network (1)
#   --spot                cheaper, and may be taken away; see resume.sh
#   --reserved            from a reservation
#   --valid-for DURATION  gives the request up when it has waited this long, as in 6h
#   --timeout SECONDS     how long to wait here (86400); the request stays in the queue
#   --poll SECONDS        between two looks (60)
#   --look SECONDS        that gcloud gets to answer one of them (60)
#   --service-account EMAIL  that the hosts act as, in buckets too (the project's default one)
#   --network NETWORK, --subnetwork SUBNETWORK
#   --internal-ips        the hosts get no external addresses; they then need Cloud NAT to install,
#                         and the other scripts --internal-ip or --tunnel-through-iap
#   --data-disk source=projects/P/zones/Z/disks/D,mode=read-only
#                         a disk of each host; may be given again. Several hosts can only read one
#   --startup-script FILE that root runs at every start of a host, such as to mount the disk
#   --project PROJECT     gcloud's own default where not given
#   --dry-run             prints the commands and runs none
#   --help
#
# Ends with 0 when the slice is ACTIVE, 1 when the request has failed or the time is over, and 3 when
# it could not be made. A look that gets no answer is said, and taken again.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

accelerator='' runtime='' slices=1 spot='' reserved='' valid_for='' timeout=86400 poll=60 look=60
# shellcheck disable=SC2034 # read by their names
service_account='' network='' subnetwork='' internal_ips='' startup_script='' data_disk=()
values=(accelerator runtime slices valid_for timeout poll look service_account network subnetwork
  startup_script)
lists=(data_disk)
flags=(spot reserved internal_ips)
parse "$@"
require name zone accelerator
count slices
count timeout
count poll
count look
[[ $spot && $reserved ]] && fail "--spot and --reserved exclude each other"
[[ ! $startup_script || -f $startup_script ]] || fail "--startup-script '$startup_script' is no file"
for disk in "${data_disk[@]}"; do
  [[ ,$disk =~ ,source=projects/[^/]+/(zones|regions)/[^/]+/disks/[^,]+ ]] ||
    fail "--data-disk '$disk'; accepted: source=projects/P/zones/Z/disks/D,mode=read-only"
done

if [[ -z $runtime ]]; then
  case $accelerator in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "no runtime version is known for --accelerator '$accelerator'; give --runtime" ;;
  esac
fi

mapfile -t place < <(where)
command=(gcloud compute tpus queued-resources create "$name" "${place[@]}"
  --accelerator-type="$accelerator" --runtime-version="$runtime" --quiet)
if ((slices > 1)); then
  command+=(--node-count="$slices" --node-prefix="$name")
else
  command+=(--node-id="$name")
fi
[[ $spot ]] && command+=(--spot)
[[ $reserved ]] && command+=(--reserved)
[[ $valid_for ]] && command+=(--valid-until-duration="$valid_for")
for key in service_account network subnetwork; do
  [[ ! ${!key} ]] || command+=("--${key//_/-}=${!key}")
done
[[ $internal_ips ]] && command+=(--internal-ips)
for disk in "${data_disk[@]}"; do command+=(--data-disk="$disk"); done
[[ $startup_script ]] && command+=(--metadata-from-file="startup-script=$startup_script")
run "${command[@]}" || exit 3
wait_until_active "$timeout" "$poll" "$look"
