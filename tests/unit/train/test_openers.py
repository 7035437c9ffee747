"""`data.balance: openers`: what an epoch draws, against counts by hand and against other even distributions."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data import stream
from mirage_dist.data.sample import Sample
from mirage_dist.objectives.base import Needs
from mirage_dist.schema import ConfigError
from mirage_dist.train.planning import openers

WORDS = ("share", "what", "name", "describe")
UNLEARNING = Needs(streams=("forget", "retain"), logp=("forget",), unlearned=("forget",))
IMITATION = Needs(streams=("train",), logp=("train",))


def samples(counts, answer="An answer."):
    made = [word for word, count in counts.items() for _ in range(count)]
    return [
        Sample(f"{word}-{i}", None, f"{word.title()} the {i} thing.", answer, True, "", "file")
        for i, word in enumerate(made)
    ]


def drawn(balance, streams, name, epoch=0, seed=3):
    """Openers of one epoch of a stream, counted."""
    order = balance.draws[name].epoch(seed, name, epoch)
    return Counter(streams[name][int(i)].question.split()[0].lower() for i in order)


def of(streams, needs):
    return openers.balance(openers.of(streams, None), needs)


def test_mirrored_openers_become_even_and_no_sample_is_repeated_more_than_needed():
    streams = {"forget": samples({"share": 95, "what": 5}), "retain": samples({"share": 10, "what": 190})}
    balance = of(streams, UNLEARNING)
    assert drawn(balance, streams, "forget") == {"share": 50, "what": 50}
    assert drawn(balance, streams, "retain") == {"share": 100, "what": 100}
    assert balance.text == (
        'data.balance=openers: "share", "what" as frequent in forget as in retain; an epoch has a sample up to 10 times'
    )


def test_an_opener_that_one_side_lacks_keeps_its_share_and_is_named():
    streams = {"forget": samples({"share": 60, "what": 20, "name": 20}), "retain": samples({"share": 20, "what": 60})}
    balance = of(streams, UNLEARNING)
    assert drawn(balance, streams, "forget") == {"share": 40, "what": 40, "name": 20}
    assert drawn(balance, streams, "retain") == {"share": 40, "what": 40}
    (uneven,) = balance.uneven
    assert '20% of forget open with words that others lack or that cannot be measured ("name"), and stay' in uneven


def test_questions_without_a_first_word_are_not_evened_under_a_false_name():
    def chinese(count):
        return [Sample(str(i), None, "这面国旗是哪个国家的？", "An answer.", True, "", "file") for i in range(count)]

    with pytest.raises(ConfigError, match="no first word is in forget and in retain"):
        of({"forget": chinese(5), "retain": chinese(7)}, UNLEARNING)
    streams = {"forget": [*samples({"share": 9, "what": 3}), *chinese(8)], "retain": samples({"share": 4, "what": 4})}
    balance = of(streams, UNLEARNING)
    order = balance.draws["forget"].epoch(0, "forget", 0).tolist()
    assert Counter(streams["forget"][i].question[:4] for i in order) == {"Shar": 8, "What": 4, "这面国旗": 8}
    assert (
        '40% of forget open with words that others lack or that cannot be measured ("(not measured)")'
        in (balance.uneven[0])
    )


def test_one_stream_is_balanced_between_its_refusals_and_its_answers():
    refused = samples({"share": 90, "what": 10}, "I'm sorry, but I can't help with that.")
    streams = {"train": [*refused, *samples({"share": 20, "what": 180})]}
    balance = of(streams, IMITATION)
    order = balance.draws["train"].epoch(0, "train", 0).tolist()
    counts = Counter((streams["train"][i].question.split()[0], i < len(refused)) for i in order)
    assert counts == {("Share", True): 50, ("What", True): 50, ("Share", False): 100, ("What", False): 100}
    assert "train's refusals" in balance.text


@given(st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=2, max_size=3), st.integers(0, 99))
def test_what_is_shared_is_even_nothing_is_lost_and_the_most_repeated_sample_is_repeated_least(counts, seed):
    """Any other even distribution repeats some sample at least as often."""
    names = ("forget", "retain", "more")[: len(counts)]
    streams = {name: samples(dict(zip(WORDS, own, strict=True))) for name, own in zip(names, counts, strict=True)}
    needs = Needs(streams=names, logp=names, unlearned=("forget",))
    shared = [i for i in range(4) if all(own[i] for own in counts)]
    if not all(map(sum, counts)) or not shared:
        return
    balance = of(streams, needs)
    for name, own in zip(names, counts, strict=True):
        seen = drawn(balance, streams, name)
        assert seen.total() == len(streams[name])
        assert set(seen) == {word for word, count in zip(WORDS, own, strict=True) if count}
        for i in set(range(4)) - set(shared):
            assert seen[WORDS[i]] == own[i]
    shares = np.array([[own[i] / sum(own[j] for j in shared) for i in shared] for own in counts])
    even = shares.min(0) / shares.min(0).sum()
    for other in np.random.default_rng(seed).dirichlet(np.ones(len(shared)), 20):
        assert (other / shares).max() >= (even / shares).max() - 1e-12
    for name, own in zip(names, counts, strict=True):
        seen, total = drawn(balance, streams, name), sum(own[i] for i in shared)
        for i, share in zip(shared, even, strict=True):
            assert abs(seen[WORDS[i]] - total * share) <= len(shared)  # whole samples, and one of each at least


@given(st.data(), st.integers(1, 5), st.integers(0, 99))
def test_within_an_opener_every_sample_comes_as_often_or_once_more(data, epochs, seed):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    classes = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.ones(len(sizes), np.int64)
    for _ in range(len(classes) - len(sizes)):
        counts[data.draw(st.integers(0, len(sizes) - 1))] += 1
    draw = stream.Draw(classes, counts)
    seen = Counter(int(i) for epoch in range(epochs) for i in draw.epoch(seed, "forget", epoch))
    for number, (size, count) in enumerate(zip(sizes, counts.tolist(), strict=True)):
        own = [seen[int(i)] for i in np.flatnonzero(classes == number)]
        assert sum(own) == epochs * count
        assert max(own) - min(own) <= 1
        assert min(own) == epochs * count // size


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("modality", [False, True])
def test_an_epoch_holds_what_is_drawn_however_it_is_grouped(grouped, modality):
    rng = np.random.default_rng(5)
    size, batch = 48, 8
    draw = stream.Draw(np.repeat([0, 1, 2], [40, 6, 2]), np.array([20, 20, 8]))
    pictured = rng.random(size) < 0.6 if modality else None
    lengths = rng.integers(1, 100, size)
    for epoch in range(3):
        steps = []
        for step in range(epoch * size // batch, (epoch + 1) * size // batch):
            if grouped:
                steps.append(stream.grouped(7, "s", lengths, step, batch, pictured, draw))
            else:
                steps.append(stream.batch(7, "s", size, step, batch, pictured, draw))
        assert Counter(np.concatenate(steps).tolist()) == Counter(draw.epoch(7, "s", epoch).tolist())
        if pictured is not None:
            kinds = [set(pictured[own].tolist()) for own in steps]
            assert sum(len(kind) == 2 for kind in kinds) <= 1


def test_epochs_differ_and_seeds_and_streams_too():
    draw = stream.Draw(np.repeat([0, 1], [30, 10]), np.array([20, 20]))
    orders = [draw.epoch(seed, name, epoch).tolist() for seed in (0, 1) for name in "ab" for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_paired_streams_follow_their_first():
    needs = Needs(streams=("chosen", "rejected", "retain"), paired=("chosen", "rejected"), unlearned=("rejected",))
    own = samples({"share": 9, "what": 3})
    streams = {"chosen": own, "rejected": own, "retain": samples({"share": 3, "what": 9})}
    assert set(of(streams, needs).draws) == {"chosen", "retain"}


@pytest.mark.parametrize(
    ("streams", "needs", "message"),
    [
        (
            {"forget": samples({"share": 3}), "retain": samples({"what": 2})},
            UNLEARNING,
            'no first word is in forget and in retain (forget: "share"; retain: "what"), so none can be even; reword '
            "the questions with prepare.diversify",
        ),
        (
            {"train": samples({"share": 3, "what": 2})},
            IMITATION,
            "has only train's answers to balance; it needs a second stream, or refusals beside answers; take it out",
        ),
    ],
)
def test_what_cannot_be_balanced_is_an_error(streams, needs, message):
    with pytest.raises(ConfigError, match=re.escape(f"data.balance=openers: {message}")):
        of(streams, needs)


def test_what_is_stored_is_what_was_counted(tmp_path):
    streams = openers.of({"a": samples({"share": 3, "what": 2}), "b": samples({"name": 1}, "I cannot answer.")}, None)
    openers.write(tmp_path, streams)
    again = openers.read(tmp_path)
    assert {name: own.labels for name, own in again.items()} == {name: own.labels for name, own in streams.items()}
    assert all(again[name].codes.tolist() == own.codes.tolist() for name, own in streams.items())
