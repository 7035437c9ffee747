"""Everything that waits for a GPU, one part after the other, each within ten minutes: `make bench-gpu`.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py                                    # all that has no result yet
    python benchmarks/gpu.py tests loss-head model npo-lora     # only these, in this order
    python benchmarks/gpu.py --tiny --place /tmp/tiny           # every part on a CPU, at a tiny size

Each part is a process of its own. When it ends, fails or takes longer than --seconds, that is written to
results/gpu/parts.json, before the next one begins: a machine that is lent for minutes runs some parts at a time, and a
part that was cut off is run again. Results that parts write themselves (loss_head_cuda.json, gpu/PART.json) are whole
or not there. Keep --place between calls: it holds the random model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_7b
import common
from common import RESULTS

HERE = Path(__file__).resolve().parent
TAIL = 40  # lines of a part's output that are kept


@dataclass(frozen=True)
class Part:
    """command: on a GPU; tiny: the same on a CPU. result: the file that it writes itself, if it does."""

    command: list[str]
    tiny: list[str]
    result: str | None = None


def parts(place: Path, out: Path) -> dict[str, Part]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests/gpu")]
    head = [sys.executable, str(HERE / "bench_loss_head.py")]
    every = {
        # Without a GPU its tests skip themselves.
        "tests": Part(pytest, pytest),
        "loss-head": Part([*head, "--device", "cuda"], [*head, "--device", "cpu", "--case", "all", "--rounds", "1"]),
    }
    for name in bench_7b.PARTS:
        own = [sys.executable, str(HERE / "bench_7b.py"), name, "--place", str(place), "--out", str(out)]
        every[name] = Part(own, [*own, "--tiny"], f"{name}.json")
    return every


def run(part: Part, tiny: bool, seconds: float, results: Path) -> dict[str, Any]:
    """Run a part to its end, or end it and what it has started after so many seconds."""
    began, environment = time.monotonic(), {**os.environ, "HF_HUB_OFFLINE": "1", "MIRAGE_RESULTS": str(results)}
    command = part.tiny if tiny else part.command
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, status = process.communicate(timeout=seconds)[0], "done"
        if process.returncode:
            status = f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0], f"took longer than {seconds:g} s"
    return {
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "command": " ".join(["python", *(str(Path(w).name) if w.endswith(".py") else w for w in command[1:])]),
        "output": output.splitlines()[-TAIL:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="PART", help="only these; default: all")
    parser.add_argument("--list", action="store_true", help="name the parts, and what became of each")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, for each part")
    parser.add_argument("--place", type=Path, default=Path("runs/bench_7b"), help="models, data and runs; it is kept")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at a tiny size; results go to the place")
    parsed = parser.parse_args()
    place = parsed.place.absolute()
    results = place / "results" if parsed.tiny else RESULTS
    out = results / "gpu"
    every = parts(place, out)
    if wrong := [name for name in parsed.names if name not in every]:
        parser.error(f"{wrong[0]}: no such part; expected some of {', '.join(every)}")
    record = out / "parts.json"
    state: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {"parts": {}}
    if parsed.list:
        print("\n".join(f"{name:<16}{state['parts'].get(name, {}).get('status', '')}" for name in every))
        return
    if not parsed.tiny:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("this needs a GPU; --tiny runs every part on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    head = common.record("cpu" if parsed.tiny else "cuda", ("torch", "triton", "deepspeed"), sys.argv[1:], threads=1)
    for name in parsed.names or every:
        part = every[name]
        if parsed.again and part.result is not None:
            (out / part.result).unlink(missing_ok=True)
        if not parsed.again and state["parts"].get(name, {}).get("status") == "done":
            continue
        print(f"{name}: …", flush=True)
        entry = run(part, parsed.tiny, parsed.seconds, results)
        print(f"{name}: {entry['status']} ({entry['seconds']} s)", flush=True)
        if entry["status"] != "done":
            print("\n".join(entry["output"]), flush=True)
        state["parts"][name] = {**entry, "date": head["date"], "hardware": head["hardware"]}
        partial = record.with_suffix(".part")
        partial.write_text(json.dumps(state, indent=1) + "\n")
        partial.rename(record)
    left = [name for name in parsed.names or every if state["parts"][name]["status"] != "done"]
    if left:
        raise SystemExit(f"not done: {', '.join(left)}")


if __name__ == "__main__":
    main()
