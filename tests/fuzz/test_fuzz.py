"""A minute of `python -m tests.fuzz`, always with the same cases: those that once failed, and what the seed gives."""

import json
import subprocess
import sys

from mirage_dist.config import REPOSITORY

SEED = 14


def test_no_broken_input_ends_in_a_traceback_a_hang_or_a_loss(tmp_path):
    out = tmp_path / "fuzz.json"
    # A process of its own: this one may have threads, which a fork does not copy.
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", "1", "--seed", str(SEED), "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    print(result["cases_by_verb"])
    assert result["cases"] > 20
