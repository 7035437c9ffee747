"""Low-rank adapters: which layers have them, a 4-bit base below them, and their files."""
