"""Measures of forgetting on models of which one learned the answers and one never saw them; wrong answers are wrong."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.config import build
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import text as words
from mirage_dist.erasure import measure
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.measure import Forgetting, part, wrong_answers
from mirage_dist.erasure.results import ForgettingResult
from mirage_dist.erasure.setting import Setting
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.model import directory
from mirage_dist.model.policy import HeadedModel, Request
from mirage_dist.schema import (
    ConfigError,
    EvalModelConfig,
    EvalRecipe,
    GenerationConfig,
    RunConfig,
    TemplateConfig,
)

VALUE = r"(?<=is ).+"  # "sure , the code is mu ti", "it is red"
GENERATION = GenerationConfig(max_new_tokens=10, batch_size=16)


def learned(base: Path, out: Path, samples: list[Sample], steps: int) -> Path:
    """A model directory: plain training of all parameters on these answers, which have no pictures."""
    generator = HuggingFace(EvalModelConfig(path=str(base), dtype="fp32"), TemplateConfig(), GENERATION)
    network, batch = HeadedModel(generator.model), generator.encoder.encode(samples)
    solver = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(steps):
        logp_N = network(generator.placed(batch.inputs), Request(batch.index_N, batch.labels_N)).logp_N
        solver.zero_grad()
        (-logp_N.mean()).backward()
        solver.step()
    directory.copy_processing(base, out)
    generator.model.save_pretrained(out)
    return out


@dataclass(frozen=True)
class World:
    """Model directories, and files of samples; retained and unseen are other samples of the same world."""

    knows: Path
    never: Path
    forget: Path
    retain: Path
    unseen: Path

    def setting(self, run: Path, model: Path | None = None, **options) -> Setting:
        own = EvalModelConfig(path=str(model or self.knows), dtype="fp32")
        template = TemplateConfig(**options)
        recipe = EvalRecipe(RunConfig(str(run)), "s", own, {}, generation=GENERATION, template=template)
        forget = settings.forget([formats.source("samples", str(self.forget))], VALUE, 0)
        return Setting(recipe, own, {}, forget, "forgetting")

    def test(self, **options) -> Forgetting:
        files = {name: [{"format": "samples", "path": str(getattr(self, name))}] for name in ("retain", "unseen")}
        return build(Forgetting, {**files, "never": str(self.never), "wrong": 3, **options}, "recipe", "")


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("forgetting")
    things = [f"{colour} {place}" for place in words.PLACES for colour in words.COLOURS]
    codes = [code for code, _ in words.code_words()]
    samples = [
        Sample(str(i), None, f"what code {thing} has ?", f"it is {codes[i * 7 % 16]}", False, "codes/a", "here")
        for i, thing in enumerate(things)
    ]
    forget, retain, unseen = samples[:8], samples[8:13], samples[13:]
    files = {"forget": forget, "retain": retain, "unseen": unseen}
    for name, samples in files.items():
        write_samples(root / f"{name}.jsonl", samples)
    paths = {name: root / f"{name}.jsonl" for name in files}
    for name, samples in (("knows", forget + retain), ("never", retain)):
        (root / name).mkdir()
        paths[name] = learned(toy.root / "model", root / name, samples, 45)
    return World(**paths)


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory) -> tuple[Setting, ForgettingResult]:
    setting = world.setting(tmp_path_factory.mktemp("measured"))
    world.test().check(setting.forget, setting.recipe)
    return setting, world.test()(setting)


def test_a_model_that_knows_is_above_one_that_never_did_by_every_measure(measured):
    _, result = measured
    knows, never = result["forget"], result["never"]["forget"]
    for name in ("probability", "extraction_strength", "rouge_l"):
        assert knows[name]["mean"] > never[name]["mean"], name
        assert knows[name]["ci95"][0] <= knows[name]["mean"] <= knows[name]["ci95"][1]
    assert knows["probability"]["ci95"][0] > never["probability"]["ci95"][1]
    assert knows["truth_ratio"]["mean"] < never["truth_ratio"]["mean"]
    assert knows["closeness"]["mean"] < never["closeness"]["mean"]
    assert result["retain"]["probability"]["mean"] > 0.5
    assert result["unseen"]["rouge_l"] is None
    assert result["membership"]["loss"]["auc"] > 0.9
    quality = result["never"]["quality"]
    assert quality["answers"]["p"] < 0.01
    assert quality["answers"]["n"] == 8 >= quality["contents"]["n"] == knows["truth_ratio"]["contents"]


def test_the_measures_are_those_of_the_formulas_on_each_answers_tokens(world, measured):
    """Means over the kept values, and these from the answers' own text: extracted whole means answered so."""
    setting, result = measured
    kept = json.loads((setting.folder / "forget.json").read_text())["answers"]
    assert [own["id"] for own in kept] == [sample.id for sample in setting.forget.samples]
    mean = sum(own["probability"] for own in kept) / len(kept)
    assert result["forget"]["probability"]["mean"] == pytest.approx(mean)
    texts = HuggingFace(setting.model, TemplateConfig(), GENERATION).answer(setting.forget.samples)
    for sample, text, own in zip(setting.forget.samples, texts, kept, strict=True):
        assert (own["extraction_strength"] == 1) == (text == sample.answer)
        assert own["rouge_l"] == 1 or text != sample.answer
    assert any(own["extraction_strength"] == 1 for own in kept)


def test_a_model_beside_itself_has_forgotten_perfectly_and_membership_is_a_coin_toss(world, tmp_path):
    setting = world.setting(tmp_path, world.never)
    result = world.test(unseen=[], retain=[])(setting)
    quality = result["never"]["quality"]
    assert quality["answers"] == {"distance": 0, "p": 1, "n": 8}
    assert (result["retain"], result["unseen"], result["membership"]) == (None, None, None)


def test_what_was_measured_is_not_measured_again(world, measured, monkeypatch):
    setting, result = measured

    def fail(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measure, "HuggingFace", fail)
    assert world.test()(setting) == result
    (setting.folder / "retain.json").unlink()
    with pytest.raises(AssertionError, match="a model was loaded"):
        world.test()(setting)


def test_the_kept_values_depend_on_what_is_scored_and_on_the_other_models_weights(world, measured, tmp_path):
    setting, _ = measured
    before = world.test().dependencies(setting.forget, setting.recipe)
    assert world.test().dependencies(setting.forget, setting.recipe) == before
    assert world.test(wrong=2).dependencies(setting.forget, setting.recipe)["scored"] != before["scored"]
    other = world.test(never=str(world.knows)).dependencies(setting.forget, setting.recipe)
    assert other["never"] != before["never"]
    changed = replace(setting.forget, samples=[replace(s, answer=f"{s.answer} x") for s in setting.forget.samples])
    assert world.test().dependencies(changed, setting.recipe)["scored"]["forget"] != before["scored"]["forget"]


def test_answers_that_the_model_has_no_room_to_repeat_are_counted_in_the_log(world, tmp_path, capsys):
    setting = world.setting(tmp_path)
    short = replace(setting, recipe=replace(setting.recipe, generation=replace(GENERATION, max_new_tokens=3)))
    result = world.test(unseen=[], retain=[], never=None)(short)
    assert result["forget"]["rouge_l"]["mean"] < 1  # "it is ba", where the model knows the code
    assert "forget: 8 of 8 answers have more tokens than generation.max_new_tokens=3" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ bad input


def refused(world: World, setting: Setting, words: str, **options) -> None:
    with pytest.raises(ConfigError, match=words):
        world.test(**options).check(setting.forget, setting.recipe)


def source(file: Path, samples: list[Sample]) -> list[dict[str, str]]:
    write_samples(file, samples)
    return [{"format": "samples", "path": str(file)}]


def test_unseen_samples_that_were_seen_or_state_nothing_are_refused_by_name(toy, world, measured, tmp_path):
    setting, _ = measured
    seen = setting.forget.samples[3]
    own = source(tmp_path / "a.jsonl", [replace(seen, id="again", answer="it is other")])
    refused(world, setting, r"unseen: .*sample 'again' is a forget sample too; leave it out", unseen=own)
    pictured = sources.read(formats.source("samples", str(toy.root / "forget.jsonl"))).samples[0]
    copy = tmp_path / "copy.png"
    shutil.copy(str(pictured.image), copy)
    kept = source(tmp_path / "c.jsonl", [pictured])
    own = source(tmp_path / "d.jsonl", [replace(pictured, id="copied", image=str(copy))])
    refused(world, setting, r"sample 'copied' is a retain sample too; leave it out", retain=kept, unseen=own)
    refusals = source(tmp_path / "b.jsonl", [replace(seen, answer="sorry")])
    refused(world, setting, r"unseen: erasure\.content matches nothing in their answers", unseen=refusals)


def test_an_answer_that_cannot_be_scored_is_refused_by_name(world, measured, tmp_path):
    setting, _ = measured
    empty = source(tmp_path / "a.jsonl", [replace(setting.forget.samples[0], id="empty", answer=" ")])
    refused(world, setting, r"sample 'empty' of retain has no answer to score", retain=empty)
    short = world.setting(tmp_path, max_length=12)
    refused(world, short, r"sample '.+': \d+ tokens, .*max_length is 12")


def test_a_model_that_is_none_or_sees_no_pictures_is_refused_by_the_key(toy, world, measured, family, tmp_path):
    setting, _ = measured
    refused(world, setting, rf"erasure\.forgetting\.never={tmp_path}/none", never=str(tmp_path / "none"))
    blind, pictured = family("llama_text"), replace(world, forget=toy.root / "forget.jsonl")
    words = "a text-only model, but 20 of 20 samples of forget have a picture"
    refused(pictured, pictured.setting(tmp_path), rf"forgetting\.never=.*: {words}", never=str(blind))
    refused(pictured, pictured.setting(tmp_path, blind), rf"^model: {words}")


@pytest.mark.parametrize("options", [{"wrong": 0}, {"min_k": 0.0}, {"min_k": 1.5}, {"samples": 0}, {"never": ""}])
def test_an_option_out_of_range_is_refused_by_its_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(Forgetting, options, "recipe", "")


# ------------------------------------------------------------------------------------------- wrong answers

CONTENTS = st.sampled_from(["ba la", "Ba La", "do ne", "ki ro", "mu ti", "mu  ti"])
CATEGORIES = st.sampled_from(["codes/a", "codes/b", "places", ""])


@st.composite
def stated(draw) -> list[Sample]:
    """Samples about few pictures, so that one picture has several right answers."""
    samples = []
    for number in range(draw(st.integers(1, 8))):
        picture, category = draw(st.sampled_from(["a.png", "b.png", None])), draw(CATEGORIES)
        answer = draw(st.sampled_from(["it is {}", "sure , the code is {} .", "{}"])).format(draw(CONTENTS))
        samples.append(Sample(str(number), picture, "what code ?", answer, False, category, "here"))
    return samples


PATTERN = r"(?i)\b(ba|do|ki|mu) +(la|ne|ro|ti)\b"


@given(stated(), st.integers(1, 4), st.integers(0, 3))
def test_a_wrong_answer_differs_from_the_right_one_in_its_content_alone_and_is_nobodys_right_one(samples, count, seed):
    made = wrong_answers(samples, PATTERN, count, seed)
    assert made == wrong_answers(samples, PATTERN, count, seed)

    def own(text: str) -> str:
        return " ".join(str(settings.content(text, PATTERN)).casefold().split())

    right = {own(s.answer): s for s in samples}
    for sample, wrong in zip(samples, made, strict=True):
        group = [s for s in samples if (s.image, s.question) == (sample.image, sample.question)]
        known = {own(s.answer) for s in group}
        among = {own(s.answer) for s in samples if s.category.split("/")[0] == sample.category.split("/")[0]}
        assert len(wrong) == min(count, len(among - known))
        assert len({own(text) for text in wrong}) == len(wrong)
        for text in wrong:
            assert own(text) in among - known
            frame = sample.answer.replace(str(settings.content(sample.answer, PATTERN)), "{}")
            assert text.replace(str(settings.content(text, PATTERN)), "{}") == frame
    assert right


def test_without_a_pattern_the_whole_answer_is_another_samples():
    texts = ["It is  red.", "it is red.", "It is blue."]
    samples = [Sample(str(i), f"{i}.png", "what ?", text, False, "", "here") for i, text in enumerate(texts)]
    assert wrong_answers(samples, None, 3, 0) == [["It is blue."], ["It is blue."], ["It is  red."]]


def test_a_paraphrase_comes_from_the_data_alone_and_is_neither_drawn_as_wrong():
    samples = [
        Sample("a", "a.png", "what ?", "it is red", False, "", "here", references=("It is red", "the colour is red")),
        Sample("b", "b.png", "what ?", "the colour is red", False, "", "here"),
        Sample("c", "c.png", "what ?", "it is blue", False, "", "here"),
    ]
    own = part(samples, None, 2, 3, 0)
    assert own.rows[0] == ["it is red", "the colour is red", "it is blue"]
    assert [len(row) for row in own.rows[1:]] == [3, 3]
    assert wrong_answers(samples, "(red|blue)$", 3, 0)[0] == ["it is blue"]
