#!/usr/bin/env bash
# Supervised safety fine-tuning of LLaVA-1.5-7B on VLGuard.
#   sbatch slurm/sft.sh [RECIPE.yaml] [key=value …]
#   sbatch --nodes=4 slurm/sft.sh train.lr=1e-5 run.dir=runs/sft-4
# Change first: --gres (GPUs a node) with --ntasks-per-node, --time; model.path and the data in configs/train/sft.yaml.
# --signal: this many seconds before the time limit the run stops, saves and is requeued. A save has to fit twice.
#SBATCH --job-name=sft
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
run_recipe train configs/train/sft.yaml "$@"
