"""What a micro-batch holds: the positions that count for an activation, and the partners of paired streams."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mirage_dist import config as configs
from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Source
from mirage_dist.embedded import model as embedded_model
from mirage_dist.model import load
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.caches import reference
from mirage_dist.train.feed import Feed, check_streams, positions, read_streams

# The template's tokens: role, 16 of the picture, the question's words, role, the answer's words, end.
SHOWN = [("role", 1), ("picture", 16), ("question", 4), ("role", 1), ("answer", 3)]
TEXT_ONLY = [("role", 1), ("question", 3), ("role", 1), ("answer", 6)]
COUNTED = {
    "all": {"role", "picture", "question", "answer", "padding"},
    "unpadded": {"role", "picture", "question", "answer"},
    "text": {"role", "question", "answer"},
    "response": {"answer"},
}


def rows(counted, *layouts):
    width = max(sum(count for _, count in layout) for layout in layouts)
    kinds = [[kind for kind, count in layout for _ in range(count)] for layout in layouts]
    return [[float(kind in counted) for kind in row + ["padding"] * (width - len(row))] for row in kinds]


@pytest.fixture
def encoder():
    return Encoder(embedded_model.make_processor(embedded_model.make_tokenizer()))


@pytest.mark.parametrize("which", COUNTED)
def test_positions_are_those_of_the_kinds_that_count(encoder, tmp_path, which):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    shown = Sample("a", str(tmp_path / "a.png"), "what colour is it", "it is", True, "", "t")
    text_only = Sample("b", None, "tell the code", "it is the colour red", True, "", "t")
    mask_BS = positions(encoder.encode([shown, text_only]), which)
    assert mask_BS.tolist() == rows(COUNTED[which], SHOWN, TEXT_ONLY)


@pytest.mark.parametrize("which", COUNTED)
def test_the_hidden_picture_of_a_batch_without_any_counts_as_padding(encoder, which):
    text_only = Sample("b", None, "tell the code", "it is the colour red", True, "", "t")
    mask_BS = positions(encoder.encode([text_only]), which)
    assert mask_BS.tolist() == rows(COUNTED[which], [*TEXT_ONLY, ("padding", 16)])


# ------------------------------------------------------------------------------------------------ paired streams


@pytest.fixture
def pairs(toy, tmp_path):
    """A feed of chosen and rejected answers, `change` applied to the samples of the second stream."""

    def build(*overrides, change=lambda samples: samples):
        chosen = sources.read(formats.source("samples", str(toy.root / "retain.jsonl"))).samples[:24]
        # Of other lengths than their partners, so that an order by a stream's own lengths is another one.
        rejected = [replace(s, answer=" ".join(["it is"] * (1 + (7 * i) % 5))) for i, s in enumerate(chosen)]
        write_samples(tmp_path / "chosen.jsonl", chosen)
        write_samples(tmp_path / "rejected.jsonl", change(rejected))
        given = [*toy.overrides("npo", tmp_path / "run"), "train.global_batch=8", *overrides]
        recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
        streams = {n: [formats.source("samples", f"{tmp_path}/{n}.jsonl")] for n in ("chosen", "rejected")}
        recipe = replace(recipe, data=replace(recipe.data, streams=streams), objective={"name": "lab:DPO"})
        needs = make(recipe.objective).needs
        return Feed(recipe, needs, read_streams(recipe, needs), load.processor(recipe.model))

    return build


@pytest.mark.parametrize("grouped", ["false", "true"])
@pytest.mark.parametrize(("ranks", "width"), [(1, 8), (1, 2), (2, 4), (2, 2), (8, 1)])
def test_partners_are_at_the_same_place_of_one_micro_batch_however_a_batch_is_split(pairs, grouped, ranks, width):
    feed = pairs(f"train.micro_batch={width}", f"data.group_by_length={grouped}")
    feed.check_lengths(Group(0, 0, 1, torch.device("cpu")))
    for step in (0, 1, 4):  # the last one begins a second epoch
        seen = []
        for rank in range(ranks):
            for micro in feed.window(step, Group(rank, 0, ranks, torch.device("cpu"))):
                chosen, rejected = ([i for _, i in micro.samples_of([name])] for name in ("chosen", "rejected"))
                assert chosen == rejected
                assert len(chosen) == width
                seen += chosen
        assert sorted(seen) == sorted(feed.chosen("chosen", step).tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda samples: samples[:-1],
            r"rejected: is paired with chosen: 23 samples for 24; .* partner \('.*' has none",
        ),
        (lambda samples: [samples[1], samples[0], *samples[2:]], "rejected: is paired with chosen: sample 0 is "),
        (lambda samples: [replace(samples[0], question="another"), *samples[1:]], "sample 0 is "),
    ],
)
def test_streams_that_do_not_pair_are_refused(pairs, change, words):
    with pytest.raises(ConfigError, match=words):
        pairs(change=change)


# ------------------------------------------------------------------------------------------ epochs and schedules


@pytest.fixture
def unlearning(toy, tmp_path):
    """A feed of 20 samples to forget and 30 to retain."""

    def build(*overrides):
        given = [*toy.overrides("npo", tmp_path / "run"), "train.max_steps=null", "train.global_batch=8", *overrides]
        recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
        needs = make(recipe.objective).needs
        check_streams(recipe, needs)
        return Feed(recipe, needs, read_streams(recipe, needs), load.processor(recipe.model))

    return build


@pytest.mark.parametrize(
    ("stream", "epochs", "steps"), [("null", 1, 3), ("forget", 1, 3), ("retain", 1, 4), ("retain", 2.5, 10)]
)
def test_the_stream_of_the_recipe_defines_an_epoch_and_the_others_start_again(unlearning, stream, epochs, steps):
    feed = unlearning(f"train.epoch_stream={stream}", f"train.epochs={epochs}")
    assert feed.steps == steps
    for name, samples in feed.samples.items():
        seen = Counter(index for step in range(steps) for index in feed.chosen(name, step).tolist())
        done = steps * 8 // len(samples)
        assert all(done <= seen[index] <= done + 1 for index in range(len(samples)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch_stream=retian"], "train.epoch_stream=retian: no stream of this objective; expected one of fo"),
        (["train.schedule_steps=2"], "train.schedule_steps=2: this run has 3 steps, and a schedule has at least as"),
        (["train.warmup_from_zero=true", "train.max_steps=1"], "the only step of this run would have rate 0"),
    ],
)
def test_a_schedule_or_an_epoch_that_cannot_be_is_named(unlearning, overrides, words):
    with pytest.raises(ConfigError, match=words):
        _ = unlearning(*overrides).steps


def test_by_modality_the_steps_of_a_run_have_one_kind_of_sample(unlearning):
    """However they are cut: the same for every number of ranks."""
    given = ("train.micro_batch=2", "train.epochs=2", "train.epoch_stream=retain")
    feed = unlearning("data.group_by_modality=true", *given)
    for samples in feed.samples.values():
        samples[::2] = [replace(sample, image=None) for sample in samples[::2]]
    feed = Feed(feed.recipe, feed.needs, {n: Source(s) for n, s in feed.samples.items()}, feed.encoder.processor)
    alone = 0
    for step in range(feed.steps):
        for name, samples in feed.samples.items():
            kinds = {samples[index].image is None for index in feed.chosen(name, step)}
            alone += len(kinds) == 1
            parts = [
                [m.samples_of([name]) for m in feed.window(step, Group(rank, 0, 4, torch.device("cpu")))]
                for rank in range(4)
            ]
            seen = sorted(key for part in parts for rows in part for key in rows)
            assert seen == sorted((name, int(index)) for index in feed.chosen(name, step))
    assert alone > feed.steps  # of two streams


# --------------------------------------------------------------------------------------------- reference cache


def test_the_reference_caches_key_holds_what_an_aspect_comes_to(toy, tmp_path):
    def key(*overrides):
        given = [*toy.overrides("npo", tmp_path / "run"), *overrides]
        recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
        needs = make(recipe.objective).needs
        feed = Feed(recipe, needs, read_streams(recipe, needs), load.processor(recipe.model))
        images = {s.image: "digest" for samples in feed.samples.values() for s in samples if s.image}
        return reference.key(recipe, feed, "base", images), feed, images

    (auto, feed, images), (padded, *_), (left, *_) = (
        key(f"data.image_aspect={aspect}") for aspect in ("auto", "pad", "processor")
    )
    assert auto == padded != left
    options = replace(feed.recipe, data=replace(feed.recipe.data, template_options={"enable_thinking": False}))
    assert reference.key(options, feed, "base", images) != auto
    with pytest.raises(ConfigError, match=r"template_options: .* no option enable_thinking; it has none"):
        key("data.template_options={enable_thinking: false}")
