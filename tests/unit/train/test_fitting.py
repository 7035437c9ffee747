"""`train.micro_batch: auto` on a GPU takes as many rows as the plan's memory has room for, and no more."""

from dataclasses import replace

import pytest
import torch

from mirage_dist import config as configs
from mirage_dist.model import load
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning import check, fitting
from mirage_dist.train.planning.costs.hardware import GIB, hardware

RESERVED = int(hardware("h100").reserved_gib * GIB)


@pytest.fixture(scope="module")
def case(toy):
    overrides = [*toy.overrides("npo", toy.root / "fitting"), "train.global_batch=48", "train.micro_batch=auto"]
    recipe = configs.load("configs/train/demo_npo.yaml", overrides, TrainRecipe)
    checked = check.check_recipe(recipe, 2)
    feed = Feed(recipe, checked.needs, check.check_inputs(checked), load.processor(recipe.model))
    feed.check_lengths(Group(0, 0, 1, torch.device("cpu")))
    return fitting.case_of(checked, feed, checked.deepspeed["zero_optimization"])


def peak(case, rows):
    return replace(case, at=replace(case.at, micro_batch=rows)).peak


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 12, 24])
def test_rows_are_chosen_whose_memory_just_suffices(case, rows):
    assert fitting.largest(case, peak(case, rows) + RESERVED) == rows
    if rows > 1:
        assert fitting.largest(case, peak(case, rows) + RESERVED - 1) < rows


def test_where_not_even_one_row_fits_the_error_names_the_ranks_that_have_room(case):
    roomy = replace(case, at=replace(case.at, ranks=8, gpus=8))
    assert roomy.peak < case.peak
    with pytest.raises(ConfigError, match=r"not even one row .* on one of 2 ranks .*; 8 or 12 .* ranks have room"):
        fitting.largest(case, peak(roomy, 1) + RESERVED)
    with pytest.raises(ConfigError, match="nor on any number of ranks"):
        fitting.largest(case, RESERVED + 1000)
