"""The driver of the benchmarks that wait for a GPU: each part's end is on disk before the next begins."""

import json
import os
import sys
import time

import pytest

from mirage_dist.config import REPOSITORY


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """benchmarks/gpu.py with three parts of its own, and what it is to write to."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import gpu

    assert set(gpu.parts(tmp_path, tmp_path)) > {"tests", "loss-head", "npo-lora", "resume", "generate-vllm", "packing"}
    python, record = [sys.executable, "-c"], tmp_path / "results/gpu/parts.json"
    before = f"import json; assert json.load(open({str(record)!r}))['parts']['hangs']['status'] != 'done'"
    commands = {
        "hangs": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {str(hang(tmp_path))!r}])",
        "works": f"{before}; open({str(tmp_path / 'count')!r}, 'a').write('x')",
        "fails": "print('what was wrong'); raise SystemExit(3)",
    }
    own = {name: gpu.Part(["nothing"], [*python, text]) for name, text in commands.items()}
    monkeypatch.setattr(gpu, "parts", lambda *_: own)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--place", str(tmp_path), *words])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        return str(end.value), json.loads(record.read_text())["parts"]

    return run


def hang(folder):
    return f"import os, time; open({str(folder / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"


def test_what_hangs_is_ended_and_what_is_done_is_not_run_again(gpu, tmp_path):
    end, parts = gpu("--seconds", "1")
    assert end == "not done: hangs, fails"
    assert [parts[name]["status"] for name in ("hangs", "works", "fails")] == [
        "took longer than 1 s",
        "done",
        "failed with status 3",
    ]
    assert parts["fails"]["output"] == ["what was wrong"]
    for _ in range(100):  # a zombie for a moment
        if not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}/exe"):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what the part had started lives on")
    gpu("--seconds", "1")
    assert (tmp_path / "count").read_text() == "x"
    gpu("--seconds", "1", "--again")
    assert (tmp_path / "count").read_text() == "xx"


def test_a_part_that_is_none_is_refused(gpu, capsys):
    with pytest.raises(FileNotFoundError):
        gpu("no-such-part")
    assert "no-such-part: no such part; expected some of hangs, works, fails" in capsys.readouterr().err
