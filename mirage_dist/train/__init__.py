"""Training on DeepSpeed's engine: the step, its data, checkpoints, and the records of a run."""

from mirage_dist.ranks import name_accelerator

name_accelerator()
