"""The shipped recipes on look-alikes of the files that they name: planned, trained on and prepared as they are."""

import json
from pathlib import Path

import pytest
import test_safety_forms as safety
import test_short_answers as short

from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data import prepare
from mirage_dist.evals import worklist
from mirage_dist.objectives.base import make
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe
from mirage_dist.train.planning import streams as planned

pope, mme, gqa, safebench, safetybench, eraser = (  # fixtures
    *(short.pope, short.mme, short.gqa),
    *(safety.safebench, safety.safetybench, safety.eraser),
)


@pytest.fixture
def data(tmp_path_factory, monkeypatch) -> Path:
    """The folder data/ of an empty working directory."""
    root = tmp_path_factory.mktemp("lab")
    (root / "data").mkdir()
    monkeypatch.chdir(root)
    return root / "data"


def load(name: str, *overrides: str) -> EvalRecipe:
    return configs.load(REPOSITORY / f"configs/eval/{name}.yaml", overrides, EvalRecipe)


@pytest.mark.parametrize(
    ("name", "fixture", "questions"),
    [
        ("pope", "pope", {"pope": 12}),
        ("mme", "mme", {"mme": 28}),
        ("gqa", "gqa", {"gqa": 2}),
        ("mm_safetybench", "safetybench", dict.fromkeys(("sd_typo", "sd", "typo", "text_only"), 52)),
    ],
)
def test_a_suite_asks_what_its_files_hold(data, request, name, fixture, questions):
    (data / name).symlink_to(request.getfixturevalue(fixture))
    planned = worklist.by_attack(worklist.plan(load(name)).questions)
    assert planned == {own: {"clean": count} for own, count in questions.items()}


def test_figstep_takes_its_published_pictures_and_typesets_where_the_recipe_says_so(data, safebench):
    (safebench / "SafeBench-Tiny.csv").rename(safebench / "safebench.csv")
    (safebench / "SafeBench-Tiny").rename(safebench / "SafeBench")
    (data / "figstep").symlink_to(safebench)
    assert len(worklist.plan(load("figstep")).questions) == 100
    assert not (safebench / "typeset").exists()
    own = "sets.figstep.sources=[{format: figstep, path: data/figstep/safebench.csv, images: data/figstep/typeset}]"
    assert len(worklist.plan(load("figstep", own)).questions) == 100
    assert len(list((safebench / "typeset").iterdir())) == 5  # equal texts are one picture


def test_safe_eraser_is_evaluated_prepared_and_trained_on(data, eraser):
    for name in ("all_train.json", "all_val.json"):
        _, root = eraser([safety.record(n) for n in range(3)], name)
    (data / "safe_eraser").symlink_to(root)
    planned = worklist.by_attack(worklist.plan(load("safe_eraser")).questions)
    assert planned == {own: {"clean": 12} for own in ("forget", "held_out", "decoupled", "retain")}
    recipe = configs.load(REPOSITORY / "configs/prepare/safe_eraser.yaml", [], PrepareRecipe)
    prepare.prepare(recipe)
    prepared = [f"[{{format: samples, path: {recipe.out}/{name}.jsonl}}]" for name in ("forget", "retain")]
    direct = [
        f"[{{format: safe_eraser, path: data/safe_eraser/all_train.json, part: {part}}}]"
        for part in ("forget", "retain")
    ]
    assert streams(*prepared) == {"forget": 12, "retain": 24}
    assert streams(*direct) == {"forget": 12, "retain": 12}


def streams(forget: str, retain: str) -> dict[str, int]:
    overrides = [f"data.streams.forget={forget}", f"data.streams.retain={retain}"]
    recipe = configs.load(REPOSITORY / "configs/train/npo.yaml", overrides, TrainRecipe)
    read = planned.read_streams(recipe, make(recipe.objective).needs)
    return {name: len(source.samples) for name, source in read.items()}


def test_training_refuses_an_empty_answer_and_leaves_it_out_only_where_the_source_says_so(data, eraser):
    bare = safety.record(1)
    del bare["unsafe_pairs"][2]["model_response"]
    bare["UnharmPair_text1"]["Prediction"] = " \n"
    path, _ = eraser([bare])
    parts = [f"{{format: safe_eraser, path: {path}, part: {part}}}" for part in ("forget", "retain")]
    with pytest.raises(
        ConfigError, match=r"record 0: the answer to 'img/Weapon/1\.jpg/forget2' is empty; there is nothing"
    ):
        streams(*(f"[{part}]" for part in parts))
    skipping = (f"[{part[:-1]}, on_bad_record: skip}}]" for part in parts)
    assert streams(*skipping) == {"forget": 3, "retain": 3}


def test_what_is_retained_or_filled_has_an_answer(data, eraser):
    bare = safety.record(1)
    bare["UnharmPair_text1"]["Prediction"] = ""
    path, _ = eraser([bare])
    talks = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"Hello {i}?"}, {"from": "gpt", "value": text}]}
        for i, text in enumerate(["Yes.", "", "No.", "Perhaps."])
    ]
    (data / "general.json").write_text(json.dumps(talks))
    recipe = (
        "answers=as_given",
        "min_match=1.0",
        "retain_size=6",
        "fill=[{format: llava, path: data/general.json, on_bad_record: FILL}]",
        "safety=[{format: safe_eraser, path: PATH, part: forget}, "
        "{format: safe_eraser, path: PATH, part: retain, on_bad_record: SAFETY}]",
    )

    def made(safety: str, fill: str) -> prepare.Prepared:
        words = {"PATH": path, "SAFETY": safety, "FILL": fill}
        overrides = list(recipe)
        for name, value in words.items():
            overrides = [override.replace(name, value) for override in overrides]
        return prepare.prepare(
            configs.load(REPOSITORY / "configs/prepare/vlguard.yaml", [*overrides, "harvest=null"], PrepareRecipe)
        )

    with pytest.raises(ConfigError, match=r"record 0: the answer to .*UnharmPair_text1' is empty"):
        made("error", "error")
    with pytest.raises(ConfigError, match=r"general\.json: sample '1': empty answer"):
        made("skip", "error")
    counts = made("skip", "skip")["counts"]["retain"]
    assert (counts["safe_pairs"], counts["filled"], counts["fill_skipped"]) == (3, 3, 1)
    assert counts["read"]["dropped"] == {"empty answer": 1}
