"""Distributed safety fine-tuning and unlearning of vision-language models, and attacks on the result."""

__version__ = "0.2.0"
