"""`mirage doctor`: whether this machine, allocation and file system can carry a run, before one starts."""
