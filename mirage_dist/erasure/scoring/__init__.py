"""How likely a model finds answers: which are scored, and each token's log-probability."""
