#!/usr/bin/env bash
# Evaluation under attack: VLGuard's test set as it is, with the one-word attack, and with the over-prudence rewrite.
#   sbatch slurm/eval_attacks.sh run.dir=runs/npo
# Change first: run.dir (the run to evaluate) and the data in configs/eval/vlguard.yaml.
#SBATCH --job-name=eval_attacks
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
run_alone eval configs/eval/vlguard.yaml "$@"
