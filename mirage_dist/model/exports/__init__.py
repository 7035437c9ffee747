"""Exports: what a trained model directory is made of."""
