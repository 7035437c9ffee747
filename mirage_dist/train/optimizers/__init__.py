"""Optimizers, their parameter groups, and their state under ZeRO."""
