#!/usr/bin/env python3
"""Stands in for `python -m mirage_dist.cli VERB …`: notes how it was started, then waits and answers signals like it.

The note is a file in $TMPDIR, one a start of a task, since long lines of several tasks mix in a log.

seconds=S is how long it takes (again=S: from the second start on), save=S what stopping costs, fail=RANK:STATUS a rank
that fails after a second.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if sys.argv[1:3] != ["-m", "mirage_dist.cli"]:  # a launcher, which is a real one
    os.execv(os.environ["STANDIN_PYTHON"], [os.environ["STANDIN_PYTHON"], *sys.argv[1:]])
began = time.monotonic()
requests: list[float] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: requests.append(time.monotonic()))
words = sys.argv[3:]
options = {"seconds": "0", "save": "0.5", "fail": ""} | dict(word.split("=", 1) for word in words if "=" in word)
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    options["seconds"] = options.get("again", options["seconds"])
place = os.environ.get("RANK", os.environ["SLURM_PROCID"])
restart, step = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_STEP_ID", "0")
own = ("start", os.environ["SLURM_JOB_ID"], place, restart, step)
note = Path(os.environ["TMPDIR"], "-".join(own))
note.write_text(json.dumps({"words": words, "env": dict(os.environ)}))
note.rename(note.with_suffix(".json"))
rank, _, status = options["fail"].partition(":")
while (now := time.monotonic()) < began + float(options["seconds"]):
    if rank == place and now > began + 1:
        sys.exit(int(status))
    if requests and now > requests[0] + float(options["save"]):
        # At once: while Python shuts down a second signal kills it, and the status is lost.
        os._exit(75)
    time.sleep(0.02)
