#!/usr/bin/env bash
# launch/local.sh N COMMAND …: N processes of `mirage COMMAND …` on this machine, one a GPU (or CPU ranks).
# It passes on SIGTERM, SIGINT and SIGUSR1: the ranks stop in order and its exit status is 75 (see mirage_dist/signals.py).
# A rank also stops in order when this script is killed.
# When a rank ends with an error, it names that rank, stops the others, and exits with that rank's status.
set -uo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N train CONFIG [key=value …]" >&2
  exit 2
fi
size=$1
shift
here=$PWD
[[ ${BASH_SOURCE[0]} != */* ]] || cd -- "${BASH_SOURCE[0]%/*}" || exit
cd .. || exit
repository=$PWD
cd -- "$here" || exit
python=${MIRAGE_PYTHON:-$repository/.venv/bin/python}
[[ -x $python ]] || python=python3
# This checkout runs, also from inside another one, whose code `python -m` would prefer without PYTHONSAFEPATH.
export PYTHONSAFEPATH=1 PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
grace=${MIRAGE_KILL_SECONDS:-10} # between asking a rank to end, after another has failed, and killing it
# What takes a program to find out. It is started here and read below: the request that comes meanwhile is for the ranks
# that are still to be started. Where bash 5.2 meets a trap in a command substitution, it may fail to parse the trap
# ("unexpected EOF while looking for matching `)'") and lose the request. So no substitution follows the traps, until a
# rank has failed and all are stopped anyway.
exec {facts}< <(exec "$python" -c '
import os, socket
s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1], os.readlink("/proc/self/ns/pid"), len(os.sched_getaffinity(0)))')

asked=
declare -A rank_of=()
trap 'asked=TERM; signal_ranks TERM' TERM INT
trap 'asked=USR1; signal_ranks USR1' USR1
signal_ranks() {
  local pid tries
  for pid in "${!rank_of[@]}"; do
    # A copy of this shell, which a rank is until it has become Python, would take the signal and do nothing.
    for ((tries = 0; tries < 100; tries++)); do
      [[ /proc/$pid/exe -ef /proc/$$/exe ]] || break
      sleep 0.01
    done
    kill -"$1" "$pid" 2>/dev/null
  done
}
read -r boot </proc/sys/kernel/random/boot_id
read -r port namespace cores <&"$facts" || exit
exec {facts}<&-

# A rank stops in order when this script has been killed, or a process before it in the list (mirage_dist/liveness.py).
export MIRAGE_PARENTS="${MIRAGE_PARENTS:-} $boot/$namespace/$$"
export MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-$port} WORLD_SIZE=$size
# Ranks share the cores: more threads than cores slow every rank down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > size ? cores / size : 1))}

for ((rank = 0; rank < size; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "$python" -m mirage_dist.cli "$@" &
  rank_of[$!]=$rank
done
exec 3>&2 2>/dev/null # bash would report each killed process a second time
[[ ! $asked ]] || signal_ranks "$asked"

status=0
while ((${#rank_of[@]})); do
  wait -n -p ended "${!rank_of[@]}"
  code=$?
  if [[ -z ${ended:-} ]]; then
    # A rank that ended together with the last one is not found by `wait -n`, but its status is kept.
    for pid in "${!rank_of[@]}"; do
      kill -0 "$pid" 2>/dev/null || { wait "$pid"; code=$?; ended=$pid; break; }
    done
    [[ -n ${ended:-} ]] || continue # a signal to this script ended the wait
  fi
  # Killed by the request: it had only just started, and could not answer yet.
  if [[ $asked && $code =~ ^(138|143)$ ]]; then code=75; fi
  if ((code && !status)); then
    status=$code
    if ((code == 75)); then
      [[ $asked ]] || signal_ranks TERM # one rank alone was asked, and the others cannot go on without it
    else
      how=
      ((code == 137)) && how=" (SIGKILL, which the kernel sends when memory runs out)"
      ((code > 128 && code != 137)) && how=" (SIG$(kill -l "$code"))"
      echo "launch/local.sh: rank ${rank_of[$ended]} ended with status $code$how; stopping the others" >&3
      signal_ranks TERM
      # A rank that hangs, or waits for the one that ended, does not react to SIGTERM.
      (sleep "$grace" && kill -KILL "${!rank_of[@]}") >/dev/null 2>&1 3>&- &
      killer=$!
    fi
  fi
  unset "rank_of[$ended]" ended
done
[[ -z ${killer:-} ]] || kill "$killer" 2>/dev/null
exit "$status"
