"""The order of samples: each one once an epoch, one global batch whatever the ranks, a function of its arguments."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data import stream
from mirage_dist.schema import ConfigError

seeds = st.integers(0, 2**32)
sizes = st.integers(1, 40)


def first(seed, name, size, count):
    return stream.batch(seed, name, size, 0, count).tolist()


@given(seeds, sizes, st.integers(1, 30), st.integers(1, 3))
def test_every_sample_comes_once_an_epoch_even_where_batches_span_two(seed, size, global_batch, epochs):
    steps = -(-epochs * size // global_batch)
    seen = np.concatenate([stream.batch(seed, "forget", size, step, global_batch) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(seeds, sizes, st.integers(0, 50), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_ranks_together_see_the_global_batch_for_every_world_size(seed, size, step, world, micro, accumulate):
    whole = stream.batch(seed, "forget", size, step, world * micro * accumulate)
    parts = [stream.shard(whole, rank, world, micro) for rank in range(world)]
    assert all(len(part) == accumulate for part in parts)
    assert all(len(rows) == micro for part in parts for rows in part)
    together = np.concatenate([rows for part in parts for rows in part])
    assert Counter(together.tolist()) == Counter(whole.tolist())


@given(seeds, sizes, st.integers(0, 20), st.integers(1, 8), st.integers(1, 8))
def test_the_order_does_not_depend_on_the_batch_size(seed, size, start, a, b):
    def ordered(global_batch):
        batches = [stream.batch(seed, "f", size, s, global_batch) for s in range(start * a * b // global_batch + a * b)]
        return np.concatenate(batches)[start * a * b : start * a * b + a * b].tolist()

    assert ordered(a) == ordered(b)


@given(seeds, st.integers(20, 200))
def test_seeds_streams_and_epochs_have_orders_of_their_own(seed, size):
    orders = [
        first(seed, "forget", size, size),
        first(seed, "retain", size, size),
        first(seed + 1, "forget", size, size),
        first(seed, "forget", size, 2 * size)[size:],
    ]
    assert len(set(map(tuple, orders))) == len(orders)


def test_every_sample_is_equally_likely_to_come_first():
    counts = np.bincount([first(seed, "forget", 8, 1)[0] for seed in range(4000)], minlength=8)
    # Pearson's statistic; the .999 quantile of chi-squared with 7 degrees of freedom.
    assert ((counts - 500) ** 2 / 500).sum() < 24.3


def test_the_order_is_the_same_in_another_process_and_after_other_calls():
    code = "from mirage_dist.data import stream; print(stream.batch(3, 'forget', 50, 7, 16).tolist())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for size in range(1, 40):  # more orders than are kept
        stream.batch(3, "forget", size, 0, 8)
    assert str(stream.batch(3, "forget", 50, 7, 16).tolist()) == elsewhere.strip()


def test_a_batch_may_be_changed_without_changing_the_next():
    rows = stream.batch(0, "forget", 8, 0, 8)
    before = rows.tolist()
    rows[:] = 0
    assert stream.batch(0, "forget", 8, 0, 8).tolist() == before


@given(sizes, st.integers(0, 100), st.integers(1, 30))
def test_the_cursor_says_where_the_next_batch_begins(size, step, global_batch):
    where = stream.state(size, step, global_batch)
    epoch = stream.batch(0, "forget", size, where["epoch"], size)
    assert epoch[where["cursor"]] == stream.batch(0, "forget", size, step, global_batch)[0]


@pytest.mark.parametrize(("rows", "world", "micro"), [(8, 3, 1), (8, 2, 3), (4, 2, 4)])
def test_a_batch_that_does_not_come_out_even_is_an_error_with_the_numbers(rows, world, micro):
    words = rf"train\.global_batch={rows}: .*\({micro} × {world}\)"
    with pytest.raises(ConfigError, match=words):
        stream.shard(np.arange(rows), 0, world, micro)


def test_an_empty_stream_is_an_error_with_its_name():
    with pytest.raises(ConfigError, match=r"data\.streams\.forget: no sample"):
        stream.batch(0, "forget", 0, 0, 4)


# ------------------------------------------------------------------------------------------- grouped by length

skewed = st.lists(st.one_of(st.integers(600, 640), st.integers(600, 2048)), min_size=1, max_size=60)


def whole_run(seed, lengths, steps, global_batch):
    return [stream.grouped(seed, "forget", np.array(lengths), step, global_batch) for step in range(steps)]


@given(seeds, skewed, st.integers(1, 12), st.integers(1, 3))
def test_grouped_every_sample_comes_once_an_epoch_even_where_batches_span_two(seed, lengths, global_batch, epochs):
    """In a step that two epochs share, each has as many samples as in the plain order."""
    size = len(lengths)
    steps = -(-epochs * size // global_batch)
    seen = Counter()
    for step, indices in enumerate(whole_run(seed, lengths, steps, global_batch)):
        assert len(indices) == global_batch
        seen.update(indices.tolist())
        done = (step + 1) * global_batch // size
        assert all(done <= seen[index] <= done + 1 for index in range(size))
        assert sum(seen[index] - done for index in range(size)) == (step + 1) * global_batch - done * size


@given(seeds, skewed, st.integers(0, 30), st.integers(1, 4), st.integers(1, 3))
def test_grouped_micro_batches_are_the_same_for_every_world_size(seed, lengths, step, micro, accumulate):
    whole = stream.grouped(seed, "forget", np.array(lengths), step, 4 * micro * accumulate)
    cuts = []
    for world in (1, 2, 4):
        parts = [stream.shard(whole, rank, world, micro) for rank in range(world)]
        cuts.append([rows.tolist() for at_once in zip(*parts, strict=True) for rows in at_once])
        assert np.concatenate(cuts[-1]).tolist() == whole.tolist()
        # From one micro-batch to the next the rows get shorter: what runs at the same time is of like length.
        assert np.all(np.diff([lengths[i] for i in np.concatenate(cuts[-1])]) <= 0)
    assert cuts[0] == cuts[1] == cuts[2]


@given(seeds, skewed, st.integers(0, 30), st.integers(1, 12))
def test_a_window_holds_the_plain_orders_samples(seed, lengths, window, global_batch):
    steps = range(window * stream.WINDOW, (window + 1) * stream.WINDOW)
    plain = [stream.batch(seed, "forget", len(lengths), step, global_batch) for step in steps]
    moved = [stream.grouped(seed, "forget", np.array(lengths), step, global_batch) for step in steps]
    assert Counter(np.concatenate(moved).tolist()) == Counter(np.concatenate(plain).tolist())


def share_of_padding(batches, lengths, micro):
    rows = [lengths[part] for indices in batches for part in stream.shard(indices, 0, 1, micro)]
    return 1 - sum(row.sum() for row in rows) / sum(len(row) * row.max() for row in rows)


@given(seeds, st.integers(200, 400), st.sampled_from([2, 4, 8]))
def test_grouped_there_is_far_less_padding_on_skewed_lengths(seed, size, micro):
    lengths = 600 + np.random.default_rng(seed).lognormal(4, 1, size).astype(np.int64)
    lengths[::10] = 60  # text alone
    steps = 2 * size // 16
    plain = share_of_padding([stream.batch(seed, "f", size, s, 16) for s in range(steps)], lengths, micro)
    grouped = share_of_padding([stream.grouped(seed, "f", lengths, s, 16) for s in range(steps)], lengths, micro)
    assert grouped < 0.7 * plain


def test_the_streams_of_a_step_are_long_and_short_together():
    draw = np.random.default_rng(0)
    lengths = {name: draw.lognormal(4, 1, size).astype(np.int64) for name, size in (("forget", 640), ("retain", 1280))}
    means = [[n[stream.grouped(0, name, n, s, 16)].mean() for s in range(40)] for name, n in lengths.items()]
    assert np.corrcoef(means)[0, 1] > 0.8


@given(seeds, st.integers(60, 120))
def test_grouped_batches_differ_between_seeds_streams_and_epochs(seed, size):
    lengths = np.random.default_rng(seed).permutation(size)
    orders = [
        np.concatenate([stream.grouped(s, name, lengths, step, 4) for step in steps]).tolist()
        for s, name, steps in (
            (seed, "forget", range(8)),
            (seed, "retain", range(8)),
            (seed + 1, "forget", range(8)),
            (seed, "forget", range(size, size + 8)),
        )
    ]
    assert len(set(map(tuple, orders))) == len(orders)


# ----------------------------------------------------------------------------------------- grouped by modality

flags = st.lists(st.booleans(), min_size=1, max_size=60).map(np.array)
mixtures = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda n: np.arange(sum(n)) < n[0])


def by_modality(seed, pictured, step, global_batch):
    return stream.batch(seed, "train", len(pictured), step, global_batch, pictured)


@given(seeds, flags, st.integers(1, 12), st.integers(1, 3), st.booleans())
def test_by_modality_every_sample_comes_once_an_epoch_even_where_batches_span_two(
    seed, pictured, global_batch, epochs, by_length
):
    """By length too, a step that two epochs share has as many samples of each as in the plain order."""
    size = len(pictured)
    lengths = np.random.default_rng(seed).integers(1, 99, size)
    seen = Counter()
    for step in range(-(-epochs * size // global_batch)):
        own = by_modality(seed, pictured, step, global_batch)
        if by_length:
            own = stream.grouped(seed, "train", lengths, step, global_batch, pictured)
        seen.update(own.tolist())
        done = (step + 1) * global_batch // size
        assert all(done <= seen[index] <= done + 1 for index in range(size))
        assert sum(seen[index] - done for index in range(size)) == (step + 1) * global_batch - done * size


@given(seeds, mixtures, st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_one_step_an_epoch_at_most_mixes_modalities_beside_those_that_it_shares(
    seed, pictured, global_batch, epoch, by_length
):
    size, lengths = len(pictured), np.random.default_rng(seed).integers(1, 99, len(pictured))
    first, last = -(-epoch * size // global_batch), (epoch + 1) * size // global_batch  # the epoch's own steps
    mixed = 0
    for step in range(first, last):
        own = by_modality(seed, pictured, step, global_batch)
        if by_length:
            own = stream.grouped(seed, "train", lengths, step, global_batch, pictured)
        mixed += len(set(pictured[own].tolist())) > 1
    assert mixed <= 1


@given(seeds, sizes, st.integers(0, 30), st.integers(1, 12), st.booleans())
def test_of_one_modality_the_order_is_the_plain_one(seed, size, step, global_batch, shown):
    pictured, lengths = np.full(size, shown), np.random.default_rng(seed).integers(1, 99, size)
    plain = stream.batch(seed, "train", size, step, global_batch)
    assert by_modality(seed, pictured, step, global_batch).tolist() == plain.tolist()
    plain = stream.grouped(seed, "train", lengths, step, global_batch)
    assert stream.grouped(seed, "train", lengths, step, global_batch, pictured).tolist() == plain.tolist()


@given(seeds, mixtures, st.integers(0, 8), st.integers(1, 12))
def test_by_length_too_a_window_holds_the_same_samples(seed, pictured, window, global_batch):
    lengths = np.random.default_rng(seed).integers(1, 999, len(pictured))
    steps = range(window * stream.WINDOW, (window + 1) * stream.WINDOW)
    plain = [by_modality(seed, pictured, step, global_batch) for step in steps]
    moved = [stream.grouped(seed, "train", lengths, step, global_batch, pictured) for step in steps]
    assert Counter(np.concatenate(moved).tolist()) == Counter(np.concatenate(plain).tolist())


@given(seeds, st.integers(200, 400), st.sampled_from([2, 4, 8]))
def test_by_length_too_there_is_less_padding(seed, size, micro):
    lengths = 600 + np.random.default_rng(seed).lognormal(4, 1, size).astype(np.int64)
    pictured = np.arange(size) % 5 > 0
    lengths[~pictured] -= 576
    alone, both = (
        share_of_padding([made(step) for step in range(2 * size // 16)], lengths, micro)
        for made in (
            lambda step: by_modality(seed, pictured, step, 16),
            lambda step: stream.grouped(seed, "train", lengths, step, 16, pictured),
        )
    )
    assert both < 0.7 * alone


@given(seeds, st.integers(40, 90), st.integers(2, 6))
def test_steps_of_a_modality_differ_between_seeds_streams_and_epochs(seed, size, global_batch):
    pictured = np.arange(size) % 2 == 0
    orders = [
        np.concatenate([stream.batch(s, name, size, step, global_batch, pictured) for step in steps]).tolist()
        for s, name, steps in (
            (seed, "train", range(size)),
            (seed + 1, "train", range(size)),
            (seed, "retain", range(size)),
            (seed, "train", range(size, 2 * size)),
        )
    ]
    assert len(set(map(tuple, orders))) == len(orders)


@given(st.lists(st.one_of(st.integers(), st.from_regex(r"\w{0,5}", fullmatch=True)), min_size=1, max_size=4))
def test_a_derived_seed_fits_a_generator_and_depends_on_every_part(parts):
    seed = stream.derived_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == stream.derived_seed(*parts)
    for i, part in enumerate(parts):
        assert seed != stream.derived_seed(*parts[:i], f"{part}x", *parts[i + 1 :])
    assert seed != stream.derived_seed(*parts, 0)
