"""Power is what enumeration says for few questions and simulation for many; `mirage power` follows from it."""

import json
import math
import re
import shlex
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_dist import cli, stats
from mirage_dist.config import REPOSITORY
from mirage_dist.stats import power
from mirage_dist.stats.power import Paired, Unpaired

LEVELS = st.sampled_from([0.01, 0.05, 0.2, 0.25])  # some tables have exactly the last two as their p
PARTS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])


def multinomial(counts, shares):
    ways = math.factorial(sum(counts)) / math.prod(map(math.factorial, counts))
    return ways * math.prod(share**count for share, count in zip(shares, counts, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), PARTS, PARTS, PARTS, LEVELS)
def test_paired_power_is_the_share_of_all_outcomes_that_mcnemar_rejects(n, split, discordance, shared, level):
    only_before, only_after = discordance * split, discordance * (1 - split)
    both = (1 - discordance) * shared
    design = Paired(min(1, both + only_before), min(1, both + only_after), discordance)
    listed = sum(
        multinomial((i, j, n - i - j), (only_before, only_after, 1 - discordance))
        for i in range(n + 1)
        for j in range(n - i + 1)
        if stats.mcnemar(i, j) <= level
    )
    assert design.power(n, level) == pytest.approx(listed, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), PARTS, PARTS, LEVELS)
def test_unpaired_power_is_the_share_of_all_outcomes_that_fisher_rejects(n, before, after, level):
    listed = sum(
        multinomial((i, n - i), (before, 1 - before)) * multinomial((j, n - j), (after, 1 - after))
        for i in range(n + 1)
        for j in range(n + 1)
        if stats.fisher(i, n - i, j, n - j) <= level
    )
    assert Unpaired(before, after).power(n, level) == pytest.approx(listed, abs=1e-9)


mcnemar, fisher = cache(stats.mcnemar), cache(stats.fisher)
CASES = [
    (Paired(0.55, 0.45, 0.2), 0.05, 0.8),
    (Paired(0.64, 0.13, 0.53), 0.0125, 0.9),
    (Unpaired(0.25, 0.1), 0.05, 0.8),
    (Unpaired(0.02, 0.05), 0.05, 0.5),
]


@pytest.mark.parametrize(("design", "level", "target"), CASES, ids=str)
def test_so_many_questions_have_that_power_in_simulation_and_fewer_do_not(design, level, target):
    questions, achieved = power.questions(design, level, target)
    generator, repeats = np.random.default_rng(0), 6000
    if isinstance(design, Paired):
        rise = (design.discordance + design.after - design.before) / 2
        shares = [design.discordance - rise, rise, 1 - design.discordance]
        tables = generator.multinomial(questions, shares, repeats)
        rejected = sum(mcnemar(int(i), int(j)) <= level for i, j, _ in tables)
    else:
        hits = generator.binomial(questions, [design.before, design.after], (repeats, 2))
        rejected = sum(fisher(int(i), questions - int(i), int(j), questions - int(j)) <= level for i, j in hits)
    assert rejected / repeats == pytest.approx(achieved, abs=4 * math.sqrt(achieved * (1 - achieved) / repeats))
    assert all(design.power(n, level) >= target for n in range(questions, questions + 100))
    assert design.power(questions - 1, level) < target


@pytest.mark.parametrize("questions", [40, 441])
@pytest.mark.parametrize("level", [0.01, 0.05])
def test_the_difference_that_questions_show_is_the_smallest(questions, level):
    for design in (
        lambda difference: Unpaired(0.25, 0.25 + difference),
        lambda difference: Paired(0.25, 0.25 + difference, power.independent(0.25, 0.25 + difference)),
    ):
        difference, achieved = power.detectable(design, questions, level, 0.8, 0.75)
        assert achieved == pytest.approx(design(difference).power(questions, level))
        assert achieved >= 0.8
        assert design(difference - power.FINEST).power(questions, level) < 0.8


def test_pairs_that_never_differ_and_equal_rates_have_no_number():
    assert Paired(0.4, 0.4, 0).power(1000, 0.05) == 0
    assert power.questions(Unpaired(0.4, 0.4), 0.05, 0.8) is None
    assert Paired(0.4, 0.4, 0.3).power(500, 0.05) <= 0.05  # the level is kept where nothing differs
    assert Unpaired(0.4, 0.4).power(500, 0.05) <= 0.05
    assert power.detectable(lambda difference: Unpaired(0, difference), 3, 0.05, 0.8, 1) is None


WRONG = {
    "--before 1.5 --after .2": "'1.5': expected a share from 0 to 1, such as 0.25",
    "--before nan --after .2": "'nan': expected a share from 0 to 1",
    "--before .5 --after .2 --discordance .1": "a discordance of 0.1: rates of 0.5 and 0.2 differ on 0.3 to 0.7 of the",
    "--before .9 --after .8 --discordance .5": "rates of 0.9 and 0.8 differ on 0.1 to 0.3 of the questions",
    "--before .5 --after .5": "--after 0.5: the same rate as --before",
    "--before .5": "give either --after, for the number of questions",
    "--before .5 --after .4 --questions 9": "or --questions, for the difference that so many show",
    "--before .5 --after .4 --unpaired --discordance .3": "--discordance: belongs to paired measurements",
    "--before .5 --after .4 --level .9": "'.9': expected a level from 1e-9 to 0.5",
    "--before .5 --after .4 --power 1": "'1': expected a power above 0 and below 1",
    "--before .5 --after .4 --level .4 --power .3": "--power 0.3: expected more than the level, 0.4",
    "--before .5 --questions 0": "'0': expected a whole number from 1",
    "--before .5 --questions 20000000": "--questions 20000000: expected at most 10,000,000",
    "--before .5 --after .5000001": "10,000,000 questions do not show a change as small as this one",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_named(line, capsys):
    try:
        status = cli.main(["power", *shlex.split(line)])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert WRONG[line] in capsys.readouterr().err


def test_one_object_holds_what_the_text_says(capsys):
    def printed(*words):
        assert cli.main(["power", "--before", "0.25", *words]) == 0
        return capsys.readouterr().out

    needed = json.loads(printed("--after", "0.1", "--discordance", "0.3", "--json"))
    assert (needed["questions"], needed["achieved"]) == power.questions(Paired(0.25, 0.1, 0.3), 0.05, 0.8)
    assert (needed["design"], needed["independent"]) == ("paired", False)
    shown = json.loads(printed("--questions", "100", "--json"))
    assert shown["independent"]
    assert f"a fall to {100 * shown['fall']['after']:.2f} % or lower" in printed("--questions", "100")
    assert json.loads(printed("--questions", "2", "--unpaired", "--json"))["rise"] is None
    assert "a rise: none, however large" in printed("--questions", "2", "--unpaired")


def test_the_pages_example_prints_what_the_page_says(capsys):
    section = (REPOSITORY / "docs/evaluation.md").read_text().partition("## How many questions a difference needs")[2]
    (block,) = re.findall(r"^```\n(\$ mirage power .*?)^```", section, re.MULTILINE | re.DOTALL)
    for example in block.split("$ mirage ")[1:]:
        command, _, output = example.partition("\n")
        assert cli.main(shlex.split(command)) == 0
        assert capsys.readouterr().out.strip() == output.strip()
