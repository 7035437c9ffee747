"""Peaks of a GPU's memory over longer than a step, although each step's record begins PyTorch's mark anew."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mirage_dist
from mirage_dist.train.dry_run.phases import Phases
from mirage_dist.train.measures import usage

GPU = torch.device("cuda", 0)


class Memory:
    """PyTorch's allocator, of which only the amount and its high-water marks are there."""

    def __init__(self, patch):
        self.now = self.mark = 0
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.mark)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * self.mark)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)

    def reset(self, device):
        self.mark = self.now

    def take(self, amount):
        self.now = amount
        self.mark = max(self.mark, amount)


# What a process does: hold so many bytes from now on, or end a step, whose record reads the mark.
events = st.lists(st.one_of(st.integers(0, 1 << 40), st.just("step")), max_size=12)


@given(before=events, after=events)
def test_highest_is_the_most_since_restart_whatever_steps_came_between(before, after):
    with pytest.MonkeyPatch.context() as patch:
        memory, held, most, in_step = Memory(patch), 0, 0, 0
        for number, event in enumerate([*before, "restart", *after]):
            if event == "restart":
                usage.restart(GPU)
                most = in_step = held
            elif event == "step":
                allocated, reserved, _ = usage.peaks(GPU)
                assert (allocated, reserved) == (in_step / usage.MIB, 2 * in_step / usage.MIB), number
                in_step = held
            else:
                memory.take(event)
                held, most, in_step = event, max(most, event), max(in_step, event)
        assert usage.highest(GPU) == (most, 2 * most)
        usage.restart(GPU)


def test_a_phase_of_a_dry_run_has_the_peak_of_the_update_that_the_record_has_read(monkeypatch):
    memory, phases = Memory(monkeypatch), Phases(GPU)
    phases.begin("update")
    memory.take(30)
    memory.take(10)
    usage.peaks(GPU)  # in the step's record, before the phase ends
    phases.end()
    assert phases.peaks["update"] == 30
    assert phases.reserved == 60
    usage.restart(GPU)


def test_nothing_else_begins_the_mark_anew():
    root = Path(mirage_dist.__file__).parent
    files = [f for f in root.rglob("*.py") if re.search(r"reset_(peak|max)_memory|max_memory_", f.read_text())]
    assert [f.relative_to(root).as_posix() for f in files] == ["train/measures/usage.py"]
