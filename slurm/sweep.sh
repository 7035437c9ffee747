#!/usr/bin/env bash
# The points of a sweep, one an element of a job array: its training, then its evaluations. `mirage sweep` writes the file
# that names them and prints the whole command:
#   mirage sweep configs/sweep/demo.yaml --slurm
# Change first: --gres (GPUs a node) with --ntasks-per-node, --time. An element that is stopped is requeued and goes on
# where it was; print the command again to submit what is missing. docs/sweeps.md has the rest.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
source "${MIRAGE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" ||
  { echo "submit from the checkout, or set MIRAGE_HOME to it (now: ${MIRAGE_HOME:-not set})" >&2; exit 2; }
if [[ ! -r ${1:-} || ! ${SLURM_ARRAY_TASK_ID:-} ]]; then
  say "expected the file that mirage sweep --slurm wrote, and --array as it printed it"
  exit 2
fi
mapfile -t points <"$1"
if ((SLURM_ARRAY_TASK_ID >= ${#points[@]})); then
  say "element $SLURM_ARRAY_TASK_ID: $1 has ${#points[@]} points; --array=0-$((${#points[@]} - 1)) are all of them"
  exit 2
fi
IFS=$'\t' read -ra fields <<<"${points[SLURM_ARRAY_TASK_ID]}"
say "point ${fields[0]}"
# The tasks of this element are all workers of its evaluation (see launch/node.sh).
export MIRAGE_ELEMENT_ALONE=1
for field in "${fields[@]:2}"; do
  # Quoted by mirage sweep for a shell.
  declare -a words="($field)"
  if [[ ${words[0]} == train && -d ${fields[1]}/export ]]; then continue; fi
  rehearse "${words[@]}"
  perform "${words[@]}"
  if ((status)); then conclude; fi
done
conclude
