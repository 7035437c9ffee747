"""Broken input for every verb: `python -m tests.fuzz --minutes 30`. None may end in a traceback, a hang or a loss.

A case is a verb's command line on a small finished world, with one to three things in it broken by hypothesis. It runs
in a forked process that has imported the libraries already, in a folder of its own.

world.py     the small world: data, a model, a finished run, suite and preparation, recipes; what others put beside them
verbs.py     the command line of each verb, which files it reads, what it may change, what it makes
values.py    odd values, keys and texts
cases.py     strategies of hypothesis: which cases exist
changes.py   how a case breaks a file
sandbox.py   one case in a process of its own, bounded in time and memory
findings.py  what is wrong with a case that has ended
__main__.py  the command; test_fuzz.py what CI runs of it; found.json the cases that once failed, run by both
"""
