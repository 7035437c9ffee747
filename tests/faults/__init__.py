"""Kills at random moments: `python -m tests.faults --runs N --seed S`. Every run must end as if it had not been killed.

moments.py    what a run is doing, read from its directory alone, and when to kill it
processes.py  a run as its user starts it, and SIGKILL
check.py      what a resumed run must have in common with the one that was never stopped
"""
