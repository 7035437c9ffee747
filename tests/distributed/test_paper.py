"""`mirage paper` from nothing to its table, on a small model and look-alikes of the published files."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import forkserver
import pytest

from mirage_dist.config import REPOSITORY
from mirage_dist.report import published

SMALL = [
    "world.base_samples=400",
    "world.safety_samples=40",
    "world.general_samples=40",
    "world.eval_samples=12",
    "ranks=1",
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chain that was interrupted in a training and in an evaluation, and then run to its end."""
    folder = tmp_path_factory.mktemp("paper")
    base = folder / "base.yaml"
    base.write_text("include: configs/train/demo_base.yaml\ntrain: {max_steps: 8, global_batch: 16, micro_batch: 8}\n")
    small = ["train.max_steps=3", "train.global_batch=8", "train.micro_batch=4"]
    tiny = REPOSITORY / "configs/paper/tiny.yaml"
    every = re.findall(
        r"^    - (train\..*|deepspeed.*|model.*|data.*)$", tiny.read_text().split("eval:")[0], re.MULTILINE
    )
    words = [*SMALL, f"folder={folder}/chain", f"world.base_recipe={base}"]
    words += ["sets.prepared.overrides=[retain_size=60]", "sets.sft.overrides=[helpful_size=20]"]
    words.append(f"every.train={json.dumps([*every, *small])}")

    def start() -> subprocess.Popen:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [forkserver.python(), "-m", "mirage_dist.cli", "paper", "--scale", "tiny", "--local", *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return folder / "chain", start


def output(process: subprocess.Popen, until: str | None = None) -> str:
    """What it writes until a line matches, or to its end."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if until is not None and re.search(until, line):
            break
    return "".join(lines)


def test_a_chain_that_was_stopped_twice_ends_in_the_whole_table(chain):
    folder, start = chain
    for until in (r"\] train-npo", r"\] eval-mixed-textvqa"):
        process = start()
        written = output(process, until)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        written += output(process)
        assert process.wait() in (75, -signal.SIGTERM), written
    process = start()
    written = output(process)
    assert process.wait() == 0, written
    results = published.read(folder / "runs/report/results.json")
    assert not published.missing(results)
    assert {f["verdict"] for f in results["figures"]} == {None}
    assert "nothing here can be held against the paper" in results["notes"][0]
    assert "The published table, and ours" in (folder / "runs/report/index.html").read_text()
    assert re.search(r"^base +ASR, as asked +keyword +64\.25 ", written, re.MULTILINE)


def test_a_finished_chain_does_nothing_again(chain):
    folder, start = chain
    files = [
        *folder.glob("runs/*/metrics.jsonl"),
        *folder.glob("runs/*/evals/*/rows/*"),
        *folder.glob("data/**/*.json*"),
    ]
    assert len(files) > 20
    before = {file: file.stat().st_mtime_ns for file in files}
    process = start()
    written = output(process)
    assert process.wait() == 0, written
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_the_published_names_and_forms_are_there(chain):
    """What the catalogue says of each file, of another size."""
    folder, _ = chain
    for name in ("vlguard/train.json", "vlguard/test_what_3shot.json", "textvqa/TextVQA_0.5.1_val.json"):
        assert (folder / "data" / name).is_file()
    assert Path(folder / "data/vlguard/train/images").is_symlink()
