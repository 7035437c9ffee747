#!/usr/bin/env bash
# launch/node.sh COMMAND …: what srun starts once per GPU. Rank and world size come from Slurm's variables
# (mirage_dist/world.py reads them); slurm/common.sh sets the address.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "$python" -m mirage_dist.cli "$@"
