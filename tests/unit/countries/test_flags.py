"""The countries world's flags: one for every country that is asked about, distinct from all others, drawn whole."""

from itertools import combinations

import numpy as np
import pytest

from mirage_dist.countries import flags
from mirage_dist.countries.facts import COUNTRIES


def test_no_two_flags_look_alike():
    left, top, right, bottom = flags.BOX
    drawn = {name: np.asarray(flags.draw(name), dtype=float)[top:bottom, left:right] for name in flags.FLAGS}
    nearest = min((float(np.abs(drawn[a] - drawn[b]).mean()), a, b) for a, b in combinations(drawn, 2))
    assert nearest[0] >= flags.MIN_DISTANCE, nearest


def test_a_flag_fills_its_box_and_leaves_the_ground():
    left, top, right, bottom = flags.BOX
    for name in flags.FLAGS:
        pixels = np.asarray(flags.draw(name))
        assert pixels.shape == (flags.SIDE, flags.SIDE, 3)
        ground = np.all(pixels == 0x80, axis=2)
        assert not ground[top:bottom, left:right].any(), name
        ground[top:bottom, left:right] = True
        assert ground.all(), name


def test_a_drawing_depends_on_its_generator_only():
    one, again, other = (np.asarray(flags.draw("France", np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_every_flag_has_a_country_and_no_value_stands_for_two_capitals():
    assert set(flags.FLAGS) <= set(COUNTRIES)
    capitals = [capital for country in COUNTRIES.values() for capital in country.capitals]
    assert len(set(capitals)) == len(capitals)
    with pytest.raises(KeyError):
        flags.draw("Atlantis")
