# Sourced by every script here: the environment of a job, and the two ways to start `mirage` in it.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"

# The first node is the rendezvous; a port from the job id, so that two jobs on a node do not meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# Compute nodes have no network on most clusters: models and data come from the local cache.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# srun does not inherit sbatch's --cpus-per-task, and sbatch's --export would hide our variables from it.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
unset SLURM_EXPORT_ENV

# One process per GPU on every node; when one fails the job ends at once instead of waiting in a collective.
run_ranks() {
  srun --kill-on-bad-exit=1 --wait=60 launch/node.sh "$@"
}

# One process in this task, without a process group.
run_alone() {
  launch/node.sh "$@"
}
