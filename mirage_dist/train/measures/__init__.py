"""What a run measures of itself: the parts of a step, FLOPs, memory, spikes, held-out loss, a profile."""
