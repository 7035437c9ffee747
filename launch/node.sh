#!/usr/bin/env bash
# launch/node.sh COMMAND …: `mirage COMMAND …` as a process of a Slurm step, and the environment it runs in.
#   srun launch/node.sh train …                                one task a GPU: what slurm/*.sh do
#   MIRAGE_LAUNCHER=torchrun srun --ntasks-per-node=1 …        one task a node; torchrun starts the ranks
#   MIRAGE_LAUNCHER=deepspeed srun --ntasks-per-node=1 …       the same with DeepSpeed's launcher
# Rank and world size come from Slurm's variables or from the launcher's (mirage_dist/ranks.py reads either).
# Everything about the environment is here; each variable can be set from outside, such as
# `NCCL_DEBUG=INFO sbatch slurm/sft.sh`, since sbatch and srun pass the environment on.
set -euo pipefail
here=$PWD
[[ ${BASH_SOURCE[0]} != */* ]] || cd -- "${BASH_SOURCE[0]%/*}" || exit
cd .. || exit
repository=$PWD
cd -- "$here" || exit
# A request to stop that comes before there is a process: a launcher's worker ends with 75, as the process would, and
# leaves its status where the launcher looks, which also puts there the request that came before it could be signalled.
# Every other script is killed, which slurm/common.sh takes for 75. It has no trap yet, for the command substitutions
# below: where bash 5.2 meets a trap in one, it may fail to parse the trap, and lose the request.
if [[ ${MIRAGE_LAUNCHER:-} == worker ]]; then
  trap 'exit 75' USR1 TERM
  # shellcheck disable=SC2153  # the launcher's
  trap '{ echo "$?" >"$MIRAGE_WORKERS/$LOCAL_RANK"; } 2>/dev/null || true' EXIT
  [[ ! -e $MIRAGE_WORKERS/stop ]] || exit 75
fi
: "${SLURM_STEP_NODELIST:?launch/node.sh is started by srun; on one machine use launch/local.sh}"

# The Python that has this project's packages; it runs this checkout, whatever the working directory is: without
# PYTHONSAFEPATH, `python -m` would prefer the code of a checkout in which the job was submitted.
python=${MIRAGE_PYTHON:-$repository/.venv/bin/python}
[[ -x $python ]] || python=python3
export PYTHONSAFEPATH=1 PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# Lines reach the log when they are written, not when a buffer is full.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}

# Rendezvous: the step's first node, and a port from the job id, below the ephemeral ones, so that two jobs on a node
# do not meet. Names of their own to override them, as MASTER_* may be left over from the shell that submitted. A
# launcher's worker has them from the launcher.
if [[ ${MIRAGE_LAUNCHER:-} != worker ]]; then
  hosts=${MIRAGE_HOSTS:-} # of slurm/common.sh: an image has no scontrol
  hosts=${hosts// /$'\n'}
  for _ in {1..10}; do
    [[ ! $hosts ]] || break
    hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST") || sleep 1
  done
  mapfile -t hosts <<<"${hosts:?scontrol does not name the hosts of $SLURM_STEP_NODELIST}"
  export MASTER_ADDR=${MIRAGE_MASTER_ADDR:-${hosts[0]}}
  export MASTER_PORT=${MIRAGE_MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
fi
# The network interface between nodes (such as ib0 or eth0), where NCCL's or gloo's own choice is wrong.
if [[ ${MIRAGE_INTERFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$MIRAGE_INTERFACE}
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$MIRAGE_INTERFACE}
fi
# NCCL says what went wrong; INFO also says which interfaces and transports it chose.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A process whose NCCL watchdog is stuck ends after this many seconds instead of holding the nodes.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}

# Compute nodes have no internet on most clusters: models and data come from the cache, without a try to download.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# Where that cache is: a file system that all nodes see; often the home directory is too small.
export HF_HOME=${HF_HOME:-${HOME:-/tmp}/.cache/huggingface}
# Temporary files stay on the node's own disk.
export TMPDIR=${TMPDIR:-${SLURM_TMPDIR:-/tmp}}
mkdir -p "$TMPDIR"
# Threads of a process: the cores that Slurm gave it, shared by what a launcher starts.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# answer STATUS: out with it. srun tells the batch script the largest status of all tasks. When one fails, srun tells the
# others to stop, and they say 75 (stopped on request): a failure has to be larger, or it would be taken for that and
# started again. Whom a signal killed had nothing to save yet, or had saved.
answer() {
  local status=$1
  case $status in
    0) ;;
    138 | 143) status=75 ;;
    *) if ((status < 75)); then status=$((100 + (status < 27 ? status : 27))); fi ;;
  esac
  exit "$status"
}

# One task a node: the launcher `$1` starts a worker a GPU, each of which is this script again.
start_workers() {
  local launcher=$1 gpus=() world node asked=0 before pid status statuses worker
  shift
  IFS=, read -ra gpus <<<"${MIRAGE_GPUS:-${CUDA_VISIBLE_DEVICES:-}}"
  if ((${#gpus[@]} == 0)); then
    echo "node.sh: this node has no GPU: set MIRAGE_GPUS=0,1 to start two workers on the CPU" >&2
    exit 2
  fi
  MIRAGE_WORKERS=$(mktemp -d "$TMPDIR/mirage-workers-XXXXXXXX")
  export MIRAGE_WORKERS
  export MIRAGE_LAUNCHER=worker OMP_NUM_THREADS=$((OMP_NUM_THREADS > ${#gpus[@]} ? OMP_NUM_THREADS / ${#gpus[@]} : 1))
  worker=("$python" -c "$heed" "$0" "$@")
  case $launcher in
    torchrun)
      # A static rendezvous keeps rank 0 on the first node, where MASTER_ADDR is. Its main function, since its command
      # prints a page for each worker that does not say 0.
      set -- -c "$torchrun" --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="${#gpus[@]}" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        --signals-to-handle=SIGINT --no-python "${worker[@]}"
      ;;
    deepspeed)
      for node in "${hosts[@]}"; do world+="${world:+, }\"$node\": [$(IFS=, && echo "${gpus[*]}")]"; done
      set -- -m deepspeed.launcher.launch --world_info="$(base64 -w 0 <<<"{$world}" | tr '+/' '-_')" \
        --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --log_level=warning \
        --no_python --no_local_rank "${worker[@]}"
      ;;
  esac
  # Slurm signals the launcher as well as the workers: these stop in good order, and it has to wait for them.
  trap 'asked=$((asked + 1)) && : >"$MIRAGE_WORKERS/stop"' USR1 TERM
  (trap '' USR1 TERM && exec "$python" "$@") &
  pid=$!
  while :; do
    before=$asked status=0
    # A signal ends this wait early; then wait again.
    wait "$pid" || status=$?
    [[ $asked != "$before" ]] || break
  done
  # The workers' own statuses count. The launcher's says less: DeepSpeed's answers a TERM with 1, such as the one that
  # srun sends it when the launcher of another node has ended first, with 75.
  mapfile -t statuses < <(cat "$MIRAGE_WORKERS"/[0-9]* 2>/dev/null | sort -n)
  trap '' USR1 TERM
  rm -rf "$MIRAGE_WORKERS"
  if ((${#statuses[@]} == ${#gpus[@]})); then status=${statuses[-1]}; fi
  answer "$status"
}
# A shell cannot trap what it inherits as ignored, and launchers hand it down.
heed='
import os, signal, sys
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
'
torchrun='
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    status = error.get_first_failure()[1].exitcode
    sys.exit(status if status >= 0 else 128 - status)
'

case ${MIRAGE_LAUNCHER:-srun} in
  srun)
    # Left over from a shell that was itself a rank, these would be believed before Slurm's.
    unset RANK LOCAL_RANK WORLD_SIZE
    ;;
  torchrun | deepspeed) start_workers "$MIRAGE_LAUNCHER" "$@" ;;
  worker) ;;
  *)
    echo "node.sh: MIRAGE_LAUNCHER=$MIRAGE_LAUNCHER; allowed: srun, torchrun, deepspeed" >&2
    exit 2
    ;;
esac

local_rank=${LOCAL_RANK:-${SLURM_LOCALID:-0}}
# A compiler cache of each process: on a shared one, ranks wait for each other's locks or read half-written files.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$TMPDIR/triton-$UID/$local_rank}
# DeepSpeed's compiled ops likewise, and anew at each start: nobody ever frees the lock of a killed build.
extensions=$TMPDIR/torch_extensions-$UID/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}/$local_rank
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$extensions}

# An evaluation has no process group: every task of every element of the job array is a worker that begins at a place
# of its own in the work list.
if [[ ${1:-} == eval ]]; then
  # The elements of a sweep's array have an evaluation each (slurm/sweep.sh).
  if [[ ${MIRAGE_ELEMENT_ALONE:-} ]]; then unset SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_MIN SLURM_ARRAY_TASK_COUNT; fi
  tasks=${SLURM_NTASKS:-1}
  place=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) * tasks + SLURM_PROCID))
  set -- "$@" --worker "$place/$((${SLURM_ARRAY_TASK_COUNT:-1} * tasks))"
  # Each its share of the node's GPUs: with one task a GPU, that is one GPU; with fewer tasks a group of them, for
  # generation.tensor_parallel. A task that sees no more than its share was dealt it by Slurm, and keeps it. A launcher
  # starts one worker a GPU.
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
  neighbours=1 node=${SLURM_GPUS_ON_NODE:-0} # the most tasks on a node of this step: "2(x3),1" is 2
  layout=${SLURM_STEP_TASKS_PER_NODE:-$(((tasks + ${SLURM_NNODES:-1} - 1) / ${SLURM_NNODES:-1}))}
  for word in ${layout//,/ }; do
    word=${word%%(*}
    if ((word > neighbours)); then neighbours=$word; fi
  done
  if [[ ${MIRAGE_LAUNCHER:-} == worker ]]; then neighbours=${#gpus[@]} node=0; fi
  if ((node < ${#gpus[@]})); then node=${#gpus[@]}; fi
  each=$((node > neighbours && neighbours ? node / neighbours : 1))
  if ((${#gpus[@]} > each)); then
    share=("${gpus[@]:local_rank * each % ${#gpus[@]}:each}")
    # No command substitution, for the trap of a launcher's worker (see above).
    printf -v CUDA_VISIBLE_DEVICES ',%s' "${share[@]}"
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:1}
  fi
fi
# Slurm signals this script as well as the process, whose answer counts.
trap : USR1 TERM
status=0
"$python" -m mirage_dist.cli "$@" || status=$?
answer "$status"
