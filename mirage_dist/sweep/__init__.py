"""`mirage sweep`: a search over keys of recipes and over seeds, and the forget–retain frontier of its results."""
