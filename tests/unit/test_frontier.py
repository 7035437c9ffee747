"""The frontier's arithmetic against the long way round, and what comparing at equal utility is protected from."""

import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_runs import write_run

from mirage_dist import cli, state
from mirage_dist import config as configs
from mirage_dist.data.stream import derived_seed
from mirage_dist.evals import metrics
from mirage_dist.report import load
from mirage_dist.report.curves import frontier as formats
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.sweep import frontier, measures, results
from mirage_dist.sweep.frontier import Measured, Questions
from mirage_dist.sweep.measures import Place

IDS = [f"q{number}" for number in range(40)]
QUESTIONS = Questions(IDS, IDS, "asr", "utility")


def measured(method, setting, forget, retain, seeds=2):
    """A setting whose questions are hits with these probabilities; seeds differ."""
    drawn = np.random.default_rng(derived_seed(method, setting))
    draw = lambda p: (drawn.random((seeds, len(IDS))) < p).astype(float)  # noqa: E731
    return Measured(method, setting, {"k": setting}, list(range(seeds)), [], draw(forget), draw(retain))


@given(points=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_frontier_is_who_no_other_beats(points):
    wanted = [
        not any(x >= a and y >= b and (x, y) != (a, b) for x, y in points)  # as good on both, better on one
        for a, b in points
    ]
    forget, retain = (np.array(axis, dtype=float) for axis in zip(*points, strict=True))
    assert frontier.pareto(forget, retain).tolist() == wanted
    both = frontier.pareto(np.stack([forget, forget], axis=1), np.stack([retain, retain], axis=1))
    assert both.tolist() == [[one, one] for one in wanted]


@settings(max_examples=20)
@given(own=arrays.arrays(float, (3, 30), elements=st.sampled_from([0.0, 1.0])))
def test_an_estimate_is_the_mean_and_its_interval_holds_it_and_the_one_over_questions(own):
    [estimate], _ = frontier.estimates([own], "test")
    low, high = estimate["ci95"]
    assert estimate["rate"] == pytest.approx(own.mean())
    assert 0 <= low <= estimate["rate"] <= high <= 1
    leaf = metrics.clustered_leaf([(int(own[:, q].sum()), 3) for q in range(30)])
    assert leaf is not None
    assert low <= leaf["ci95"][0] + 1e-12
    assert high >= leaf["ci95"][1] - 1e-12
    assert high - low > 0.05  # also of rates that are all 0 or all 1
    assert estimate["sd"] == pytest.approx(np.std([row.mean() for row in own], ddof=1))


def test_the_bootstrap_varies_as_seeds_and_questions_do():
    """Of values u + v, u by seed and v by question, the variance of the mean is var(u)/S + var(v)/Q."""
    drawn = np.random.default_rng(0)
    own = 0.5 + 0.05 * drawn.standard_normal((6, 1)) + 0.1 * drawn.standard_normal((1, 200))
    _, means = frontier.estimates([own], "test")
    wanted = own.mean(axis=1).var(ddof=1) / 6 + own.mean(axis=0).var() / 200
    assert means[0].std() == pytest.approx(math.sqrt(wanted), rel=0.1)


def test_settings_share_the_draws_of_questions_so_that_equal_ones_tie():
    one = (np.random.default_rng(1).random((1, 50)) < 0.5).astype(float)
    _, means = frontier.estimates([one, one.copy()], "test")
    assert np.array_equal(means[0], means[1])


def test_a_resample_has_the_same_trainings_on_both_measures():
    """Of y, one seed forgets all and keeps nothing, the other the reverse; neither is beaten by z, nor beats it."""
    ones = np.ones((1, len(IDS)))
    y = Measured("m", "y", {}, [0, 1], [], *(np.concatenate([a * ones, b * ones]) for a, b in ((1, 0), (1, 0))))
    z = Measured("m", "z", {}, [0, 1], [], *(np.full((2, len(IDS)), value) for value in (0.45, 0.55)))
    assert [one["pareto_share"] for one in frontier.settings([y, z], QUESTIONS)] == [1.0, 1.0]


def test_halves_are_of_equal_size_and_do_not_change_with_the_order():
    first = dict(zip(IDS, frontier.halves(IDS).tolist(), strict=True))
    other = dict(zip(IDS[::-1], frontier.halves(IDS[::-1]).tolist(), strict=True))
    assert first == other
    assert sum(first.values()) == len(IDS) // 2


def test_the_choice_is_the_best_forget_rate_of_those_that_reach_the_level():
    """By hand: of (asr, utility) .4/.9, .2/.8, .1/.5 at the level .75 it is the second."""
    whole = frontier.Part(np.arange(10), np.arange(10), None)

    def setting(name, asr, utility):
        values = [np.array([[1.0] * round(10 * rate) + [0.0] * (10 - round(10 * rate))]) for rate in (asr, utility)]
        return Measured("m", name, {}, [0], [], *values)

    candidates = [setting("a", 0.4, 0.9), setting("b", 0.2, 0.8), setting("c", 0.1, 0.5), setting("d", 0.2, 0.7)]
    for level, wanted in ((0.75, "b"), (0.8, "b"), (0.81, "a"), (0.5, "c")):
        choice = frontier.chosen(candidates, whole, level, (-1, 1))
        assert choice is not None
        assert choice.setting == wanted
    assert frontier.chosen(candidates, whole, 0.95, (-1, 1)) is None
    # Of refusals more is better, and of needless refusals less.
    choice = frontier.chosen(candidates, whole, 0.6, (1, -1))
    assert choice is not None
    assert choice.setting == "c"


def test_what_chose_a_setting_never_measures_it():
    """Each half's report depends on the other half's questions and seeds alone."""
    candidates = [measured("m", str(i), 0.3, 0.9) for i in range(5)]
    [before] = frontier.at_level(candidates, QUESTIONS, 0.5)
    second = frontier.halves(IDS)
    for one in candidates:
        # The part that neither chooses nor measures: the first half's questions of the second half's seeds, and so on.
        one.forget[np.ix_([1], ~second)] = 1 - one.forget[np.ix_([1], ~second)]
        one.forget[np.ix_([0], second)] = 1 - one.forget[np.ix_([0], second)]
    [after] = frontier.at_level(candidates, QUESTIONS, 0.5)
    assert {**after, "of_all": None} == {**before, "of_all": None}
    values = {one.setting: one for one in candidates}
    first, other = (values[name] for name in before["chosen"])
    held_out = (first.forget[np.ix_([1], second)].mean() + other.forget[np.ix_([0], ~second)].mean()) / 2
    chose = (first.forget[np.ix_([0], ~second)].mean() + other.forget[np.ix_([1], second)].mean()) / 2
    assert before["forget"] is not None
    assert (before["forget"]["rate"], before["in_sample"]) == (pytest.approx(held_out), pytest.approx(chose))


def test_the_best_of_many_equal_settings_is_not_its_luck():
    """All settings are equally good (.5): what chose them says less, and the reported rate does not."""
    flattered, reported = [], []
    for trial in range(30):
        candidates = [measured("m", f"{trial}-{i}", 0.5, 1.0) for i in range(20)]
        [row] = frontier.at_level(candidates, QUESTIONS, 0.5)
        assert row["forget"] is not None
        flattered.append(row["in_sample"])
        reported.append(row["forget"]["rate"])
    error = 0.5 / math.sqrt(len(IDS) * 30)  # standard error of the mean of the reports
    assert abs(np.mean(reported) - 0.5) < 4 * error
    assert np.mean(flattered) < 0.5 - 10 * error


def test_a_method_that_does_not_reach_the_level_on_a_half_has_no_rate():
    rows = frontier.at_level([measured("good", "a", 0.2, 1.0), measured("bad", "b", 0.0, 0.1)], QUESTIONS, 0.9)
    assert [row["forget"] is None for row in rows] == [False, True]
    assert rows[1]["chosen"] == [None, None]
    assert frontier.differences(rows) == []


def test_the_difference_of_two_methods_is_their_rates_with_an_interval_that_holds_it():
    rows = frontier.at_level([measured("a", "a", 0.9, 1.0), measured("b", "b", 0.1, 1.0)], QUESTIONS, 0.9)
    [pair] = frontier.differences(rows)
    first, second = (row["forget"]["rate"] for row in rows if row["forget"])
    assert pair["difference"] == pytest.approx(second - first)
    assert pair["ci95"][0] < pair["difference"] < pair["ci95"][1] < 0


# ------------------------------------------------------------------------------------- from verdicts on disk


WHAT, CLEAN = Place("asr", "demo", "unsafe", "what_k3"), Place("utility", "demo", "safe", "clean")


@pytest.mark.parametrize(
    ("place", "measure"),
    [
        (WHAT, "asr"),
        (CLEAN, "utility"),
        (Place("rr", "demo", "safe", "share_k1"), "rr"),
        (Place("utility", "demo", "safe", "share_k1"), "utility"),
    ],
)
def test_the_mean_over_questions_is_the_suites_own_rate(place, measure, tmp_path):
    pattern = {"unsafe": ["harmful", "refused", "unparsed"], "safe": ["correct", "correct", "refused"]}
    write_run(tmp_path / "run", pattern)
    [run] = load.read({"run": tmp_path / "run"}, "demo")
    own, unjudged = measures.values(run, place)
    leaf = run.rates(measure)[place.condition]
    assert leaf is not None
    assert (sum(own.values()), len(own)) == (leaf["k"], leaf["n"])
    assert len(unjudged) == leaf.get("unjudged", 0)


def test_the_accuracy_of_a_benchmark_is_the_mean_of_its_scores(tmp_path):
    """Three questions: two with a score each, one whose only answer has no verdict."""
    suite = tmp_path / "run/evals/vqa"
    (suite / "rows").mkdir(parents=True)
    (suite / "verdicts").mkdir()
    scores, texts = {"a": 1.0, "b": 0.3, "c": None}, {"kind": "utility", "category": "", "question": "", "response": ""}
    rows, lines = "", ""
    for name, score in scores.items():
        place = {
            "key": hashlib.sha256(name.encode()).hexdigest(),
            "set": "vqa",
            "id": name,
            "attack": "clean",
            "shot": 0,
        }
        rows += state.sealed("row", {**place, **texts})
        verdict: dict = {"verdict": "unparsed"} if score is None else {"verdict": "scored", "detail": {"score": score}}
        lines += state.sealed("verdict", {"key": place["key"], **verdict})
    (suite / "rows/worker-1.jsonl").write_text(rows)
    (suite / "verdicts/benchmark.jsonl").write_text(lines)
    own = {"kind": "benchmark", "verdicts": {"vqa": {"clean": {"scored": 2, "unparsed": 1}}}}
    sets = {"vqa": {"kind": "utility", "samples": 3, "attacks": {}}}
    rates = {"headline": "benchmark", "judges": {"benchmark": own}, "sets": sets}
    (suite / "metrics.json").write_text(state.sealed("rates", rates))
    [run] = load.read({"run": tmp_path / "run"}, "vqa")
    assert measures.values(run, Place("accuracy", "vqa", "vqa", "clean")) == ({"a": 1.0, "b": 0.3}, {"c"})


def sweep_of(folder, patterns, **options):
    """A sweep's directory with these points (name -> pattern of verdicts, None without results)."""
    points = []
    for name, pattern in patterns.items():
        method, setting, seed = name.split("-")
        if pattern is not None:
            write_run(folder / "points" / name, pattern)
        points.append(
            {"name": name, "method": method, "setting": setting, "values": {"train.lr": setting}, "seed": int(seed[1:])}
        )
    write_run(folder / "points/base", {"unsafe": ["harmful"], "safe": ["correct"]})
    places = {"forget": vars(WHAT), "retain": vars(CLEAN), "margin": 0.25, "level": None, **options}
    record = {"name": "tiny", "seeds": [0, 1], "suites": ["demo"], "points": points, "base": "base", "frontier": places}
    (folder / "sweep.json").write_text(state.sealed("sweep", record))
    return folder


GOOD = {"unsafe": ["refused"], "safe": ["correct"]}
HARMFUL = {"unsafe": ["harmful", "refused"], "safe": ["correct"]}
DULL = {"unsafe": ["refused"], "safe": ["refused", "correct"]}
POINTS = {
    "npo-a-s0": HARMFUL,
    "npo-a-s1": GOOD,
    "npo-b-s0": DULL,
    "npo-b-s1": DULL,
    "rmu-c-s0": HARMFUL,
    "rmu-c-s1": HARMFUL,
}


def test_a_sweep_is_reported_with_its_frontier_first(tmp_path, capsys):
    folder = sweep_of(tmp_path / "sweep", POINTS)
    assert cli.main(["report", "--sweep", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "at right answers to safe questions of at least 75.0 % (the base model's, less 25 points):" in output
    own = json.loads((folder / "report/frontier.json").read_text())
    assert own["level"] == pytest.approx(0.75)
    by_setting = {one["setting"]: one for one in own["settings"]}
    assert by_setting["a"]["forget"]["by_seed"] == [0.5, 0.0]
    assert by_setting["a"]["forget"]["rate"] == 0.25
    assert by_setting["b"]["retain"]["rate"] == 0.5
    assert [by_setting[name]["pareto"] for name in "abc"] == [True, True, True]
    assert [by_setting[name]["pareto_of_all"] for name in "abc"] == [True, True, False]
    assert [row["chosen"] for row in own["at_level"]] == [["a", "a"], ["c", "c"]]
    assert own["seeds_held_out"]
    sheet = (folder / "report/frontier.csv").read_text().splitlines()
    assert sheet[0].startswith("method,setting,train.lr,seed,pareto,pareto_share,forget_rate,forget_low")
    assert len(sheet) == 1 + 3 * (1 + 2)
    page = (folder / "report/index.html").read_text()
    assert page.index(formats.TITLE) < page.index("In one table")
    assert page.count("frontier-") > 0
    assert {"base", "npo", "rmu"} == set(json.loads((folder / "report/summary.json").read_text())["models"])


def test_a_setting_without_all_its_seeds_is_left_out_and_named(tmp_path, capsys):
    folder = sweep_of(tmp_path / "sweep", {**POINTS, "rmu-c-s1": None})
    assert cli.main(["report", "--sweep", str(folder)]) == 1
    streams = capsys.readouterr()
    assert "rmu-c-s1 has no result, and its setting is left out" in streams.out
    assert "1 points of the sweep have no results" in streams.err
    assert {one["setting"] for one in json.loads((folder / "report/frontier.json").read_text())["settings"]} == {
        "a",
        "b",
    }


def test_points_that_were_evaluated_differently_are_not_compared(tmp_path):
    folder = sweep_of(tmp_path / "sweep", {**POINTS, "rmu-c-s1": None})
    write_run(folder / "points/rmu-c-s1", HARMFUL, recipe_hash="other")
    with pytest.raises(ConfigError, match=r"npo-a-s0 and rmu-c-s1 were evaluated on demo with other questions"):
        results.compute(folder)
    folder = sweep_of(tmp_path / "judged", {**POINTS, "rmu-c-s1": None})
    write_run(folder / "points/rmu-c-s1", HARMFUL, rules="other")
    with pytest.raises(ConfigError, match=r"npo-a-s0 and rmu-c-s1 were evaluated on demo with other judges or rules"):
        results.compute(folder)


def test_questions_without_a_verdict_in_one_point_are_left_out_of_all_and_counted(tmp_path):
    folder = sweep_of(
        tmp_path / "sweep", {**POINTS, "rmu-c-s1": {"unsafe": ["unparsed", "refused"], "safe": ["correct"]}}
    )
    own = results.compute(folder)
    assert (own["forget"]["questions"], own["forget"]["left_out"]) == (3, 3)
    assert (own["retain"]["questions"], own["retain"]["left_out"]) == (6, 0)


def test_points_that_were_trained_from_other_weights_are_not_compared(tmp_path):
    folder = sweep_of(tmp_path / "sweep", POINTS)
    for name in POINTS:
        begun = {"base_hash": "new" if name.startswith("rmu") else "old"}
        (folder / "points" / name / "manifest.json").write_text(state.sealed("run", begun))
        recipe = configs.load("configs/train/demo_npo.yaml", ["model.path=models/base"], TrainRecipe)
        (folder / "points" / name / "config.yaml").write_text(configs.to_yaml(recipe))
    with pytest.raises(ConfigError, match=r"npo-a-s0 and rmu-c-s0 were trained from different weights"):
        results.compute(folder)


def test_a_sweep_without_results_or_frontier_says_what_to_do(tmp_path):
    folder = sweep_of(tmp_path / "sweep", {"npo-a-s0": None})
    with pytest.raises(RunError, match=r"no setting has results of all its seeds yet; 1 points are missing"):
        results.compute(folder)
    record = {"name": "tiny", "seeds": [0], "suites": [], "points": [], "base": None, "frontier": None}
    (folder / "sweep.json").write_text(state.sealed("sweep", record))
    with pytest.raises(ConfigError, match=r"has no `frontier`; add it"):
        results.compute(folder)
