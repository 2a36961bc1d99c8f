#!/usr/bin/env bash
# Starts one command as several processes on this machine, as a pod would, with simulated devices.
#
#   local.sh --processes 4 --devices 2 -- fope train --config configs/quickstart.py --workdir runs/x
#
#   --processes N   how many (2)
#   --devices D     simulated CPU devices of each (1)
#   --port PORT     of the coordinator on 127.0.0.1 (a free one)
#   --timeout S     seconds to wait for the last process (120)
#   --grace S       seconds that processes get to end after a failure or a signal (10)
#   --dry-run       prints the commands and runs none
#   --help
#
# Lines of process 0 come as they are, those of process 2 after "[2] ". When one fails, the others
# are stopped. Ends with 0 when all have ended well, otherwise with the code of the first failure.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

processes=2 devices=1 port='' timeout=120 grace=10
values=(processes devices port timeout grace)
parse "$@"
for key in processes devices timeout grace; do count "$key"; done
((${#rest[@]})) || fail "nothing to run; give -- COMMAND"

# Nobody answers at a free port. The range lies below the ports that the system hands out itself.
while [[ -z $port ]]; do
  port=$((20000 + RANDOM % 12000))
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then port=''; fi
done

own() { # own ID: the environment of one process
  environment=(
    "FOPE_COORDINATOR=127.0.0.1:$port" "FOPE_NUM_PROCESSES=$processes" "FOPE_PROCESS_ID=$1"
    "FOPE_DISTRIBUTED_TIMEOUT=$timeout" "JAX_PLATFORMS=cpu"
    "XLA_FLAGS=--xla_force_host_platform_device_count=$devices${XLA_FLAGS:+ $XLA_FLAGS}"
  )
}

if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    own "$i"
    show env "${environment[@]}" "${rest[@]}"
  done
  exit 0
fi

# With job control each process leads a group of its own: Ctrl-C reaches this script alone, which
# passes it on once, and a process takes its children with it.
set -m
scratch=$(mktemp -d)
pids=() readers=() running=()
code=0 signal=''

start() { # start ID: one process, whose exit code goes to a file; `wait -n` may lose one
  trap : INT TERM HUP
  own "$1"
  local own_code=0
  env "${environment[@]}" "${rest[@]}" || own_code=$?
  echo "$own_code" >"$scratch/$1.new"
  mv "$scratch/$1.new" "$scratch/$1.code"
}

pass_on() { # pass_on SIGNAL: to the processes that still run
  local i
  for i in "${running[@]}"; do kill -s "$1" -- "-${pids[i]}" 2>/dev/null || true; done
}
trap 'rm -rf "$scratch"' EXIT
trap 'signal=INT; pass_on INT' INT
trap 'signal=TERM; pass_on TERM' TERM
trap 'signal=HUP; pass_on HUP' HUP

for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then
    start 0 &
  else
    mkfifo "$scratch/$i"
    sed -u "s/^/[$i] /" <"$scratch/$i" &
    readers+=($!)
    start "$i" >"$scratch/$i" 2>&1 &
  fi
  pids[i]=$!
  running+=("$i")
done

deadline=''
while ((${#running[@]})); do
  sleep 0.1 || true # a signal that came meanwhile has been passed on
  left=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then
      left+=("$i")
      continue
    fi
    own_code=137 # killed together with what would have written its code
    if [[ -f $scratch/$i.code ]]; then own_code=$(<"$scratch/$i.code"); fi
    ((code)) || code=$own_code
  done
  running=(${left[@]+"${left[@]}"})
  if [[ ! $deadline ]] && { ((code)) || [[ $signal ]]; }; then
    deadline=$((SECONDS + grace))
    if [[ ! $signal ]] && ((${#running[@]})); then
      printf 'local.sh: a process has ended with code %d; stopping the others\n' "$code" >&2
      pass_on TERM
    fi
  fi
  if [[ $deadline ]] && ((SECONDS >= deadline)); then pass_on KILL; fi
done
for pid in ${readers[@]+"${readers[@]}"}; do wait "$pid" 2>/dev/null || true; done
case $signal in
  HUP) exit 129 ;;
  INT) exit 130 ;;
  TERM) exit 143 ;;
  *) exit "$code" ;;
esac
