#!/usr/bin/env bash
# Unlearning with NPO, from the prepared forget and retain sets (mirage prepare configs/prepare/vlguard.yaml).
#   sbatch slurm/unlearn_npo.sh [key=value …]            e.g. sbatch --nodes 4 slurm/unlearn_npo.sh train.lr=5e-7
# Change first: --gres (GPUs a node) with --ntasks-per-node, --time, and model.path and the data in configs/train/npo.yaml.
#SBATCH --job-name=unlearn_npo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
run_ranks train configs/train/npo.yaml "$@"
