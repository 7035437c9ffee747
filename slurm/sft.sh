#!/usr/bin/env bash
# Supervised safety fine-tuning of LLaVA-1.5-7B on VLGuard.
#   sbatch slurm/sft.sh [key=value …]            e.g. sbatch --nodes 4 slurm/sft.sh train.lr=5e-7
# Change first: --gres (GPUs a node) with --ntasks-per-node, --time, and model.path and the data in configs/train/sft.yaml.
#SBATCH --job-name=sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
run_ranks train configs/train/sft.yaml "$@"
