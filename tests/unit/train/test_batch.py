"""A global batch is divided over any number of ranks that makes it up; others are refused with those that do."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mirage_dist import config as configs
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.planning import batch
from mirage_dist.train.planning.check import check_recipe

AUTO = "train.micro_batch=auto"


def checked(ranks, *overrides, recipe="npo"):
    return check_recipe(configs.load(f"configs/train/{recipe}.yaml", [AUTO, *overrides], TrainRecipe), ranks)


@given(share=st.integers(1, 200), ranks=st.integers(1, 64), limit=st.integers(1, 300))
def test_the_largest_number_of_rows_that_fits_and_makes_the_batch_up(share, ranks, limit):
    rows = batch.choose(share * ranks, ranks, limit)
    assert share % rows == 0
    assert rows <= limit
    assert not any(share % other == 0 for other in range(rows + 1, min(limit, share) + 1))


@given(rows=st.integers(1, 300), ranks=st.integers(1, 300), limit=st.integers(1, 16))
def test_the_numbers_of_ranks_that_an_error_names_are_the_nearest_that_do(rows, ranks, limit):
    assume(rows % ranks)
    with pytest.raises(ConfigError) as error:
        batch.choose(rows, ranks, limit)
    named = [int(n) for n in re.findall(r"\d+", str(error.value).partition("; take ")[2].partition(" ranks")[0])]
    fit = [n for n in range(1, rows + 1) if rows % n == 0]
    assert named == [max(n for n in fit if n < ranks), *[n for n in fit if n > ranks][:1]]


@pytest.mark.parametrize(("ranks", "rows", "accumulation"), [(1, 8, 16), (8, 8, 2), (64, 2, 1), (128, 1, 1)])
def test_one_recipe_has_its_global_batch_on_1_8_64_and_128_ranks(ranks, rows, accumulation):
    deepspeed = checked(ranks, recipe="sft").deepspeed
    assert deepspeed["train_micro_batch_size_per_gpu"] == rows
    assert deepspeed["gradient_accumulation_steps"] == accumulation
    assert rows * accumulation * ranks == 128


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ConfigError, match=r"global_batch=16: does not divide by 12 ranks; take 8 or 16 ranks"):
        checked(12)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("npo_parity", ()),  # reduction over the micro-batch
        ("rmu_original", ()),  # padding counts
        ("rmu_original", ("data.packing=auto",)),  # which may come to padding
    ],
)
def test_a_loss_that_depends_on_the_micro_batch_wants_a_number(recipe, overrides):
    with pytest.raises(ConfigError, match=r"train\.micro_batch=auto: the loss of objective (npo|rmu).*give a number"):
        checked(1, *overrides, recipe=recipe)


@pytest.mark.parametrize("value", ["atuo", "0", "[8]", "null", "1.5"])
def test_another_word_is_refused_with_what_is_allowed(value):
    with pytest.raises(ConfigError, match=r"train\.micro_batch=.*expected a whole number.*, or auto$"):
        configs.load("configs/train/npo.yaml", [f"train.micro_batch={value}"], TrainRecipe)
