"""`mirage plan` for LLaVA-1.5-7B before there are data and weights: a config.json is all that is here."""

import json
from dataclasses import replace

import pytest
from families import published
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import config as configs
from mirage_dist.cli import main
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.planning import advice, plan, table
from mirage_dist.train.planning.costs import duration, hardware
from mirage_dist.train.planning.costs.hardware import GIB
from mirage_dist.train.planning.costs.lengths import Described

VOCABULARY = 32_064  # llava-hf/llava-1.5-7b-hf, config.json
DATA = Described(2000, (700, 1100), (60, 250))
SMALL = hardware.hardware("h100", ["memory_gib=12", "host_memory_gib=64"])
DESCRIBED = ("--samples", "2000", "--tokens", "700,1100", "--responses", "60,250")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The published config.json alone, with the vocabulary of the published tokenizer."""
    whole = published.make("llava_llama", tmp_path_factory.mktemp("published"))
    tree = json.loads((whole / "config.json").read_text())
    tree["text_config"]["vocab_size"] = VOCABULARY
    folder = tmp_path_factory.mktemp("config_only")
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def recipe_of(model, tmp_path_factory):
    def make(*overrides: str) -> TrainRecipe:
        own = [f"model.path={model}", f"run.dir={tmp_path_factory.getbasetemp()}/no_run", *overrides]
        return configs.load("configs/train/npo.yaml", own, TrainRecipe)

    return make


@pytest.fixture(scope="module")
def plans(recipe_of):
    """Full NPO on 1, 8 and 64 H100."""
    on = hardware.hardware("h100")
    return {n: plan.plan(recipe_of(), n, plan.cluster(on, ranks=n), DATA) for n in (1, 8, 64)}


def test_model_states_are_those_of_zeros_paper(plans):
    """2 bytes of weights, 12 of the optimizer, and 4 of gradients, which our engine accumulates in float32."""
    for ranks, made in plans.items():
        all_, trained = made.case.sizes.elements, made.case.sizes.trained.elements
        states = table.as_json(made)["memory"]["model_states_gib_per_gpu"]
        assert states == pytest.approx((2 * all_ + 16 * trained) / ranks / GIB, rel=1e-3)


def test_the_table_decides_for_1_8_and_64_gpus(plans):
    assert [made.fits for made in plans.values()] == [False, True, True]
    for made in plans.values():
        lines = table.text(made).splitlines()
        assert max(map(len, lines)) <= table.COLUMNS
        assert {"verdict", "memory of one rank", "one step", "the whole run", "disk"} <= set(lines)
    # What would not run as it stands is no silent change of the batch.
    assert plans[64].given == (16, 2)
    assert "train.global_batch=16 with train.micro_batch=2 does not divide by 64 GPUs" in table.text(plans[64])
    assert plans[1].given is plans[8].given is None


def test_the_smallest_cluster_fits_and_half_of_it_does_not(plans):
    least = plans[1].smallest
    on = plans[1].cluster.on
    assert least.fits(on)
    half = replace(least, at=replace(least.at, ranks=least.at.ranks // 2, micro_batch=1))
    assert not half.fits(on)


def test_changes_are_computed_and_end_where_it_fits(plans, recipe_of):
    changes = plans[1].changes
    assert changes[-1].fits
    assert not any(change.fits for change in changes[:-1])
    together = [plans[1].peak.device, *(change.together for change in changes)]
    assert together == sorted(together, reverse=True)
    assert plans[8].changes == []
    # What a change promises is what the plan of the changed recipe says.
    for change in changes:
        if change.alone is not None and not change.name.startswith("more GPUs"):
            changed = plan.plan(recipe_of(*change.keys), 1, plans[1].cluster, DATA)
            assert changed.peak.device == change.alone, change.name


def test_the_json_is_one_versioned_object_that_repeats_the_table(plans):
    made = plans[8]
    tree = json.loads(json.dumps(table.as_json(made), allow_nan=False))
    assert tree["version"] == "mirage.plan/1"
    documented = (configs.REPOSITORY / "docs/planning.md").read_text()
    assert [key for key in tree if f"`{key}" not in documented] == []
    parts = tree["memory"]["parts_gib_per_gpu"]
    states = sum(parts[name]["device"] for name in ("weights", "gradients", "optimizer"))
    assert tree["memory"]["model_states_gib_per_gpu"] == pytest.approx(states)
    assert tree["memory"]["free_gib_per_gpu"] == pytest.approx(76.1 - tree["memory"]["peak_gib_per_gpu"])
    assert tree["step"]["seconds_least"] <= tree["step"]["seconds_most"]
    assert tree["total"]["gpu_hours"] == pytest.approx(tree["total"]["seconds"] * 8 / 3600)
    assert tree["total"]["cost"] is None  # no price was given, and there is no default
    assert tree["parameters"]["all"] == pytest.approx(7.06e9, rel=0.01)  # the model card's 7.06 B
    assert set(tree["communication"]["stages"]) == {"ZeRO-2", "ZeRO-3"}


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 16), st.booleans(), st.booleans())
def test_more_ranks_and_less_work_at_once_never_take_more_memory(plans, ranks, micro, checkpointing, packed):
    case = plans[8].case

    def peak(**change) -> int:
        whole = {"ranks": ranks, "micro_batch": micro, "checkpointing": checkpointing, "packed": packed} | change
        return replace(case, at=replace(case.at, **whole)).peak

    assert peak(ranks=2 * ranks) <= peak() <= peak(micro_batch=micro + 1)
    assert peak(checkpointing=True) <= peak(checkpointing=False)
    assert peak(packed=True) <= peak(packed=False)
    on = hardware.hardware("h100")
    largest = advice.largest_micro_batch(replace(case, at=replace(case.at, global_batch=64, ranks=ranks)), on)
    more = advice.largest_micro_batch(
        replace(case, at=replace(case.at, global_batch=64, ranks=ranks)), hardware.hardware("h200")
    )
    assert largest <= more


def test_a_gpu_hour_has_the_price_that_was_given_and_numbers_can_be_replaced(recipe_of, capsys, model, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("network_gb_s: 12.5\nutilization: 0.2\n")
    words = ["plan", "configs/train/npo_lora.yaml", f"model.path={model}", f"run.dir={tmp_path}/r", "--json", "--gpu"]
    words += ["a100", "--nodes", "2", "--price", "2", "--hardware", str(file), "--hardware", "utilization=0.3"]
    assert main([*words, *DESCRIBED]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["hardware"]["network_gb_s"] == 12.5
    assert tree["hardware"]["utilization"] == 0.3
    assert tree["hardware"]["sources"]["utilization"] == "given"
    assert tree["total"]["cost"] == pytest.approx(2 * tree["total"]["gpu_hours"])
    assert tree["cluster"] == {"gpu": "a100", "gpus": 16, "nodes": 2, "gpus_per_node": 8}
    assert "ZeRO-3, hpZ" in tree["communication"]["stages"]


def test_hpz_of_the_recipe_is_planned_for_each_cluster(recipe_of):
    """Of 16 GPUs on two nodes each node has a second copy of the weights; on one node it would be the first."""
    on = hardware.hardware("h100")
    recipe = recipe_of("deepspeed=configs/deepspeed/zero3_hpz.json", "train.global_batch=32")
    two, one = (plan.plan(recipe, n, plan.cluster(on, ranks=n), DATA) for n in (16, 8))
    assert two.memory["secondary weights"][0].device == pytest.approx(2 * two.case.sizes.elements / 8, rel=1e-3)
    assert "secondary weights" not in one.memory
    assert {"weights, first forward", "weights, in the node"} <= {t.name for t in two.step.transfers}
    assert "secondary weights" not in two.smallest.parts  # it fits on one node


def test_a_micro_batch_of_auto_is_planned_as_what_fits(recipe_of):
    on = hardware.hardware("h100")
    made = plan.plan(recipe_of("train.micro_batch=auto", "train.global_batch=256"), 8, plan.cluster(on, ranks=8), DATA)
    assert made.case.at.micro_batch == advice.largest_micro_batch(made.case, on) > 8
    assert made.given is None


def test_what_packed_rows_cost_depends_on_the_attention(plans):
    """Without flash-attention every token of a micro-batch meets every other one."""
    case = plans[8].case
    on, needs = plans[8].cluster.on, case.objective.needs
    packed = replace(case.at, packed=True)
    apart, whole = (
        duration.step(replace(case.sizes, flash=flash), packed, on, needs, case.lengths) for flash in (True, False)
    )
    tokens = packed.micro_batch * sum(own.mean for own in case.lengths.values())
    own = case.lengths["forget"]
    more = 12 * (own.mean * tokens - own.square) * case.sizes.work.attention * packed.global_batch * len(case.lengths)
    assert whole.policy.model - apart.policy.model == pytest.approx(more)


def test_offloading_is_no_advice_for_an_optimizer_that_cannot(recipe_of):
    names = {
        name: [c.name for c in plan.plan(recipe_of(*words), 1, plan.cluster(SMALL, ranks=1), DATA).changes]
        for name, words in {"adamw": [], "adafactor": ["train.optimizer={name: adafactor}"]}.items()
    }
    assert "offload optimizer and weights" in names["adamw"]
    assert "offload optimizer and weights" not in names["adafactor"]


WRONG = {
    "no GPU": (["--gpus", "0"], "expected a whole number from 1"),
    "unknown GPU": (["--gpu", "h10"], "--gpu 'h10': not in the table; known: h100"),
    "ranks that are not nodes × gpus": (["--ranks", "9", "--nodes", "2", "--gpus", "4"], "not 2 nodes × 4 GPUs"),
    "unknown field": (["--hardware", "nvlink=3"], "no field 'nvlink'; did you mean"),
    "no number": (["--hardware", "tflops=many"], "tflops='many'; expected a positive number"),
    "no file": (["--hardware", "nowhere.yaml"], "expected FIELD=VALUE, or a YAML or JSON file"),
    "a share above one": (["--hardware", "utilization=40"], "expected a share above 0 and up to 1"),
    "half a description": (["--samples", "10"], "--tokens and --responses: missing"),
    "mean above longest": ([*DESCRIBED[:2], "--tokens", "9,3", "--responses", "1"], "MEAN <= LONGEST"),
    "no tokens": ([*DESCRIBED[:2], "--tokens", "many", "--responses", "1"], "--tokens 'many': expected MEAN"),
    "responses beyond rows": ([*DESCRIBED[:2], "--tokens", "9", "--responses", "10"], "part of --tokens"),
    "no data": ([], "describe them: --samples N"),
    "no model": (["model.path=/nowhere", *DESCRIBED], "model.path=/nowhere"),
    "no price": (["--price", "cheap"], "expected a price"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case, model, tmp_path, capsys):
    words, message = WRONG[case]
    data = [f"data.streams.{n}=[{{format: samples, path: {tmp_path}/{n}.jsonl}}]" for n in ("forget", "retain")]
    first = ["plan", "configs/train/npo.yaml", f"model.path={model}", f"run.dir={tmp_path}/run", *data]
    try:
        status = main([*first, *words])
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_no_recipe_is_named(capsys):
    assert main(["plan", "configs/train/nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_gpu_of_the_table_has_a_source_for_every_number():
    for name in hardware.GPUS:
        assert all(hardware.sources(hardware.hardware(name)).values())
        assert hardware.hardware(name).usable > 0
    with pytest.raises(ConfigError, match="leaves nothing"):
        hardware.hardware("h100", ["memory_gib=2"])
