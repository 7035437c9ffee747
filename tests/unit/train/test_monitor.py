"""metrics.jsonl holds each step once; the learning rate follows its schedule."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.schema import TrainConfig
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.monitor import drop_from


def test_a_resumed_run_drops_what_it_will_write_again_and_a_half_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 8)) + '{"step": 8, "lo')
    out = tmp_path / "out.jsonl"
    assert drop_from(file, 4, out) == 7
    assert [json.loads(line)["step"] for line in out.read_text().splitlines()] == [1, 2, 3, 4]
    assert drop_from(tmp_path / "absent.jsonl", 4, out) == 0
    assert out.read_text() == ""


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
