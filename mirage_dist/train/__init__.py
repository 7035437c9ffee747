"""Training on DeepSpeed's engine: the step, its data, checkpoints, and what a run tells."""

from mirage_dist.ranks import name_accelerator

name_accelerator()
