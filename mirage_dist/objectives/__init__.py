"""Training objectives: each maps what one forward computed to the terms of a sum."""

from mirage_dist.objectives import base

__all__ = ["base"]
