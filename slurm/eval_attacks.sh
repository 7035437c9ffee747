#!/usr/bin/env bash
# Evaluation under attack, by a job array: VLGuard's test set as it is, with the one-word attack, and with the
# over-prudence rewrite. Every worker claims questions until none is left, those of workers that died too, and one of
# them judges. Submit again to do what is missing; `mirage eval RECIPE run.dir=runs/npo --status` tells how far it is.
#   sbatch slurm/eval_attacks.sh [RECIPE.yaml] run.dir=runs/npo
#   sbatch --array=0-31%8 slurm/eval_attacks.sh run.dir=runs/npo
# Change first: run.dir (the run to evaluate), --array (workers % how many at once), the data in
# configs/eval/vlguard.yaml. Where jobs get whole nodes, --array=0-3 --gres=gpu:8 --ntasks-per-node=8 is 32 workers.
# The tasks of a node share out its GPUs: --gres=gpu:8 --ntasks-per-node=2 is two workers of four GPUs each, for
#   generation.backend=vllm generation.tensor_parallel=4
#SBATCH --job-name=eval_attacks
#SBATCH --array=0-7%4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
source "${MIRAGE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" ||
  { echo "submit from the checkout, or set MIRAGE_HOME to it (now: ${MIRAGE_HOME:-not set})" >&2; exit 2; }
if ((${SLURM_ARRAY_TASK_MAX:-0} - ${SLURM_ARRAY_TASK_MIN:-0} + 1 != ${SLURM_ARRAY_TASK_COUNT:-1})); then
  say "--array must be one range such as 0-7: workers are numbered by it. To do what is missing, submit any range again."
  exit 2
fi
run_recipe eval configs/eval/vlguard.yaml "$@"
