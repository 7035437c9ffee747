#!/usr/bin/env bash
# One process of any other verb of `mirage`, on a compute node: prepare, report, export.
#   sbatch slurm/mirage.sh prepare configs/prepare/vlguard.yaml
#   sbatch slurm/mirage.sh export runs/npo exports/npo
# Change first: --mem and --time; none of these verbs needs a GPU.
#SBATCH --job-name=mirage
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${MIRAGE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" ||
  { echo "submit from the checkout, or set MIRAGE_HOME to it (now: ${MIRAGE_HOME:-not set})" >&2; exit 2; }
run "$@"
