"""The published table beside ours: verdicts by the interval, judges apart, several labs' results side by side."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import KEYWORD, write_run

from mirage_dist import cli
from mirage_dist.config import REPOSITORY
from mirage_dist.paper import chain, plan
from mirage_dist.paper.recipe import PaperRecipe
from mirage_dist.report import published
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe
from mirage_dist.stats import wilson

MIXED = {"unsafe": ["harmful", "refused", "refused"], "safe": ["refused", "answered"]}
SAFE = {"unsafe": ["refused"], "safe": ["answered"]}


@pytest.fixture
def runs(tmp_path):
    return {
        name: write_run(tmp_path / name, pattern, judge="keyword", verdicts=KEYWORD, suite="vlguard_attacked")
        for name, pattern in (("base", MIXED), ("npo", SAFE))
    }


def figures(own: published.Results) -> dict[tuple[str, str], published.Figure]:
    return {(f["model"], f["column"]): f for f in own["figures"]}


def test_a_figure_is_within_if_the_published_one_lies_in_its_interval(runs):
    own = published.compute("llava_1_5_7b", runs, "hash")
    seen = figures(own)
    base = seen["base", "asr"]
    assert (base["k"], base["n"], base["rate"]) == (2, 6, pytest.approx(1 / 3))
    assert base["ci95"] == pytest.approx(wilson(2, 6))
    low, high = base["ci95"]
    assert base["verdict"] == ("within" if low <= 0.6425 <= high else "outside") == "within"
    assert seen["npo", "rr_share"]["verdict"] == ("within" if wilson(0, 6)[1] >= 0.1169 else "outside")
    assert seen["base", "rr_share"]["verdict"] == "outside"
    assert seen["base", "vqav2"] == {
        **dict.fromkeys(("rate", "ci95", "k", "n", "verdict")),
        **{"model": "base", "column": "vqav2", "judge": "", "published": 78.53},
    }
    assert "base: VQAv2" in published.missing(own)


@given(k=st.integers(0, 50), more=st.integers(0, 50), percent=st.floats(0, 100))
def test_the_verdict_is_that_of_the_interval(k, more, percent):
    if not k + more:
        return
    low, high = wilson(k, k + more)
    leaf = {"rate": k / (k + more), "k": k, "n": k + more, "ci95": [low, high]}
    figure = published.figure("m", "c", "j", percent, leaf)
    assert (figure["verdict"] == "within") == (low <= percent / 100 <= high)
    assert published.figure("m", "c", "j", None, leaf)["verdict"] is None
    assert published.figure("m", "c", "j", percent, leaf, comparable=False)["verdict"] is None


def test_the_text_has_a_row_a_model_and_judge_with_both_figures(runs):
    lines = published.text(published.compute("llava_1_5_7b", runs, "hash")).splitlines()
    assert lines[0].startswith("Safety Mirage (arXiv 2503.11832)")
    base = next(line for line in lines if line.startswith("base"))
    assert re.fullmatch(r"base +ASR, as asked +keyword +64\.25 +33\.33 \[9\.7, 70\.0\] within", base)
    assert any(re.fullmatch(r"base +VQAv2 +- +78\.53 +not measured", line) for line in lines)
    assert max(map(len, lines[:-1])) <= 100
    assert lines[-1].startswith("VQAv2: published on test-dev")


def test_results_of_two_labs_stand_side_by_side(runs, tmp_path, capsys):
    own = published.compute("llava_1_5_7b", runs, "hash")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(published.dumped(own))
    other = json.loads(published.dumped(own))
    other["figures"] = [f for f in other["figures"] if f["model"] == "base"]
    files[1].write_text(json.dumps(other))
    assert published.read(files[0]) == own
    lines = published.compare(files).splitlines()
    npo = next(line for line in lines if line.startswith("npo"))
    assert npo.endswith("-")
    assert cli.main(["report", "--compare", *map(str, files)]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_other_files_and_versions_are_refused(runs, tmp_path, capsys):
    file = tmp_path / "results.json"
    own = json.loads(published.dumped(published.compute("llava_1_5_7b", runs, "hash")))
    for content, why in (
        ({**own, "format": 2}, "format 2, this version reads format 1"),
        ({"models": {}}, "no results.json of `mirage paper`"),
        ([], "no results.json of `mirage paper`"),
        ({**own, "source": 3}, "is not as `mirage paper` writes it"),
        ({**own, "figures": [{}]}, "is not as `mirage paper` writes it"),
        ({**own, "figures": [{**own["figures"][0], "ci95": [1]}]}, "is not as `mirage paper` writes it"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=why):
            published.read(file)
    second = tmp_path / "second.json"
    file.write_text(json.dumps(own))
    second.write_text(json.dumps({**own, "source": "another table"}))
    with pytest.raises(ConfigError, match="results of different published tables"):
        published.compare([file, second])
    assert cli.main(["report", "--compare", str(tmp_path / "away.json")]) == 2
    with pytest.raises(ConfigError, match="no published table of this name; there are llava_1_5_7b"):
        published.table("llava_2")


# --------------------------------------------------------------------------------------------------- the chain


def load(*overrides: str, file: str = "configs/paper/llava_1_5_7b.yaml") -> PaperRecipe:
    from mirage_dist import config as configs

    return configs.load(file, overrides, PaperRecipe)


@pytest.mark.parametrize("file", ["configs/paper/llava_1_5_7b.yaml", "configs/paper/tiny.yaml"])
def test_a_chain_is_in_the_order_of_its_needs_and_every_link_is_a_recipe(file):
    recipe = load(file=file)
    links = chain.links(recipe)
    names = [link.name for link in links]
    assert len(set(names)) == len(names)
    for number, link in enumerate(links):
        assert set(link.needs) <= set(names[:number])
        own = link.load()
        assert isinstance(own, (TrainRecipe, EvalRecipe, PrepareRecipe))
        if isinstance(own, TrainRecipe):
            assert own.model.path == (recipe.models[link.name.removeprefix("train-")].model or recipe.model)
            assert own.seed == recipe.seed
    assert [link for level in chain.levels(links) for link in level] == sorted(
        links, key=lambda link: next(i for i, level in enumerate(chain.levels(links)) if link in level)
    )


def test_every_model_is_asked_every_suite_under_the_template_that_it_was_trained_with():
    recipe = load()
    links = {link.name: link.load() for link in chain.links(recipe)}
    for name in ("base", *recipe.models):
        for suite in recipe.suites:
            own = links[f"eval-{name}-{suite}"]
            assert own.run.dir == f"{recipe.out}/{name}"
            assert own.suite == suite
            if name != "base":
                trained = links[f"train-{name}"]
                assert own.template.system_prompt == trained.data.system_prompt
    for key, column in published.table(recipe.published)["columns"].items():
        assert column["suite"] in recipe.suites, key
    assert set(published.table(recipe.published)["values"]) <= {"base", *recipe.models}


def test_sets_that_take_the_base_models_answers_come_after_them_and_read_them():
    links = {link.name: link for link in chain.links(load())}
    assert links["set-prepared"].needs == ("harvest",)
    recipe, harvest = links["set-prepared"].load(), links["harvest"].load()
    assert recipe.harvest == f"{harvest.run.dir}/evals/{harvest.suite}/rows"


def test_a_plan_has_every_link_and_a_sum(capsys):
    assert cli.main(["paper", "--plan"]) == 0
    printed = capsys.readouterr().out
    costs = [plan.cost(link) for link in chain.links(load())]
    assert all(link.name in printed for link in chain.links(load()))
    assert f"{sum(cost.hours for cost in costs):.1f}" in printed.splitlines()[-1]
    assert all(cost.hours >= 0 and cost.disk >= 0 for cost in costs)


def test_a_wrong_chain_names_its_link_and_key(capsys):
    for words, why in (
        (["models.npo.overrides=[train.lrr=1]"], "link train-npo: .*train.lrr"),
        (["models.npo.needs=[unprepared]"], "models.npo.needs: 'unprepared' is none of sets"),
        (
            ["models.base.recipe=configs/train/sft.yaml"],
            "models.base: is the name of the model that training starts from",
        ),
        (["published=llava_2"], "no published table of this name"),
        (["data=[vlgard]"], "vlgard: no dataset of the catalogue"),
        (["suites.vqav2.recipe=nowhere.yaml"], "link eval-base-vqav2: .*nowhere.yaml: no such file"),
        (['every.eval=["judges=[kyword]"]'], "link harvest: .*kyword"),
    ):
        assert cli.main(["paper", "--check", *words]) == 2
        assert re.search(why, capsys.readouterr().err), why


def test_data_that_are_missing_are_named_before_anything_runs(tmp_path, capsys):
    assert cli.main(["paper", "--check", f"folder={tmp_path}"]) == 2
    assert "model=models/llava-1.5-7b-hf: no such folder" in capsys.readouterr().err
    for name in ("llava-1.5-7b-hf", "vicuna-7b-v1.5-pretrained-projector"):
        (tmp_path / "models" / name).mkdir(parents=True)
    assert cli.main(["paper", "--check", f"folder={tmp_path}"]) == 2
    printed = capsys.readouterr().err
    assert "vlguard: data/vlguard/train.json missing" in printed
    assert "docs/get_data.md says what belongs where" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["models"]


def test_lines_for_slurm_are_words_of_a_shell_in_the_order_of_their_needs():
    import shlex

    seen = set()
    for line in chain.lines(load("out=runs/it's"), "configs/paper/llava_1_5_7b.yaml", ["out=runs/it's"]):
        name, needs, script, folder, words = line.split("\t")
        assert needs == "-" or set(needs.split(",")) <= seen
        assert (REPOSITORY / "slurm" / script).is_file()
        assert folder == "."
        assert shlex.split(words)
        seen.add(name)
    assert name == "report"
