"""metrics.jsonl holds each step once; the learning rate follows its schedule."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mirage_dist import state
from mirage_dist.schema import TrainConfig
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.measures.records import RECALLED, drop_from, records


def test_a_resumed_run_drops_what_it_will_write_again_and_a_half_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(text(range(1, 8)) + '{"step": 8, "lo')
    out = tmp_path / "out.jsonl"
    assert [record["step"] for record in drop_from(file, 4, out)] == [1, 2, 3, 4]
    assert [json.loads(line)["step"] for line in out.read_text().splitlines()] == [1, 2, 3, 4]
    assert out.read_text() == text(range(1, 5))
    assert not drop_from(tmp_path / "absent.jsonl", 0, out)
    assert out.read_text() == ""


def test_a_record_gets_what_came_after_a_stop_and_the_last_ones_are_recalled(tmp_path):
    file, out = tmp_path / "metrics.jsonl", tmp_path / "out.jsonl"
    file.write_text(text(range(1, 2 * RECALLED)))
    last = drop_from(file, 150, out, {"validation": {"loss": 0.25}})
    assert [record["step"] for record in last] == list(range(151 - RECALLED, 151))
    kept = [record for _, record in records(out)]
    assert [record["step"] for record in kept] == list(range(1, 151))
    assert [record["step"] for record in kept if "validation" in record] == [150]
    assert kept[-1] == {"step": 150, "loss": 0.5, "validation": {"loss": 0.25}}


def text(steps) -> str:
    return "".join(state.sealed("metrics", {"step": step, "loss": 0.5}) for step in steps)


@pytest.mark.parametrize("line", ["", "[]", "null", "{}", "[" * 10_000, '{"step": 3, "loss": 0.1}', text([3])[:-9]])
def test_a_damaged_line_before_a_needed_one_is_named_and_one_that_is_repeated_is_dropped(tmp_path, capsys, line):
    file, out = tmp_path / "metrics.jsonl", tmp_path / "out.jsonl"
    file.write_text(f"{text([1, 2])}{line}\n{text([4, 5])}")
    with pytest.raises(state.Damaged, match=r"metrics.jsonl: line 3: .* Restore the file, or delete the line"):
        drop_from(file, 4, out)
    with pytest.raises(state.Damaged, match="line 3"):
        list(records(file))
    drop_from(file, 2, out)
    assert out.read_text() == text([1, 2])
    file.write_text(f"{text([1, 2])}{line}\n")
    assert [record["step"] for _, record in records(file)] == [1, 2]
    capsys.readouterr()
    drop_from(file, 3, out)
    assert "metrics.jsonl: holds no whole record of steps 3 to 3" in capsys.readouterr().out


def config(**options) -> TrainConfig:
    return TrainConfig(lr=2.0, global_batch=1, micro_batch=1, **options)


@given(
    st.integers(1, 400),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 0.5),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_rate_rises_stays_and_falls_within_its_bounds(steps, schedule, warmup, decay, low):
    train = config(schedule=schedule, warmup=warmup, decay=decay, min_lr=low)
    rates = [learning_rate(train, step, steps) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    assert all(a <= b for a, b in itertools.pairwise(rates[:warm]))
    after = rates[warm:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert all(2.0 * low - 1e-12 <= rate <= 2.0 for rate in after)
    assert not after or after[0] <= 2.0
    if schedule == "constant":
        assert set(after) <= {2.0}


@pytest.mark.parametrize(("step", "rate"), [(0, 1.0), (1, 2.0), (9, 2.0), (15, 1.1), (19, 2 * (0.1 + 0.9 * 0.1))])
def test_warm_up_stable_decay_by_hand(step, rate):
    """20 steps: 2 of warm-up, then a linear fall over the last 10 to a tenth."""
    train = config(schedule="linear", warmup=0.1, decay=10 / 18, min_lr=0.1)
    assert learning_rate(train, step, 20) == pytest.approx(rate)


HF = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}


@given(st.sampled_from(sorted(HF)), st.integers(2, 120), st.floats(0, 1))
def test_a_warm_up_from_zero_is_that_of_transformers(schedule, steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = HF[schedule](optimizer, math.ceil(warmup * steps), steps)  # as its Trainer rounds warmup_ratio
    train = config(schedule=schedule, warmup=warmup, warmup_from_zero=True)
    for step in range(steps):
        assert learning_rate(train, step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@given(st.integers(1, 60), st.integers(0, 200), st.floats(0, 1), st.booleans())
def test_the_schedule_of_a_longer_run_is_that_runs_beginning(steps, more, warmup, zero):
    own = config(warmup=warmup, warmup_from_zero=zero, schedule_steps=steps + more)
    longer = config(warmup=warmup, warmup_from_zero=zero)
    assert [learning_rate(own, step, steps) for step in range(steps)] == [
        learning_rate(longer, step, steps + more) for step in range(steps)
    ]
