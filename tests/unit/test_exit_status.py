"""Status 0 means that the thing is there: what would measure, evaluate or make nothing is an error that says so."""

from dataclasses import replace

import pytest

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import run as erasure
from mirage_dist.evals import attacks, follow, judges, status, tracking
from mirage_dist.evals.attacks import Attack
from mirage_dist.evals.sharing.files import suite_dir
from mirage_dist.report.figures import drawing
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, TrainRecipe
from mirage_dist.schema.names import LONGEST_PART, NAME, PLACE


@pytest.fixture
def recipe(tmp_path):
    return configs.load("configs/eval/demo.yaml", [f"run.dir={tmp_path / 'run'}"], EvalRecipe)


def test_a_followed_run_that_ends_without_an_evaluated_checkpoint_is_no_success(recipe, tmp_path, monkeypatch):
    (tmp_path / "export").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(
        tracking, "train_recipe", lambda _: configs.load("configs/train/demo_npo.yaml", [], TrainRecipe)
    )
    with pytest.raises(RunError, match="has ended, and no checkpoint of it was evaluated"):
        follow.follow(replace(recipe, follow=str(tmp_path)))
    metrics = suite_dir(recipe) / "step-000001" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("{}")
    follow.follow(replace(recipe, follow=str(tmp_path)))


def test_the_status_of_a_followed_run_that_nobody_evaluates_says_so(recipe, tmp_path):
    with pytest.raises(ConfigError, match="this evaluation has not started yet"):
        status.report(replace(recipe, follow=str(tmp_path)))


def test_tests_of_erasure_that_name_no_test_are_refused(recipe):
    with pytest.raises(ConfigError, match="names no test to make; expected some of relearning, quantisation, probe"):
        erasure.options(replace(recipe, erasure={"forget": recipe.erasure["forget"]}))


@pytest.mark.parametrize("panel", [["keyword", "keyword"], ["keyword", {"kind": "keyword", "name": "Keyword"}]])
def test_of_two_judges_none_is_left_out_silently(recipe, panel):
    with pytest.raises(ConfigError, match=r"judges\[0\] and judges\[1\] are both named '[Kk]eyword'"):
        judges.read(replace(recipe, judges=panel))


def test_an_attack_without_a_single_rewrite_is_refused():
    class Nothing(Attack):
        def __call__(self, sample):
            return []

    sample = Sample("1", None, "What?", "That.", True, "", "file", ())
    with pytest.raises(ConfigError, match="attack 'x' has rewrites for none of 1 samples"):
        attacks.apply(Nothing(), [sample], "x")


@pytest.mark.parametrize("name", ["con", "NUL", "Aux.txt", "com1", "lpt9.a.b"])
def test_names_that_some_shared_file_systems_cannot_hold_are_refused(name):
    with pytest.raises(ConfigError, match="expected another name"):
        NAME(name, "suite")
    NAME(f"x{name}", "suite")


def test_a_temporary_of_the_longest_place_fits_a_file_system(tmp_path):
    PLACE(f"/x/{'y' * LONGEST_PART}", "out")
    (tmp_path / f"{'y' * LONGEST_PART}.01234567.tmp.01234567.gone").mkdir()
    with pytest.raises(ConfigError, match=f"each part of it at most {LONGEST_PART}"):
        PLACE("y" * (LONGEST_PART + 1), "out")


@pytest.mark.parametrize("suite", ["../x", "*", "a/b"])
def test_a_suite_on_the_command_line_is_a_name(suite, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "runs/x", "--suite", suite])
    assert "expected a name" in capsys.readouterr().err


def test_dollar_signs_of_data_are_no_formula_in_a_figure():
    assert "$\\foo$" in drawing.svg(lambda axes, _: axes.set_title("$\\foo$ costs $5"), "x", "y")
