# shellcheck shell=bash
# Sourced by every script here. A job runs one step, `launch/node.sh COMMAND …` on every task:
#   USR1 to this script (the time limit is near; scancel -b -s USR1 JOB): the step is asked to stop, its state is
#     committed, and the same job is requeued. It resumes by itself.
#   TERM (scancel; preemption; a node failed): Slurm tells the step by itself and decides whether the job comes back.
# A step's status: 0 finished; 75 stopped on request, state committed; 1 failed; 2 bad input. Failures are not requeued.
# launch/node.sh has the environment of the processes.
set -euo pipefail

home=${MIRAGE_HOME:-$SLURM_SUBMIT_DIR}
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
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

say() { echo "$(date '+%F %T') job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

on_signal() {
  signals=$((signals + 1))
  # A TERM that follows a USR1 has the last word: Slurm decides about the job.
  [[ $request == TERM ]] || request=$1
  say "got $1"
  if [[ $step ]]; then forward; fi
}

# Pass this script's signal on to the step, unless Slurm ends the job itself and has signalled the step. The signal goes
# through Slurm, since on a TERM srun would kill the tasks at once. Waits for a step that is still being set up.
forward() {
  still_ours || return 0
  until squeue --noheader --steps --job="$job" --format=%i 2>/dev/null | grep -q '\.[0-9]'; do
    kill -0 "$step" 2>/dev/null || return 0
    sleep 1
  done
  scancel --signal="$request" "$job" 2>/dev/null || true
}

# Whether Slurm still takes this start of the job for the one that runs: not when it is being cancelled, preempted or
# timed out, and not when a node failed and the job was started again elsewhere while this script lived on.
still_ours() {
  local record
  record=$(scontrol --oneliner show job "$job") || return 1
  [[ $record == *" JobState=RUNNING "* && $record == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# run_recipe VERB DEFAULT [RECIPE.yaml] [key=value …]: `run` with the recipe that the user named, or else the default.
run_recipe() {
  local verb=$1 recipe=$2
  shift 2
  if [[ ${1:-} == *.yaml && $1 != *=* ]]; then
    recipe=$1
    shift
  fi
  run "$verb" "$recipe" "$@"
}

# run COMMAND …: the step, to its end, and what follows from its status. Does not return.
run() {
  local status before
  [[ -x $home/launch/node.sh ]] || { say "no launch/node.sh under $home: set MIRAGE_HOME to the checkout"; exit 2; }
  say "$SLURM_NNODES nodes ($SLURM_JOB_NODELIST): mirage $*"
  # In the background, since a trap runs only when no foreground command does. A failed task ends the step at once,
  # instead of leaving the others in a collective.
  srun --kill-on-bad-exit=1 --wait=60 "$home/launch/node.sh" "$@" &
  step=$!
  if [[ $request ]]; then forward; fi
  while :; do
    before=$signals status=0
    # A signal ends this wait early, with a status of its own; then wait again.
    wait "$step" || status=$?
    [[ $signals != "$before" ]] || break
  done
  # The request can kill a task that is only just starting; launch/node.sh answers for every later one.
  if [[ $request == USR1 && $status =~ ^(138|143)$ ]]; then status=75; fi
  case $status in
    0) say "finished" ;;
    75)
      if [[ $request == TERM ]] || ! still_ours; then
        say "stopped on request; Slurm decides whether the job comes back"
      # A requeue ends this script too, by a TERM that would hit the command before it has answered.
      elif trap '' TERM && scontrol requeue "$job"; then
        say "stopped on request; requeued"
      else
        say "stopped on request, and Slurm would not requeue it: submit it again and it resumes"
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
