"""Figures of the tests of erasure: every model that was tested is named in its colour, one that was not is left out."""

from xml.etree import ElementTree

import pytest

from mirage_dist import state, stats
from mirage_dist.report.figures import drawing, erasure


def leaf(k: int, n: int = 20) -> dict:
    return {"rate": k / n, "k": k, "n": n, "ci95": list(stats.wilson(k, n))}


def entry(k: int) -> dict:
    rates = {"clean": leaf(k), "what_k1": leaf(k)}
    return {
        "asr": {**rates, "neutral_k1": leaf(0)},
        "ir": rates,
        "rr": {"clean": leaf(0)},
        "utility": {"clean": leaf(19)},
    }


def result(k: int) -> dict:
    steps = {
        str(step): {"all": leaf(k), "relearned": leaf(k), "other": None if step else leaf(0)} for step in (0, 2, 4)
    }
    layer = {"accuracy": leaf(k), "shuffled": leaf(4)}
    probe = {"majority": leaf(5), "places": {"last": [layer] * 3, "image": None}}
    return {
        "relearning": {"runs": {"8": {"steps": steps}, "16": {"steps": steps}}},
        "quantisation": {"before": entry(k), "after": {"8": {"entry": entry(k)}, "4": {"entry": entry(k)}}},
        "probe": {**probe, "transfer": probe},
        "completion": {"words": {"0": leaf(k), "2": leaf(k), "5": None}},
        "universal": {"held_out": {"contents": 4, "clean": leaf(0), "noise": None, "perturbed": leaf(k)}},
    }


TESTED = {"npo": result(1), "mine": result(15), "bare": {"suite": "demo"}}
DRAWN = {
    "relearning": erasure.relearning(TESTED, "8", "relearned"),
    "not relearned": erasure.relearning(TESTED, "8", "other"),
    "quantised": erasure.quantised(TESTED),
    "probed": erasure.probed(TESTED, "last"),
    "transferred": erasure.probed(TESTED, "last", transfer=True),
    "completed": erasure.completed(TESTED),
    "perturbed": erasure.perturbed(TESTED),
}


@pytest.mark.parametrize("name", DRAWN)
def test_each_model_that_was_tested_is_named_and_no_other(name):
    svg = drawing.svg(DRAWN[name], "x", "a figure")
    texts = [
        "".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter() if "text" in element.tag
    ]
    assert {"npo", "mine"} <= set(texts)
    assert "bare" not in texts
    assert "var(--slot3)" in svg  # npo's colour, as everywhere
    assert svg == drawing.svg(DRAWN[name], "x", "a figure")


def test_a_perturbations_figure_has_the_rates_of_contents_that_are_not_in_its_fit_and_both_controls():
    held_out = {"contents": 4, "clean": leaf(0), "noise": leaf(1), "perturbed": leaf(15)}
    tested = {"mine": {"universal": {"held_out": held_out, "fitted": {"perturbed": leaf(13)}}}}
    svg = drawing.svg(erasure.perturbed(tested), "x", "a figure")
    texts = ["".join(own.itertext()).strip() for own in ElementTree.fromstring(svg).iter() if "text" in own.tag]
    for text in ("as asked", "random noise", "perturbation", "5"):
        assert text in texts
    assert texts.count("75") == 2  # on the axis, and above the bar
    assert "65" not in texts


def test_a_figure_of_nothing_is_empty_and_no_error():
    for draw in (erasure.probed({}, "last"), erasure.probed(TESTED, "image"), erasure.relearning(TESTED, "99", "all")):
        assert "<svg" in drawing.svg(draw, "x", "a figure")


def test_results_are_read_in_order_and_runs_without_them_left_out(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name / "evals/demo").mkdir(parents=True)
        (tmp_path / name / "evals/demo/erasure.json").write_text(state.sealed("erasure", TESTED["npo"]))
    results = erasure.read({name: tmp_path / name for name in ("b", "c", "a")}, "demo")
    assert list(results) == ["b", "a"]
    assert erasure.sizes(results) == ["8", "16"]
    erasure.overview(results, tmp_path / "out" / "erasure.png")
    assert (tmp_path / "out" / "erasure.png").stat().st_size > 10_000
