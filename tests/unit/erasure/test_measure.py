"""Measures of forgetting on models of which one learned the answers and one never saw them"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mirage_dist.config import build
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import text as words
from mirage_dist.erasure import measure
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.measure import Forgetting
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


def made(test: Forgetting, setting: Setting) -> ForgettingResult:
    return test.prepared(setting.forget, setting.recipe).measure(setting)


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory) -> tuple[Setting, ForgettingResult]:
    setting = world.setting(tmp_path_factory.mktemp("measured"))
    return setting, made(world.test(), setting)


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
    result = made(world.test(unseen=[], retain=[]), setting)
    quality = result["never"]["quality"]
    assert quality["answers"] == {"distance": 0, "p": 1, "n": 8}
    assert (result["retain"], result["unseen"], result["membership"]) == (None, None, None)


def test_what_was_measured_is_not_measured_again(world, measured, monkeypatch):
    setting, result = measured

    def fail(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measure, "HuggingFace", fail)
    assert made(world.test(), setting) == result
    (setting.folder / "retain.json").unlink()
    with pytest.raises(AssertionError, match="a model was loaded"):
        made(world.test(), setting)


def test_reasoning_before_an_answer_is_no_part_of_it_in_rouge_l(world, measured, tmp_path, monkeypatch):
    result = measured[1]
    answer, thoughts = HuggingFace.answer, {"closed": "<think>\nit is ba la\n</think>\n", "open": "<think>\n"}
    for name, expected in (("closed", result["forget"]["rouge_l"]["mean"]), ("open", 0)):
        begun = lambda self, samples, own=thoughts[name]: [own + text for text in answer(self, samples)]  # noqa: E731
        monkeypatch.setattr(HuggingFace, "answer", begun)
        own = replace(world.setting(tmp_path), name=name)
        result = made(world.test(unseen=[], retain=[], never=None), own)
        assert result["forget"]["rouge_l"]["mean"] == pytest.approx(expected)


def test_the_kept_values_depend_on_what_is_scored_and_on_the_other_models_weights(world, measured, tmp_path):
    setting, _ = measured

    def dependencies(forget=setting.forget, seed=0, **options):
        return world.test(**options).prepared(forget, replace(setting.recipe, seed=seed)).dependencies

    before = dependencies()
    assert dependencies() == before != dependencies(seed=1)
    assert dependencies(wrong=2)["scored"] != before["scored"]
    assert dependencies(never=str(world.knows))["never"] != before["never"]
    changed = replace(setting.forget, samples=[replace(s, answer=f"{s.answer} x") for s in setting.forget.samples])
    assert dependencies(changed)["scored"]["forget"] != before["scored"]["forget"]


def test_answers_that_the_model_has_no_room_to_repeat_are_counted_in_the_log(world, tmp_path, capsys):
    setting = world.setting(tmp_path)
    short = replace(setting, recipe=replace(setting.recipe, generation=replace(GENERATION, max_new_tokens=3)))
    result = made(world.test(unseen=[], retain=[], never=None), short)
    assert result["forget"]["rouge_l"]["mean"] < 1  # "it is ba", where the model knows the code
    assert "forget: 8 of 8 answers have more tokens than generation.max_new_tokens=3" in capsys.readouterr().out


def test_contents_that_differ_in_case_or_punctuation_are_one_for_an_interval():
    values = [("Yes.", 1.0), ("yes", 0.5), ("no", 0.2)]
    same = [("yes", 1.0), ("yes", 0.5), ("no", 0.2)]
    assert measure.scored(values) == measure.scored(same)
    assert measure.geometric(values)["contents"] == 2
    scores = [{"content": name, "loss": value, "min_k": value} for name, value in values]
    again = [{**own, "content": name} for own, (name, _) in zip(scores, same, strict=True)]
    assert measure.membership(scores, scores[::-1]) == measure.membership(again, again[::-1])


# ------------------------------------------------------------------------------------------------ bad input


def refused(world: World, setting: Setting, words: str, **options) -> None:
    with pytest.raises(ConfigError, match=words):
        world.test(**options).prepared(setting.forget, setting.recipe)


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


def test_a_family_whose_answers_see_their_later_tokens_is_refused_by_name(toy, world, family, tmp_path):
    """PaliGemma: its prefix attention reads a whole answer both ways, so that no token of it is unlikely."""
    both, pictured = family("paligemma_templated"), replace(world, forget=toy.root / "forget.jsonl")
    words, none = "paligemma: answers see their own later tokens", {"retain": [], "unseen": [], "never": None}
    refused(pictured, pictured.setting(tmp_path, both), rf"^model: {words}.*leave erasure\.forgetting out", **none)


@pytest.mark.parametrize("options", [{"wrong": 0}, {"min_k": 0.0}, {"min_k": 1.5}, {"samples": 0}, {"never": ""}])
def test_an_option_out_of_range_is_refused_by_its_name(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(Forgetting, options, "recipe", "")
