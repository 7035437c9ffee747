# shellcheck shell=bash
# Sourced by every script here. A job runs one step, `launch/node.sh COMMAND …` on every task:
#   USR1 to this script (the time limit is near; scancel -b -s USR1 JOB): the step is asked to stop, its state is
#     committed, and the same job is requeued. It resumes by itself.
#   TERM (scancel; preemption; a node failed): Slurm tells the step by itself and decides whether the job comes back.
# A step's status: 0 finished; 75 stopped on request, state committed; 1 failed; 2 bad input. Failures are not requeued.
# MIRAGE_DRY_RUN=1 makes a dry run first (train.dry_run), at the first start of a job; when it fails, the job ends with
# its status and the run is not started.
# launch/node.sh has the environment of the processes, slurm/container.sh what it takes to run them in an image.
set -euo pipefail

home=${MIRAGE_HOME:-$SLURM_SUBMIT_DIR}
if [[ ! -x $home/launch/node.sh ]]; then
  echo "no launch/node.sh under $home: submit from the checkout, or set MIRAGE_HOME to it" >&2
  exit 2
fi
home=$(cd "$home" && pwd)
# shellcheck source=slurm/container.sh
source "$home/slurm/container.sh"
contain "$home"
unset MIRAGE_HOSTS MIRAGE_COMMIT # of another job, where that has submitted this one
if [[ ${MIRAGE_CONTAINER:-} ]]; then
  # The host's Python means nothing in the image, and packages in the home directory are for the host's.
  export MIRAGE_PYTHON=${MIRAGE_CONTAINER_PYTHON:-python3} PYTHONNOUSERSITE=1
  # The image has no git, and the manifest, W&B and the model's card name the commit of this checkout. A folder that
  # `mirage init` made may lie in a repository of its own, whose commit says nothing about the code.
  if [[ -e $home/.git && -d $home/mirage_dist ]]; then
    MIRAGE_COMMIT=$(git -C "$home" rev-parse HEAD) || echo "the manifest of a run will name no commit: see above" >&2
    export MIRAGE_COMMIT
  fi
  # The image has no scontrol, which launch/node.sh would ask.
  for _ in {1..10}; do
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") && break
    sleep 1
  done
  : "${hosts:?scontrol does not name the hosts of $SLURM_JOB_NODELIST}"
  export MIRAGE_HOSTS=${hosts//$'\n'/ }
fi
# An array element is signalled by this name; by SLURM_JOB_ID the last one would stand for the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# With sbatch --export=…, srun would hide this job's environment from the step.
unset SLURM_EXPORT_ENV
# srun does not read sbatch's --cpus-per-task.
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

step=     # process id of srun
request=  # USR1 or TERM, once this script has received it
signals=0 # how many it got
courier=  # process id of `pass_on`
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

# No command substitution: where bash 5.2 meets a trap in one, it may fail to parse the trap, and lose the request.
say() { printf '%(%F %T)T job %s, start %d: %s\n' -1 "$job" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*"; }

on_signal() {
  signals=$((signals + 1))
  # A TERM that follows a USR1 has the last word: Slurm decides about the job.
  [[ $request == TERM ]] || request=$1
  say "got $1"
  if [[ $step ]]; then send; fi
}

# Start `pass_on`, in the place of the one for the request before.
send() {
  if [[ $courier ]]; then
    kill "$courier" 2>/dev/null || true
    wait "$courier" || true
  fi
  # In the background: the next signal, and the end of the step, are not waited for by a command that hangs.
  pass_on "$request" &
  courier=$!
}

# pass_on SIGNAL: signal the step, unless Slurm ends this start of the job itself and signals the step. It tries for as
# long as the step runs, since the controller may be busy; and signals again, less and less often, since a process that
# is only starting (Slurm's, or a shell that is about to become Python) may take a signal and do nothing, whatever Slurm
# answers. More than one do no harm. The signal goes through Slurm, since on a TERM srun would kill the processes at once.
pass_on() {
  local problem steps pause=1 failed=
  while kill -0 "$step" 2>/dev/null; do
    look
    [[ $stands != slurm ]] || return 0
    if [[ $stands == ours ]]; then
      if ! steps=$(squeue --noheader --steps --job="$job" --format=%i 2>&1); then
        problem=$steps
      elif grep -q '\.[0-9]' <<<"$steps"; then
        if problem=$(scancel --signal="$1" "$job" 2>&1); then
          [[ ! $failed ]] || say "$1 is passed on"
          failed=
          sleep "$pause"
          pause=$((pause < 32 ? 2 * pause : pause))
          continue
        fi
        problem=${problem:-scancel failed}
      fi
    fi
    if [[ $problem && ! $failed ]]; then
      failed=yes
      say "$1 could not be passed on to the processes, trying again: $problem"
    fi
    sleep 1
  done
}

# Where this start of the job stands with Slurm: stands=ours while it runs (the controller calls it SIGNALING while it
# sends the warning of --signal); slurm when Slurm ends it (cancelled, preempted, out of time), or has started the job
# again elsewhere while this script lived on (a node failed); unknown when Slurm does not answer, with the `problem`.
look() {
  stands=unknown problem=
  if ! record=$(scontrol --oneliner show job "$job" 2>&1); then
    problem=${record:-scontrol show job failed}
  elif [[ ! $record =~ \ JobState=([A-Z_]+) ]]; then
    problem="scontrol show job says: ${record:-nothing}"
  elif [[ ${BASH_REMATCH[1]} =~ ^(RUNNING|SIGNALING|CONFIGURING|RESIZING|SUSPENDED|STOPPED)$ &&
    $record == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
    stands=ours
  else
    stands=slurm
  fi
}

# After a stop on request: the same job again, unless Slurm ends it. Tries for as long as time is left.
requeue() {
  local problem failed=
  # A requeue ends this script too, by a TERM that would hit the command before it has answered.
  trap '' TERM
  while :; do
    look
    case $stands in
      slurm)
        if [[ $failed ]]; then
          say "stopped on request, and could not be requeued in time: submit it again and it resumes"
        else
          say "stopped on request; Slurm decides whether the job comes back"
        fi
        return
        ;;
      ours)
        if [[ $record == *" Requeue=0 "* ]]; then
          say "stopped on request; this job may not be requeued (--no-requeue): submit it again and it resumes"
          return
        elif problem=$(scontrol requeue "$job" 2>&1); then
          say "stopped on request; requeued"
          return
        elif [[ $problem =~ denied|disabled|not\ found ]]; then
          say "stopped on request, and Slurm refuses to requeue it ($problem): submit it again and it resumes"
          return
        fi
        ;;
    esac
    if [[ ! $failed ]]; then
      failed=yes
      say "stopped on request; not requeued, trying again: ${problem:-scontrol requeue failed}"
    fi
    sleep 1
  done
}

# run_recipe VERB DEFAULT [RECIPE.yaml] [key=value …]: `run` with the recipe that the user named, or else with DEFAULT of
# the checkout that runs; a dry run of training comes first where MIRAGE_DRY_RUN asks for it.
run_recipe() {
  local verb=$1 recipe=$home/$2
  shift 2
  if [[ ${1:-} == *.yaml && $1 != *=* ]]; then
    recipe=$1
    shift
  fi
  rehearse "$verb" "$recipe" "$@"
  run "$verb" "$recipe" "$@"
}

# rehearse COMMAND …: a dry run of a training, where MIRAGE_DRY_RUN asks for it; the job ends when it fails.
rehearse() {
  if [[ $1 == train && ${MIRAGE_DRY_RUN:-0} != 0 && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    perform "$@" train.dry_run=true
    if ((status)); then conclude; fi
    say "the dry run has passed"
  fi
}

# run COMMAND …: the step, to its end, and what follows from its status. Does not return.
run() {
  perform "$@"
  conclude
}

status=0 # of the last step
# perform COMMAND …: the step, to its end.
perform() {
  local before
  # A failed task ends the step at once, instead of leaving the others in a collective. Evaluation workers are
  # independent: the others go on, and the last one judges.
  local together=(--kill-on-bad-exit=1 --wait=60)
  [[ ${1:-} != eval ]] || together=(--kill-on-bad-exit=0 --wait=0)
  say "$SLURM_NNODES nodes ($SLURM_JOB_NODELIST): mirage $*"
  # In the background, since a trap runs only when no foreground command does.
  srun "${together[@]}" "${of_srun[@]}" "${within[@]}" "$home/launch/node.sh" "$@" &
  step=$!
  if [[ $request ]]; then send; fi
  while :; do
    before=$signals status=0
    # A signal ends this wait early, with a status of its own; then wait again.
    wait "$step" || status=$?
    [[ $signals != "$before" ]] || break
  done
  step=
  # The request can kill a task that is only just starting; launch/node.sh answers for every later one.
  if [[ $request == USR1 && $status =~ ^(138|143)$ ]]; then status=75; fi
}

# What follows from the status of the last step. Does not return.
conclude() {
  case $status in
    0) say "finished" ;;
    75)
      if [[ $request == TERM ]]; then
        say "stopped on request; Slurm decides whether the job comes back"
      else
        requeue
      fi
      ;;
    *)
      # launch/node.sh adds 100 to the status of a process.
      if ((status > 100 && status < 128)); then status=$((status - 100)); fi
      if [[ $request == TERM ]]; then
        say "ended by Slurm, with status $status"
      else
        say "failed with status $status; not requeued"
      fi
      ;;
  esac
  exit "$status"
}
