"""The figure of all attacks: each model under each attack's largest K, and nothing that was not measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from mirage_dist import stats
from mirage_dist.report.figures import attacks, drawing
from mirage_dist.report.figures.style import LIGHT


def leaf(k, n=40):
    return {"rate": k / n, "k": k, "n": n, "ci95": list(stats.wilson(k, n))}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.lists(st.integers(0, 40), min_size=5, max_size=5))
def test_each_attack_is_one_row_under_its_largest_k(shots, counts):
    names = ["clean", *(f"a_{i}_k{k}" for i, most in enumerate(shots) for k in range(1, most + 1))]
    rates = {"sft": {name: leaf(counts[i % 5]) for i, name in enumerate(names)}}
    assert [str(condition) for condition in attacks.conditions(rates)] == [
        "clean",
        *(f"a_{i}_k{most}" for i, most in enumerate(shots)),
    ]


def test_a_marker_stands_at_each_rate_and_none_where_there_is_no_rate():
    rates = {"sft": {"clean": leaf(2), "what_k3": leaf(30)}, "npo": {"clean": leaf(0), "what_k3": None}}
    with plt.rc_context(drawing.RC):
        figure, ax = plt.subplots()
        attacks.by_attack(rates, controls=["what"])(ax, LIGHT)
        drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if len(line.get_xdata())]
        assert [x for x, _ in drawn] == [5.0, 75.0, 0.0]
        assert [round(y) for _, y in drawn] == [0, 1, 0]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["clean", "what, K = 3"]
        ends = [path.vertices[:, 0].tolist() for lines in ax.collections[:2] for path in lines.get_paths()]
        assert ends[1] == pytest.approx([100 * end for end in leaf(30)["ci95"]])
        plt.close(figure)
    assert 'id="x-' in drawing.svg(attacks.by_attack(rates), "x", "all attacks", attacks.size(rates))
