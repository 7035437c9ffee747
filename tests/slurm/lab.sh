#!/usr/bin/env bash
# A real Slurm on this machine, for tests and for trying things: everything under one directory, no systemd, no root.
#   tests/slurm/lab.sh install            Debian or Ubuntu packages that are missing (needs root, nothing else does)
#   tests/slurm/lab.sh start DIR          controller and two nodes; then export SLURM_CONF=DIR/etc/slurm.conf
#   tests/slurm/lab.sh stop DIR           cancels what runs and stops the daemons; `start` goes on with the same state
#   tests/slurm/lab.sh clean DIR          stop, and delete DIR
#   tests/slurm/lab.sh kill-node DIR NODE     SIGKILL to a node's daemon: a node failure, its processes run on
#   tests/slurm/lab.sh start-node DIR NODE    that node comes back
# LAB_NODES (2) is the number of nodes, LAB_NODE_TIMEOUT (10) the seconds of silence that make one down, LAB_KILL_WAIT
# (30) those between TERM and KILL; LAB_CONF has further lines for slurm.conf.
# Two partitions: `main`, and `high`, whose jobs preempt those of `main` (they are requeued).
# Nodes are named by loopback addresses, since what `scontrol show hostnames` prints is what torch connects to.
# They claim 128 CPUs and 8 GPUs (links to /dev/null), so that scripts for real nodes are accepted unchanged.
set -euo pipefail
PATH=$PATH:/usr/sbin # where the daemons are, and not everyone looks

packages=(slurmctld slurmd slurm-client munge)
usage() {
  sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

install_slurm() {
  local name missing=
  for name in slurmctld slurmd sbatch munged; do
    command -v "$name" >/dev/null || missing+=" $name"
  done
  [[ $missing ]] || return 0
  if ! command -v apt-get >/dev/null || [[ $(id -u) != 0 ]]; then
    echo "lab.sh: not found:$missing; install needs apt-get and root, for the packages ${packages[*]}" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

# The first block of ports that nobody listens on: below the ephemeral ones, above those of jobs (10000 to 29999).
free_ports() {
  local block port
  for block in {0..99}; do
    for ((port = 30000 + 20 * block; port < 30020 + 20 * block; port++)); do
      ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
    done
    echo $((30000 + 20 * block))
    return
  done
  echo "lab.sh: no free ports between 30000 and 32000" >&2
  exit 1
}

plugins() {
  local folder
  for folder in /usr/lib/*/slurm-wlm /usr/lib/*/slurm /usr/lib64/slurm; do
    if [[ -d $folder ]]; then echo "$folder" && return; fi
  done
  echo "lab.sh: Slurm's plugin folder was not found under /usr/lib" >&2
  exit 1
}

configure() {
  local port host user block
  port=$(free_ports) host=$(hostname -s) user=$(id -un) block=$(((port - 30000) / 20))
  mkdir -p "$lab"/{etc,run,log,state,spool,gpu}
  (umask 077 && head -c 128 /dev/urandom >"$lab/etc/munge.key")
  # Without a word in it slurmd looks for cgroups, which containers often lack.
  echo "CgroupPlugin=cgroup/v1" >"$lab/etc/cgroup.conf"
  for gpu in {0..7}; do ln -s /dev/null "$lab/gpu/$gpu"; done
  echo "Name=gpu File=$lab/gpu/[0-7]" >"$lab/etc/gres.conf"
  : >"$lab/etc/plugstack.conf"
  cat >"$lab/etc/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential expired, two minutes by default.
AuthInfo=socket=$lab/run/munge.sock,cred_expire=5
PluginDir=$(plugins)
PlugStackConfig=$lab/etc/plugstack.conf
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool/%n
SlurmctldPidFile=$lab/run/slurmctld.pid
SlurmdPidFile=$lab/run/slurmd-%n.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdLogFile=$lab/log/slurmd-%n.log
# Jobs of two labs on one machine must not get the same id: the rendezvous port comes from it.
FirstJobId=$((200 * block + 1))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=${LAB_NODE_TIMEOUT:-10}
MessageTimeout=5
KillWait=${LAB_KILL_WAIT:-30}
MinJobAge=3600
MaxArraySize=10001
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=128 Boards=1 SocketsPerBoard=1 CoresPerSocket=128 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:8
$(for ((i = 1; i <= ${LAB_NODES:-2}; i++)); do
    echo "NodeName=127.0.$block.1$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i))"
  done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
${LAB_CONF:-}
CONF
}

nodes() { sed -n 's/^NodeName=\(127[0-9.]*\) .*/\1/p' "$SLURM_CONF"; }

start_lab() {
  [[ -f $SLURM_CONF ]] || configure
  # --force: a folder that other users cannot enter will do, since nobody else uses this Slurm.
  munged --force --key-file="$lab/etc/munge.key" --socket="$lab/run/munge.sock" --pid-file="$lab/run/munged.pid" \
    --log-file="$lab/log/munged.log" --seed-file="$lab/state/munged.seed"
  slurmctld # by this name: Debian also has slurmctld-wlm, which does not know that it is the controller
  for node in $(nodes); do start_node "$node"; done
  for _ in {1..150}; do
    if [[ $(sinfo --noheader --Node --format=%T --partition=main 2>/dev/null | sort -u) == idle ]]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.1
  done
  sinfo --Node >&2 || true
  tail -n 5 "$lab"/log/slurm*.log >&2
  exit 1
}

start_node() {
  mkdir -p "$lab/spool/$1"
  # In the foreground of a shell of its own, for what it says when it dies, and with which status, is in no log of its.
  (
    status=0
    setsid --wait slurmd -D -N "$1" || status=$?
    echo "slurmd $1 ended with status $status"
  ) </dev/null >>"$lab/log/$1.txt" 2>&1 &
}

# A zombie counts as gone: in a container the first process may reap late or never.
alive() {
  local state
  state=$(sed 's/.*) //; s/ .*//' "/proc/$1/stat" 2>/dev/null) && [[ $state != Z ]]
}

stop_daemon() {
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null || return 0
  for _ in {1..200}; do
    alive "$pid" || return 0
    sleep 0.05
  done
  kill -KILL "$pid"
}

# Processes of this lab's jobs, wherever they run: a node failure leaves some that no daemon knows of.
job_processes() {
  local file
  for file in /proc/[0-9]*/environ; do
    { tr '\0' '\n' <"$file"; } 2>/dev/null | grep -qxF "SLURM_CONF=$SLURM_CONF" || continue
    file=${file%/environ}
    if { tr '\0' '\n' <"$file/environ"; } 2>/dev/null | grep -q '^SLURM_JOB_ID=' ||
      grep -q '^slurmstepd' "$file/cmdline" 2>/dev/null; then
      echo "${file#/proc/}"
    fi
  done
}

stop_lab() {
  [[ -f $SLURM_CONF ]] || return 0
  local jobs daemon left
  jobs=$(squeue --noheader --format=%A 2>/dev/null | sort -u) || jobs=
  if [[ -n $jobs ]]; then
    # shellcheck disable=SC2086  # one id a word
    scancel --full $jobs 2>/dev/null || true
    for _ in {1..50}; do
      [[ -n $(squeue --noheader 2>/dev/null) ]] || break
      sleep 0.1
    done
  fi
  left=$(job_processes)
  # shellcheck disable=SC2086
  [[ -z $left ]] || kill -KILL $left 2>/dev/null || true
  for daemon in "$lab"/run/slurmd-*.pid "$lab/run/slurmctld.pid" "$lab/run/munged.pid"; do stop_daemon "$daemon"; done
}

action=${1:-}
if [[ $action == install ]]; then
  install_slurm
  exit
fi
[[ $# -ge 2 ]] || usage
lab=$(realpath -m "$2")
export SLURM_CONF=$lab/etc/slurm.conf
case $action in
  start) start_lab ;;
  stop) stop_lab ;;
  clean)
    # Only what `start` made is deleted.
    if [[ -f $SLURM_CONF ]]; then stop_lab && rm -rf "$lab"; fi
    ;;
  kill-node) kill -KILL "$(cat "$lab/run/slurmd-${3:?NODE}.pid")" ;;
  start-node) start_node "${3:?NODE}" ;;
  *) usage ;;
esac
