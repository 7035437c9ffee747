#!/usr/bin/env bash
# launch/local.sh N COMMAND …: N processes of `mirage COMMAND …` on this machine, one a GPU (or CPU ranks).
# When one ends with an error the others are stopped at once, and its exit status is ours.
set -uo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N train CONFIG [key=value …]" >&2
  exit 2
fi
size=$1
shift
python=${MIRAGE_PYTHON:-$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python}
[[ -x $python ]] || python=python3

export MASTER_ADDR=127.0.0.1 WORLD_SIZE=$size
export MASTER_PORT=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
# Ranks share the cores: more threads than cores slow every rank down.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > size ? cores / size : 1))}

pids=()
for ((rank = 0; rank < size; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "$python" -m mirage_dist.cli "$@" &
  pids+=($!)
done
stop() { kill "${pids[@]}" 2>/dev/null; }
trap 'stop; wait; exit 143' TERM
trap 'stop; wait; exit 130' INT
status=0
for _ in "${pids[@]}"; do
  wait -n || { status=$?; stop; break; }
done
wait
exit "$status"
