"""A short `python -m tests.fuzz`, always with the same cases: those that once failed, and what the seed gives."""

import json
import subprocess
import sys

from mirage_dist.config import REPOSITORY

SEED, CASES = 14, 60  # half a minute of a quiet machine


def test_no_broken_input_ends_in_a_traceback_a_hang_or_a_loss(tmp_path):
    out = tmp_path / "fuzz.json"
    # A process of its own: this one may have threads, which a fork does not copy.
    bounds = ["--cases", str(CASES), "--minutes", "10", "--seed", str(SEED)]
    command = [sys.executable, "-m", "tests.fuzz", *bounds, "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    print(result["cases_by_verb"])
    assert result["cases"] >= CASES
