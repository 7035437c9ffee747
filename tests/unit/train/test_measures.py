"""What a run measures: outliers, FLOPs, held-out samples, records, and the guard that compares the ranks' calls."""

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mirage_dist import calls, state
from mirage_dist import config as configs
from mirage_dist.data import formats
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sources import check_pictures, read
from mirage_dist.model import load
from mirage_dist.monitoring import sinks
from mirage_dist.objectives.base import Term, make
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.loop import normalised
from mirage_dist.train.measures import flops, timing, validation
from mirage_dist.train.measures.records import Means
from mirage_dist.train.measures.spikes import LEAST, Spikes
from mirage_dist.train.planning.check import check_recipe
from mirage_dist.train.planning.streams import read_streams
from mirage_dist.train.views import Views

ALONE = Group(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def recipe(toy, tmp_path):
    def build(name, *overrides) -> TrainRecipe:
        given = [*toy.overrides(name, tmp_path / "run"), "train.global_batch=8", "train.micro_batch=4", *overrides]
        return configs.load(f"configs/train/demo_{name}.yaml", given, TrainRecipe)

    return build


# ------------------------------------------------------------------------------------------------ spikes


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(LEAST, 60))
def test_an_outlier_is_found_whatever_the_scale_and_a_falling_loss_is_none(seed, scale, steps):
    draw = random.Random(seed)
    spikes = Spikes(10.0)
    for step in range(steps):
        loss = scale * (2 + math.exp(-step / 10) + draw.uniform(-0.1, 0.1))
        assert "loss" not in spikes.add({"loss": loss, "grad_norm": None})
    assert spikes.add({"loss": scale * 30, "grad_norm": None}).keys() == {"loss"}
    # The outlier moves neither median nor deviation: the next one is as far out.
    assert spikes.add({"loss": scale * 30, "grad_norm": None}).keys() == {"loss"}
    assert not spikes.add({"loss": scale * 2, "grad_norm": None})


def test_a_constant_loss_a_value_that_is_not_finite_and_the_first_steps_are_no_outliers():
    spikes, off = Spikes(10.0), Spikes(None)
    for _ in range(LEAST - 1):
        assert not spikes.add({"loss": 1.0, "grad_norm": 5.0})
        assert not off.add({"loss": 1.0, "grad_norm": 5.0})
    assert not spikes.add({"loss": 1e6, "grad_norm": 5.0})
    assert not spikes.add({"loss": None, "grad_norm": math.nan})
    assert not spikes.add({"loss": 1.0 + 1e-6, "grad_norm": 5.0})
    assert spikes.add({"loss": 1.0, "grad_norm": 6.0}).keys() == {"grad_norm"}
    for _ in range(20):
        assert not off.add({"loss": 1e9, "grad_norm": 1e9})


# ------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    ("name", "own", "own_error"),
    [
        ("sft", ("model.train=[decoder]",), 1e-9),
        ("sft", ("model.train=[decoder.layers.3.mlp.*, decoder.layers.1.mlp.down_proj.weight]",), 1e-9),
        ("npo", ("model.train=[decoder]",), 1e-9),
        ("rmu", (), 0.01),  # of the layers side by side in a block, the later ones count as behind the earlier ones
    ],
)
def test_flops_are_those_that_torch_counts_in_the_decoder_and_the_head(recipe, name, own, own_error):
    """On samples of one length, since padding counts for torch; eager attention is counted whole."""
    recipe = recipe(name, "model.attention=eager", "data.workers=0", *own)
    objective = make(recipe.objective)
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    policy = load.policy(recipe.model, "fp32", {}, objective.needs.depth)
    objective.start(policy.hidden_size, 0)
    for stream, samples in feed.samples.items():  # one sample, so that no position is padding
        feed.samples[stream] = [samples[0]] * len(samples)
    micro = feed.collate({stream: torch.arange(2).numpy() for stream in feed.samples})
    counts = dict(micro.counts) | {f"{s}.input_tokens": 2.0 * micro.batch.labels_BS.shape[1] for s in feed.samples}

    class Engine(torch.nn.Module):
        module = policy

        def forward(self, *arguments):
            return policy(*arguments)

    needs = replace(objective.needs, ref_logp=(), ref_activation=())
    views = Views(Engine(), needs, None)
    request = views.policy_request(micro, None)
    with FlopCounterMode(display=False) as counter:
        out = policy(micro.batch.inputs, request)
        total = sum(a.float().sum() for a in (out.activations_BSD or {}).values())
        total = total + (0 if out.logp_N is None else out.logp_N.sum())
        total.backward()
    layers = re.compile(r".*language_model\.layers\.\d+")
    decoder = sum(sum(v.values()) for name, v in counter.get_flop_counts().items() if layers.fullmatch(name))
    lm_head = policy.base.get_output_embeddings()
    rows = sum(micro.tokens[stream] for stream in needs.logp)
    head = (6 if lm_head.weight.requires_grad else 4) * rows * lm_head.weight.numel()
    cost = flops.Cost(policy, needs, views.narrows, None)
    assert cost.step(counts) == pytest.approx(decoder + head, rel=own_error)


def test_the_peak_is_that_of_the_most_particular_name():
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12}
    names |= {"NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA H200": 989e12, "Tesla V100-SXM2-16GB": None}
    assert {name: flops.peak(name) for name in names} == names


# ------------------------------------------------------------------------------------------- the step's numbers


@given(
    st.floats(1e-3, 1e3),
    st.integers(1, 10**9),
    st.floats(-1e6, 1e6, width=32),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_count_of_the_device_divides_as_one_of_the_host_bit_by_bit(weight, count, value, dtype):
    sum_ = torch.tensor(value, dtype=dtype, requires_grad=True)
    mine = normalised(Term("t", weight, sum_, "n"), {"n": torch.tensor(float(count), dtype=torch.float64)})
    (gradient,) = torch.autograd.grad(mine, sum_)
    other = weight / count * sum_
    (expected,) = torch.autograd.grad(other, sum_)
    assert mine.dtype == other.dtype
    assert torch.equal(mine, other)
    assert torch.equal(gradient, expected)


@given(st.text(max_size=300), st.integers(0, 99))
def test_a_rank_reads_from_the_numbers_what_another_one_is_about_to_do(call, count):
    numbers = calls.head(call, count)
    assert len(numbers) == calls.HEAD
    assert torch.tensor(numbers, dtype=torch.float64).tolist() == numbers
    text = calls.text_of(numbers)
    assert text.endswith(f"with {count} values")
    assert call.encode()[:100].decode(errors="ignore").strip() in text


def test_heads_that_differ_are_an_error_that_names_them_once():
    heads = torch.tensor([calls.head("step 3: a b", 2), calls.head("save", 0)], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"rank 0: step 3: a b with 2 values; rank 1: save with 0 values"):
        calls.compare(heads, float(heads[0, 0]))
    calls.check()
    calls.compare(heads[:1], float(heads[0, 0]))


def test_a_part_of_a_step_is_its_time_and_the_own_time_leaves_the_models_waits_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds):
        now[0] += seconds

    def slow_items():
        for number in range(2):
            takes(0.02)
            yield number

    watch, model = timing.Stopwatch(torch.device("cpu")), torch.nn.Sequential(torch.nn.Linear(4, 4))
    # As DeepSpeed's hook, which gathers the weights of a layer: it is there first, and waits for others.
    model[0].register_forward_pre_hook(lambda *_: takes(0.05))
    watch.follow(model, model)
    for item in watch.waiting(slow_items()):
        with watch.part("forward"):
            model(torch.zeros(1, 4) + item)
            takes(0.03)
        with watch.part("backward"):
            takes(0.01)
    assert watch.seconds("gather") == pytest.approx(2 * 0.05)  # the first of two micro-batches stands for both
    assert watch.seconds("forward") == pytest.approx(2 * 0.08)
    assert watch.seconds("backward") == pytest.approx(2 * 0.01)
    assert watch.own() == pytest.approx(2 * (0.02 + 0.03))
    assert watch.lap() == pytest.approx(2 * 0.11)
    assert watch.seconds("forward") == watch.seconds("gather") == 0


# --------------------------------------------------------------------------------------- held-out samples, records


HELD = "data.streams.validation=[{{format: samples, path: {}/forget.jsonl}}]"


@pytest.mark.parametrize(
    ("name", "own", "fault"),
    [
        ("sft", ("train.validate_every=5",), r"train.validate_every=5: there is no data.streams.validation"),
        ("sft", ("train.keep_best=validation.loss",), r"train.keep_best=validation.loss: there is no data.streams.val"),
        ("sft", ("HELD", "train.keep_best=validation.loss", "train.save_every=4"), r"saves at other steps than"),
        (
            "sft",
            ("HELD", "train.keep_best=validation.loss", "train.save_every=4", "train.validate_every=6"),
            r"save_every=4 saves at other steps than train.validate_every=6",
        ),
        ("rmu", ("HELD", "objective.ce_weight=0"), r"objective rmu computes \d decoder layers and no LM head"),
        ("sft", ("monitor.profile={ranks: [0, 2]}",), r"monitor.profile.ranks: \[2\]; expected ranks from 0 to 1"),
        ("sft", ("monitor.profile={first: 0}",), r"monitor.profile.first=0; expected a whole number above 0"),
        ("sft", ("monitor.spike=-1",), r"monitor.spike=-1"),
        ("sft", ("monitor.profile={frist: 2}",), r"frist.*did you mean 'first'"),
    ],
)
def test_a_recipe_that_measures_what_it_cannot_have_is_refused(recipe, toy, name, own, fault):
    own = [HELD.format(toy.root) if word == "HELD" else word for word in own]
    with pytest.raises(ConfigError, match=fault):
        check_recipe(recipe(name, *own), 2)


def test_held_out_samples_belong_to_every_objective_and_to_no_epoch(recipe, toy):
    for name in ("sft", "npo", "rmu"):
        plain = recipe(name)
        given = recipe(name, HELD.format(toy.root), "train.validate_every=4", "train.keep_best=validation.loss")
        needs = check_recipe(given, 2).needs
        streams = read_streams(given, needs)
        assert list(streams) == [*needs.streams, "validation"]
        feed = Feed(given, needs, streams, load.processor(given.model))
        assert list(feed.samples) == list(needs.streams)
        other = Feed(plain, needs, read_streams(plain, needs), feed.encoder.processor)
        assert feed.steps == other.steps
        assert [m.samples for m in feed.window(3, ALONE)] == [m.samples for m in other.window(3, ALONE)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_every_held_out_sample_counts_once_and_batches_are_the_same_on_any_number_of_ranks(size):
    parts = [validation.share(20, 3, rank, size) for rank in range(size)]
    assert len({len(rows) for rows, _ in parts}) == 1  # the same forwards on each rank
    counted = [tuple(row) for rows, counting in parts for row, counts in zip(rows, counting, strict=True) if counts]
    assert sorted(counted) == sorted(tuple(row) for row in validation.share(20, 3, 0, 1)[0])
    assert sorted(n for row in counted for n in row) == list(range(20))


def test_equal_pictures_and_questions_are_one_input_whatever_their_files_and_answers(recipe, toy, tmp_path):
    samples = read(formats.source("samples", str(toy.root / "retain.jsonl"))).samples[:4]
    (tmp_path / "copy.png").write_bytes(Path(samples[0].image).read_bytes())
    held = [replace(samples[0], id="a", image=str(tmp_path / "copy.png"), answer="other"), samples[1]]
    held += [replace(samples[2], question=f"{samples[2].question} Why ?"), replace(samples[3], history=(("a", "b"),))]
    write_samples(tmp_path / "held.jsonl", held)
    given = recipe("sft", f"data.streams.validation=[{{format: samples, path: {tmp_path}/held.jsonl}}]")
    streams = read_streams(given, make(given.objective).needs)
    check_pictures(streams)
    assert validation.overlap(streams) == {"train": 2}


def test_the_held_out_loss_of_a_checkpoint_is_that_of_its_own_step():
    means = Means("validation.loss")
    means.add({"loss": 3.0, "terms": {}, "validation": {"loss": 0.5, "tokens": 9}})
    means.add({"loss": 1.0, "terms": {}})
    assert means.take() == {"loss": 2.0}
    means.add({"loss": 4.0, "terms": {"ce": 4.0}, "validation": {"loss": 0.25, "tokens": 9}})
    assert means.take() == {"loss": 4.0, "terms.ce": 4.0, "validation.loss": 0.25}
    means.add({"loss": 4.0, "terms": {}, "validation": None})  # of a stop
    assert means.take() == {"loss": 4.0}
    with pytest.raises(ConfigError, match=r"train.keep_best=validation.los: did you mean 'validation.loss'"):
        Means("validation.los").add({"loss": 1.0, "terms": {}})


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12))
def test_means_of_a_checkpoint_are_those_of_a_run_that_was_not_stopped_between(tmp_path_factory, steps, since, stop):
    file = tmp_path_factory.mktemp("means") / "metrics.jsonl"
    made = [{"step": n, "loss": n / 7, "terms": {"ce": 1 / n}, "validation": {"loss": 3 / n}} for n in range(1, 21)]
    file.write_text("".join(state.sealed("metrics", record) for record in made))
    since, stop = min(since, steps), min(max(since, stop), steps)
    whole, again = Means("terms.ce"), Means("terms.ce")
    for record in made[since:steps]:
        whole.add(record)
    again.recall(file, since, stop)
    for record in made[stop:steps]:
        again.add(record)
    assert again.take() == whole.take()


def test_a_record_that_waits_for_its_held_out_loss_is_known(tmp_path):
    file = tmp_path / "metrics.jsonl"
    waits = {"step": 4, "loss": 1.0, "validation": None}
    file.write_text("".join(state.sealed("metrics", r) for r in ({"step": 3, "loss": 1.0}, waits)))
    lacking = {step: validation.HeldOut.lacking(SimpleNamespace(), file, step) for step in (0, 3, 4, 5)}
    assert lacking == {0: False, 3: False, 4: True, 5: False}
    assert not sinks.complete(waits)
    assert sinks.complete({"step": 3, "validation": {"loss": None, "tokens": 9.0}})


def test_samples_and_hosts_stay_on_this_machine():
    record = {
        "step": 3,
        "loss": 0.5,
        "seconds": {"data": 0.25},
        "slowest": {"rank": 1, "host": "node7", "seconds": 0.5, "data": 0.0},
        "spike": {"scores": {"loss": 12.0}, "samples": {"train": ["secret-id"]}},
        "validation": {"loss": None, "tokens": 9.0},
    }
    assert sinks.scalars(record) == {
        "loss": 0.5,
        "seconds/data": 0.25,
        "slowest/rank": 1,
        "slowest/seconds": 0.5,
        "slowest/data": 0.0,
        "validation/tokens": 9.0,
    }
