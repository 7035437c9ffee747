"""Kills at random moments: `python -m tests.faults`. Every command must end as if it had not been killed.

verbs.py      the verbs that are killed, and their small inputs
kills.py      a verb's rounds: kills, starts until it has finished, comparison with the command that nobody killed
events.py     what happens in a folder (inotify), and the moments of the kills
trees.py      a folder without clocks and random names, to compare
training.py   training, killed: a rank, all ranks, the launcher
moments.py    what a training run is doing, read from its directory alone, and when to kill it
processes.py  a run as its user starts it, and SIGKILL
check.py      what a resumed run must have in common with the one that was never stopped
memory.py     memory and descriptors over a long run and over many rows
results.py    lines, tables and the result file
"""
