"""Tiny random models of real families, and the matrix of what works with each."""
