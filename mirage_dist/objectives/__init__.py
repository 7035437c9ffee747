"""Losses: each a pure function from what one forward gave to the terms of a sum."""

from mirage_dist.objectives import base

__all__ = ["base"]
