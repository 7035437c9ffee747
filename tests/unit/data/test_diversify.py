"""Diversified safety data: no opening stands for a class, nothing but the question's wording changes."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import config as configs
from mirage_dist import stats
from mirage_dist.data import formats, prepare, sources, words
from mirage_dist.data.diversify import diversify
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import world as embedded_world
from mirage_dist.schema import ChatConfig, ConfigError, DiversifyConfig, PrepareRecipe, WorldConfig

OPENERS = ["what", "share", "can", "tell", "how"]


def samples(refused, answered):
    return [
        Sample(str(i), None, f"Give number {i} ?", f"answer {i}", safe=i >= refused, category="", source="here")
        for i in range(refused + answered)
    ]


@st.composite
def cases(draw):
    openers = OPENERS[: draw(st.integers(2, 5))]
    copies = draw(st.integers(1, len(openers)))
    config = DiversifyConfig([f"{word} {{rest}}" for word in openers], copies=copies, keep=draw(st.booleans()))
    return samples(draw(st.integers(1, 30)), draw(st.integers(1, 30))), config, draw(st.integers(0, 99))


@given(cases())
def test_each_class_uses_every_opening_evenly_and_answers_stay(case):
    given_, config, seed = case
    made, failed = diversify(given_, config, seed)
    assert (made, failed) == (diversify(given_, config, seed)[0], 0)
    assert len(made) == len(given_) * (config.copies + config.keep)
    assert len({sample.id for sample in made}) == len(made)
    by_source = {sample.id: sample for sample in given_}
    worded = [sample for sample in made if "~" in sample.id]
    for sample in worded:
        source = by_source[sample.id.split("~")[0]]
        assert (sample.answer, sample.safe) == (source.answer, source.safe)
        assert sample.question.split(" ", 1)[1] == source.question.split(" ", 1)[1]
    for safe in (True, False):
        uses = Counter(sample.question.split()[0].lower() for sample in worded if sample.safe == safe)
        counts = [uses[template.split()[0]] for template in config.templates]
        assert max(counts) - min(counts) <= 1
    for sample in given_:
        own = [m.question for m in worded if m.id.split("~")[0] == sample.id]
        assert len(set(own)) == config.copies


def test_the_whole_question_may_stand_in_a_template():
    config = DiversifyConfig(["Please answer: {question}", "What of this: {question}"])
    assert {m.question for m in diversify(samples(1, 1), config, 0)[0]} <= {
        f"{start}: Give number {i} ?" for i in (0, 1) for start in ("Please answer", "What of this")
    }


@pytest.mark.parametrize(
    ("question", "body"),
    [
        ("What is the capital of Mali?", "the capital of Mali"),
        ("what  is it?", " is it"),  # no opening: two spaces
        ("Which isle is it ?", "isle is it"),  # no opening either: a longer word
        ("Tell me  this.", "this"),
        ("Share it!", "it"),
        ("(Which is it)", "it)"),
    ],
)
def test_an_opening_of_several_words_leaves_nothing_of_itself(question, body):
    sample = replace(samples(1, 0)[0], question=question)
    filled = words.fill_template("x {body}", sample, ["what is", "Which is", "Which", "tell me"])
    assert filled is not None
    assert filled.lower().partition("x ")[2].strip() == body.strip().lower()


def test_the_sets_themselves_are_reworded_evenly(tmp_path):
    """Unlike the safety data's, their classes are to forget and to retain, whatever `safe` says."""
    rows = [
        {"id": f"{i}", "image": None, "question": q, "answer": f"it is {i}", "history": [], "safe": i % 2 == 0}
        for i, q in enumerate(["Share number 1.", "What is number 2?"] * 8)
    ]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates = {"templates": ["What is {body}?", "Share {body}."], "openings": ["what is"], "rewords": "sets"}
    out, safety = tmp_path / "out", [{"format": "samples", "path": str(file)}]
    counts = recipe(file, out, safety=safety, answers="as_given", diversify=templates)["counts"]
    assert counts["diversified"] == {"samples": 16, "questions": 16, "not_reworded": 0}
    for name, safe in (("forget", False), ("retain", True)):
        made = sources.read(formats.source("samples", f"{out}/{name}.jsonl")).samples
        assert {sample.safe for sample in made} == {safe}
        assert Counter(sample.question[:10] for sample in made) == {"What is nu": 4, "Share numb": 4}
        assert all(sample.answer.startswith("it is") for sample in made)
    assert not (out / "diversified.jsonl").exists()


def test_the_worlds_first_words_say_nothing_after_it(tmp_path):
    world = WorldConfig(str(tmp_path / "world"), seed=11, base_samples=40, safety_samples=120, eval_samples=8)
    embedded_world.make(world)
    raw = words.first_words(sources.read(safety(world)).samples)
    assert surprising(raw) >= {"what", "share"}
    overrides = [f"{k}={v}" for k, v in (("world.dir", world.dir), ("seed", 11), ("world.base_samples", 40))]
    overrides += ["world.safety_samples=120", "world.eval_samples=8"]
    recipe = configs.load("configs/prepare/demo_diversified.yaml", overrides, PrepareRecipe)
    counts = prepare.prepare(recipe)["counts"]
    assert counts["diversified"]["samples"] == counts["diversified"]["questions"] == 240
    made = sources.read(formats.source("samples", f"{recipe.out}/diversified.jsonl")).samples
    assert len(made) == 240
    assert surprising(words.first_words(made)) == set()


def safety(world):
    return formats.source("vlguard", f"{embedded_world.safety_dir(world)}/train.json", images=world.dir)


def surprising(words):
    """Those whose odds of refusal differ from the others'."""
    refused, answered = (sum(count[kind] for count in words.values()) for kind in ("refusal", "answer"))
    tied = set()
    for word, count in words.items():
        r, a = count["refusal"], count["answer"]
        _, (low, high) = stats.log_odds(r, a, refused - r, answered - a)
        tied |= {word} if low > 0 or high < 0 else set()
    return tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["what {rest}"]}, "expected 2 and `copies`"),
        ({"templates": ["what {rest}", "share it"]}, "use {rest}, {body} or {question}"),
        ({"templates": ["what {rest}", "share {all}"]}, "use {rest} or {body} or {question}"),
        ({"templates": ["what {rest}", "share {rest}"], "copies": 3}, "expected 2 and `copies`"),
        ({"openers": ["what", "share"]}, "templates, or else openers and a chat model"),
        ({"templates": ["what {rest}", "a {rest}"], "openers": ["what", "a"]}, "templates, or else openers"),
        ({"openers": ["what"], "chat": {"path": "m"}}, "openers: 1 different ones"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, change, message):
    file = tmp_path / "train.json"
    file.write_text("[]")
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("}", r"\}")):
        recipe(file, tmp_path / "out", diversify=change)


def test_what_a_chat_model_cannot_reword_is_left_out_and_counted():
    config = DiversifyConfig(openers=["what", "share"], chat=ChatConfig(path="a model"))

    def reword(own, opener):
        return [None if sample.id == "1" else f"{opener}: {sample.question}" for sample in own]

    made, failed = diversify(samples(2, 2), config, 0, reword)
    assert ([m.id for m in made], failed) == (["0~1", "2~1", "3~1"], 1)
    assert all(m.question.split(":")[0] in ("what", "share") for m in made)


def test_questions_that_templates_do_not_fit_are_counted_and_too_many_are_an_error():
    own = [*samples(10, 9), Sample("zh", None, "描述这张图片", "红", True, "", "here")]
    made, failed = diversify(own, DiversifyConfig(["what {rest}", "share {rest}"]), 0)
    assert (len(made), failed) == (19, 1)
    assert "zh~1" not in {sample.id for sample in made}
    chinese = [Sample(str(i), None, f"描述{i}", "红", i % 2 == 0, "", "here") for i in range(20)]
    with pytest.raises(ConfigError, match=r"20 of 20 wordings could not be made.*{question}"):
        diversify(chinese, DiversifyConfig(["what {rest}", "share {rest}"]), 0)
    made, failed = diversify(chinese, DiversifyConfig(["what: {question}", "share: {question}"]), 0)
    assert (len(made), failed) == (20, 0)


def test_one_class_alone_cannot_be_balanced():
    config = DiversifyConfig(["what {rest}", "share {rest}"])
    with pytest.raises(ConfigError, match="no answer among 3 samples"):
        diversify(samples(3, 0), config, 0)


def test_nothing_to_forget_and_nothing_to_diversify_is_no_recipe(tmp_path):
    file = tmp_path / "train.json"
    file.write_text("[]")
    with pytest.raises(ConfigError, match="nothing to prepare"):
        recipe(file, tmp_path / "out")
    with pytest.raises(ConfigError, match="makes no retain set"):
        recipe(file, tmp_path / "out", diversify={"templates": ["what {rest}", "a {rest}"]}, retain_size=3)


def recipe(file, out, **more):
    tree = {"out": str(out), "safety": [{"format": "vlguard", "path": str(file)}], "answers": "none", **more}
    return prepare.prepare(configs.build(PrepareRecipe, tree, "here", ""))
