#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, a sweep on it, and no process left behind:
#
#   sbatch cluster/slurm.sh experiments/quickstart.yaml --results /shared/results
#
# All that follows the script goes to `sweep run`. Submit it again to go on after a time limit: what
# is finished is not trained again, and running trials have saved their states.
#SBATCH --job-name=fpt-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch $0 FILE [options of sweep run]" >&2
  exit 2
fi
: "${SLURM_JOB_NODELIST:?not inside a Slurm allocation: submit this with sbatch}"

python=${FPT_SWEEP_PYTHON:-python} # the one that has fpt-sweep
port=${FPT_SWEEP_PORT:-6379}
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Ray's own files stay on each node: shared by several, one would unpack over another's.
scratch=${FPT_SWEEP_SCRATCH:-/tmp}/fpt-sweep-$SLURM_JOB_ID

# A token for this cluster alone, since others are logged in on these nodes. Only its owner can read
# the folder, and it goes by a file's name, so that it is in no list of processes.
secrets=$(mktemp -d "${FPT_SWEEP_SHARED:-$HOME}/.fpt-sweep-XXXXXX")
"$python" -c 'import secrets; print(secrets.token_hex(32))' >"$secrets/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secrets/token RAY_USAGE_STATS_ENABLED=0

ends=()
driver=
finish() {
  trap - EXIT TERM INT
  if [ -n "$driver" ] && kill -0 "$driver" 2>/dev/null; then
    kill -TERM "$driver"
    wait "$driver" || true
  fi
  for end in "${ends[@]}"; do kill -TERM "$end" 2>/dev/null || true; done
  for end in "${ends[@]}"; do wait "$end" 2>/dev/null || true; done
  rm -rf "$secrets"
}
trap finish EXIT
# Before the time limit Slurm says so: running trials save their states.
trap 'finish; exit 143' TERM INT

on() { # NODE COMMAND...: one process on a node of the allocation, in the background
  local node=$1
  shift
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" "$@" &
  ends+=($!)
}

ip=$(srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" hostname --ip-address)
ip=${ip%% *}
# The driver runs on the head, whose cores train too: there is one driver, and many cores.
on "$head" "$python" -m ray.scripts.scripts start --block --head --node-ip-address="$ip" --port="$port" \
  --num-cpus="$cpus" --num-gpus="$gpus" --include-dashboard=false --temp-dir="$scratch"
"$python" - "$ip" "$port" <<'PYTHON'
import socket, sys, time

for _ in range(240):
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
        sys.exit()
    except OSError:
        time.sleep(0.5)
sys.exit(f"no Ray answers at {sys.argv[1]}:{sys.argv[2]}: see the output of the head above")
PYTHON
for node in "${nodes[@]:1}"; do
  on "$node" "$python" -m ray.scripts.scripts start --block --address="$ip:$port" \
    --num-cpus="$cpus" --num-gpus="$gpus"
done
# All nodes, before the sweep counts its workers; fewer after two minutes do too.
"$python" - "$ip:$port" "${#nodes[@]}" <<'PYTHON'
import logging, sys, time

import ray

ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
for _ in range(120):
    alive = sum(node["Alive"] for node in ray.nodes())
    if alive >= int(sys.argv[2]):
        break
    time.sleep(1)
print(f"{alive} of {sys.argv[2]} nodes are up", file=sys.stderr)
PYTHON

"$python" -m sweep run --address "$ip:$port" "$@" &
driver=$!
code=0
wait "$driver" || code=$?
driver=
exit "$code"
