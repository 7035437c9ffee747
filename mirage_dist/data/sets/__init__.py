"""What the sets of `data.prepare` hold, and how each is made."""
