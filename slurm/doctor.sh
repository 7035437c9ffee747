#!/usr/bin/env bash
# `mirage doctor` on every task of an allocation, before a long run: versions, GPUs, collectives, disk, file system.
#   sbatch --nodes=4 slurm/doctor.sh --dir runs
#   sbatch --nodes=4 slurm/doctor.sh --recipe configs/train/npo.yaml run.dir=runs/npo-2
# Change first: --gres (GPUs a node) with --ntasks-per-node, as the run will have them. docs/doctor.md has the checks.
#SBATCH --job-name=doctor
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:15:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${MIRAGE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" ||
  { echo "submit from the checkout, or set MIRAGE_HOME to it (now: ${MIRAGE_HOME:-not set})" >&2; exit 2; }
run doctor "$@"
