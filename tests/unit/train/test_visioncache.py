"""With cached features the same rows, losses and gradients, and no picture opened; only what changed is made again."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_of
from opens import Opens
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from mirage_dist import config as configs
from mirage_dist.data import pictures
from mirage_dist.data.sample import Sample
from mirage_dist.model import load, reference, vision
from mirage_dist.model.policy import HeadedModel, Request
from mirage_dist.objectives.base import make
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.caches import vision_files
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.check import resolved
from mirage_dist.train.planning.streams import read_streams

LORA = "model.lora={rank: 2, alpha: 4, dropout: 0.0, targets: [decoder], also_train: [connector]}"


class Engine(torch.nn.Module):
    """What the cache asks of DeepSpeed's engine; dies after some forwards."""

    def __init__(self, policy: HeadedModel, forwards: int = 1000) -> None:
        super().__init__()
        self.module, self.left = policy, forwards

    def forward(self, inputs, request):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.module(inputs, request)


class Run:
    """One run of the toy's data, its pictures its own so that they may change."""

    def __init__(self, toy, root: Path, *overrides: str) -> None:
        overrides = [*toy.overrides("npo", root / "run"), "train.micro_batch=4", *overrides]
        self.recipe = configs.load("configs/train/demo_npo.yaml", overrides, TrainRecipe)
        objective = make(self.recipe.objective)
        self.streams = read_streams(self.recipe, objective.needs)
        shown = {s.image for source in self.streams.values() for s in source.samples if s.image}
        for source in self.streams.values():
            own = [replace(s, image=str(root / Path(s.image).name)) if s.image else s for s in source.samples]
            source.samples[:] = own
        for path in shown:
            if not (root / Path(path).name).exists():
                shutil.copy(path, root / Path(path).name)
        self.streams["retain"].samples[2] = replace(self.streams["retain"].samples[2], image=None)
        self.objective = objective
        self.feed = Feed(self.recipe, objective.needs, self.streams, load.processor(self.recipe.model))
        self.pictures = sorted(root.glob("*.png"))
        self.policy = load.policy(self.recipe.model, "fp32", {})

    def fill(self, forwards: int = 1000, base: str = "base") -> tuple[vision_files.Features, int]:
        """The features, and how many forwards they took."""
        engine = Engine(self.policy, forwards)
        run = run_of(self.recipe, self.objective, self.feed, engine, base)
        run.lease.workspace.mkdir(parents=True, exist_ok=True)
        return vision_cache.fill(run), forwards - engine.left

    def parts(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in Path(self.recipe.run.dir).glob("vision/*/part-*")}


@pytest.fixture
def start(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(vision_cache, "PART", 6)

    def start(*overrides: str, folder: str = "a") -> Run:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Run(toy, tmp_path / folder, *overrides)

    return start


ASIDE = 3  # forwards that show where the tower ends, and compare a batch with pictures and one with features


def projected(features: vision_files.Features, path: str) -> torch.Tensor:
    """The projector's input for a picture."""
    return features([path])["vision_features"]["features"]["model.multi_modal_projector"][0]


BATCHES = {
    "pictures": {"forget": [0, 1, 7], "retain": [3, 4, 4]},
    "some text only": {"forget": [5], "retain": [2, 2, 9]},
    "text only": {"retain": [2]},  # the placeholder picture
}


def passes(run: Run, rows) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities, a layer's activation and a frozen forward of a batch; then the gradient of all."""
    micro = run.feed.collate(rows)
    index_N, labels_N = micro.index(list(rows)), micro.labels(list(rows))
    run.policy.zero_grad()
    out = run.policy(micro.batch.inputs, Request(index_N, labels_N, layers=(1,)))
    assert out.logp_N is not None
    assert out.activations_BSD is not None
    values = [out.logp_N, out.activations_BSD[1]]
    if run.recipe.model.lora is not None:
        compared = reference.AdaptersOff(Engine(run.policy))
        values += [x for x in compared.outputs(micro.batch.inputs, Request(index_N, labels_N), []) if x is not None]
    (out.logp_N.sum() + out.activations_BSD[1].square().mean()).backward()
    return values, {n: p.grad.clone() for n, p in run.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("overrides", [(), (LORA,), ("model.gradient_checkpointing=true",)], ids=["full", "lora", "ac"])
def test_losses_gradients_and_references_are_those_of_the_pictures(start, overrides):
    run = start(*overrides)
    torch.manual_seed(0)
    for name, p in run.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    run.policy.train()
    plain = {name: passes(run, rows) for name, rows in BATCHES.items()}
    run.feed.encoder.recall(run.fill()[0])
    for picture in run.pictures:
        picture.unlink()  # none is opened any more
    for name, rows in BATCHES.items():
        values, gradients = passes(run, rows)
        assert any("projector" in n for n in gradients)
        assert not any("vision_tower" in n for n in gradients)
        assert set(gradients) == set(plain[name][1])
        for mine, other in [
            *zip(values, plain[name][0], strict=True),
            *((g, plain[name][1][n]) for n, g in gradients.items()),
        ]:
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_rows_are_those_of_the_processor(start):
    run = start("data.image_aspect=pad")
    encoder, samples = run.feed.encoder, [s for source in run.streams.values() for s in source.samples]
    plain = encoder.encode(samples)
    encoder.recall(run.fill()[0])
    known = encoder.encode(samples)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(known.inputs[name], plain.inputs[name])
    assert torch.equal(known.labels_BS, plain.labels_BS)
    assert set(known.inputs) == {*plain.inputs, "vision_features"} - {"pixel_values"}


def test_a_picture_in_two_files_is_kept_once_and_a_changed_one_is_made_again(start):
    run = start()
    copy = run.pictures[0].with_name("copy.png")
    shutil.copy(run.pictures[0], copy)
    run.streams["forget"].samples.append(Sample("copy", str(copy), "q", "a", True, "", "t"))
    distinct = len({picture.read_bytes() for picture in run.pictures})
    first, forwards = run.fill()
    parts = [{n.split("/")[0] for n in load_file(f)} for f in Path(run.recipe.run.dir).glob("vision/*/part-*")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == distinct + 1
    before = run.parts()
    assert run.fill()[1] == 0
    Image.new("RGB", (20, 32), "green").save(run.pictures[1])
    second, again = run.fill()
    assert again == 1 + ASIDE < forwards == distinct + 1 + ASIDE
    after = run.parts()
    assert before.items() < after.items()
    unchanged, changed = (str(run.pictures[i]) for i in (0, 1))
    assert torch.equal(projected(first, unchanged), projected(second, str(copy)))
    assert not torch.equal(projected(first, changed), projected(second, changed))


def test_whatever_decides_the_features_decides_the_key(start):
    run = start()
    model, feed = run.policy.base.config, run.feed

    def key(base="base", recipe=run.recipe):
        return vision_cache.key(recipe, model, feed, base)

    keys = [key(), key(base="other")]
    feed.encoder.image_aspect = "processor"  # as the encoder resolved it
    keys.append(key())
    keys.append(key(recipe=replace(run.recipe, train=replace(run.recipe.train, dtype="bf16"))))
    model.vision_feature_layer = -2
    keys.append(key())
    model.vision_config.hidden_act = "gelu"
    keys.append(key())
    feed.encoder.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_run_killed_in_the_middle_goes_on_bitwise_and_a_cut_off_part_is_made_again(start, capsys):
    whole, broken = start(folder="a"), start(folder="b")
    needed = whole.fill()[1]
    with pytest.raises(KeyboardInterrupt):
        broken.fill(forwards=10)
    assert 0 < len(broken.parts()) < len(whole.parts())
    assert 0 < broken.fill()[1] < needed
    assert broken.parts() == whole.parts()
    file = sorted(Path(broken.recipe.run.dir).glob("vision/*/part-*"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    broken.fill()
    assert f"{file}: damaged" in capsys.readouterr().out
    assert broken.parts() == whole.parts()


def test_a_damaged_index_is_made_again_from_the_parts_and_a_damaged_part_ends_the_run(start, capsys):
    run = start()
    features, _ = run.fill()
    path = str(run.pictures[0])
    before = projected(features, path)
    (index,) = Path(run.recipe.run.dir).glob("vision/*/index.*")
    raw = index.read_bytes()
    for damaged in (b"", raw[:-3], raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], raw[:30] + b"x" + raw[31:]):
        index.write_bytes(damaged)
        features, forwards = run.fill()
        assert forwards == 0
        assert index.read_bytes() == raw
        assert torch.equal(projected(features, path), before)
    fresh, _ = run.fill()
    for part in run.parts():
        file = index.with_name(part)
        file.write_bytes(bytes(8) + file.read_bytes()[8:])  # as a disk would while the run goes on
    with pytest.raises(RunError, match=r"part-\w+\.safetensors: damaged since it was written .* start again"):
        projected(fresh, str(run.pictures[1]))


def test_verifying_computes_changed_features_again_and_a_start_that_does_not_ends_at_them(start, capsys):
    run = start()
    features, _ = run.fill()
    path, whole = str(run.pictures[0]), run.parts()
    before = projected(features, path)
    part = vision_files.indexed(folder := next(Path(run.recipe.run.dir).glob("vision/*")))[pictures.sha256(path)]
    file = folder / part
    state = file.stat()
    file.write_bytes(whole[part][:-2] + bytes([whole[part][-2] ^ 1]) + whole[part][-1:])
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a disk would
    features, forwards = run.fill()
    assert forwards == 0
    with pytest.raises(
        RunError, match=r"does not have its checksum\); remove this file and start again, or start with"
    ):
        features([None, *map(str, run.pictures)])
    run.recipe = replace(run.recipe, data=replace(run.recipe.data, verify=True))
    features, forwards = run.fill()
    assert forwards > ASIDE
    assert run.parts() == whole
    assert torch.equal(projected(features, path), before)
    assert f"{file}: damaged (picture" in capsys.readouterr().out
    assert run.fill()[1] == 0


def test_a_rank_opens_the_index_and_the_parts_of_its_batches_alone(start):
    run = start()
    features, _ = run.fill()
    folder = next(Path(run.recipe.run.dir).glob("vision/*"))
    holding = vision_files.indexed(folder)
    parts = {holding[pictures.sha256(str(path))] for path in run.pictures[:2]}
    with Opens(folder) as opens:
        features, _ = run.fill()
    assert set(opens.names) == {vision_files.INDEX}
    with Opens(folder) as opens:
        for _ in range(3):
            features([str(path) for path in run.pictures[:2]])
    assert set(opens.names) == parts < set(holding.values())


def test_a_part_grows_with_what_a_rank_has_to_compute(start, monkeypatch):
    monkeypatch.setattr(vision_cache, "PART", 1)
    run = start()
    run.fill()
    sizes = [
        sum("/features/" in name for name in load_file(f)) for f in Path(run.recipe.run.dir).glob("vision/*/part-*")
    ]
    assert set(sizes) <= {2, 1}  # an eighth of 21
    assert len(sizes) == 11


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.train=['*']", "model.freeze=['*layers.0.mlp*']"), "the vision tower trains"),
        (("model.lora={targets: ['*vision_tower*_proj']}",), "the vision tower trains"),
    ],
)
def test_a_tower_that_trains_is_refused_before_weights_load(toy, tmp_path, overrides, words):
    overrides = [*toy.overrides("npo", tmp_path / "run"), *overrides]
    recipe = configs.load("configs/train/demo_npo.yaml", overrides, TrainRecipe)
    load.check_names(recipe.model, recipe.data, (), None)
    with pytest.raises(ConfigError, match=words):
        load.check_names(recipe.model, replace(recipe.data, cache_vision=True), (), None)


def test_text_only_models_and_towers_that_draw_are_refused(toy, tmp_path):
    recipe = configs.load("configs/train/demo_npo.yaml", toy.overrides("npo", tmp_path / "run"), TrainRecipe)
    base = load.weightless(recipe.model).base
    vision.check(base)
    base.config.vision_config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="attention_dropout"):
        vision.check(base)
    with torch.device("meta"):
        other = LlamaForCausalLM(base.config.text_config)
    with pytest.raises(ConfigError, match="llama has no vision tower"):
        vision.check(other)


def test_a_connector_that_follows_another_one_is_not_recorded(start):
    """Its input is no constant, since the first one trains."""
    run = start()
    tower, projector = run.policy.tower, "model.multi_modal_projector"
    picture = run.feed.encoder.picture(None)
    assert list(tower.recorded(picture)) == [projector]
    parts = [f"{projector}.linear_1", f"{projector}.linear_2"]
    tower.connectors = {name: run.policy.base.get_submodule(name) for name in parts}
    assert list(tower.recorded(picture)) == parts[:1]


@pytest.mark.parametrize("fault", ["the layers cannot be passed over", "another selection of features", "other tokens"])
def test_a_model_that_computes_something_else_with_features_is_refused(start, monkeypatch, fault):
    run = start()
    words = "with features in place of pictures llava computes something else"
    if fault == "the layers cannot be passed over":
        run.policy.tower.layers = [run.policy.base.model.vision_tower.embeddings]
    elif fault == "other tokens":
        words = "writes input_ids"
        row = run.feed.encoder.pictured.known_row
        monkeypatch.setattr(
            run.feed.encoder.pictured, "known_row", lambda text, path: {n: v[::-1] for n, v in row(text, path).items()}
        )
    else:
        recorded = run.policy.tower.inputs
        monkeypatch.setattr(
            run.policy.tower, "inputs", lambda *given, **more: {n: t + 1 for n, t in recorded(*given, **more).items()}
        )
    with pytest.raises(ConfigError, match=rf"data\.cache_vision: .*{words}"):
        run.fill()


def test_a_family_for_which_features_cannot_stand_is_refused_before_weights_load(start, monkeypatch):
    run = start("data.cache_vision=true")
    processor = run.feed.encoder.processor
    assert resolved(run.recipe, processor).data.cache_vision
    recorded = vision.Tower.recorded
    monkeypatch.setattr(
        vision.Tower, "recorded", lambda self, *given: {n: t + 1 for n, t in recorded(self, *given).items()}
    )
    words = "llava computes something else with features than with its pictures; take data.cache_vision out"
    with pytest.raises(ConfigError, match=rf"data\.cache_vision: {words}"):
        resolved(run.recipe, processor)
    monkeypatch.setattr(vision.Tower, "recorded", lambda *_: {})
    with pytest.raises(ConfigError, match="nothing in llava that takes only what its tower computes"):
        resolved(run.recipe, processor)
