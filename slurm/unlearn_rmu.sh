#!/usr/bin/env bash
# Unlearning with RMU, from the prepared forget and retain sets (slurm/mirage.sh prepare configs/prepare/vlguard.yaml).
#   sbatch slurm/unlearn_rmu.sh [RECIPE.yaml] [key=value …]
#   sbatch --nodes=2 slurm/unlearn_rmu.sh train.micro_batch=1 train.lr=5e-7 run.dir=runs/rmu-2
# Change first: --gres (GPUs a node) with --ntasks-per-node, --time; model.path and the data in configs/train/rmu.yaml.
# --signal: this many seconds before the time limit the run stops, saves and is requeued. A save has to fit twice.
#SBATCH --job-name=unlearn_rmu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${MIRAGE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" ||
  { echo "submit from the checkout, or set MIRAGE_HOME to it (now: ${MIRAGE_HOME:-not set})" >&2; exit 2; }
run_recipe train configs/train/rmu.yaml "$@"
