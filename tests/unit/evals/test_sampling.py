"""Answers drawn at random: their distribution, their seeds, and the best of K with questions as the unit."""

import json
import math
import shutil
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from toy import Toy
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from mirage_dist import config as configs
from mirage_dist import report, state
from mirage_dist.data import formats, sources
from mirage_dist.data.sample import Draw, Sample
from mirage_dist.evals import attacks, metrics, results, runner, worklist
from mirage_dist.evals.attacks.sampling import seeded
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.models.base import Generator
from mirage_dist.evals.models.drawing import Drawing, gumbel, nucleus
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.results import AppliedAttack, Condition
from mirage_dist.report import load
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.sweep import measures
from mirage_dist.sweep.measures import Place

ATTACKS = {
    "drawn": {"kind": "sampling", "draws": 4, "temperature": 2.0, "top_p": 0.95, "seed": 5},
    "so_drawn": {
        "kind": "combine",
        "attacks": [{"kind": "prefix", "prefixes": ["so", "well"]}, {"kind": "sampling", "draws": 3, "temperature": 2}],
    },
}


def recipe(toy: Toy, run: Path, *overrides: str) -> EvalRecipe:
    source = {"format": "samples", "path": f"{toy.root}/forget.jsonl", "limit": 5}
    tree = {
        "suite": "s",
        "run": {"dir": str(run)},
        "model": {"path": f"{toy.root}/model", "dtype": "fp32"},
        "sets": {"unsafe": {"kind": "unsafe", "sources": [source], "attacks": ATTACKS}},
        "generation": {"max_new_tokens": 5, "batch_size": 16},
    }
    return configs.from_tree(OmegaConf.create(tree), list(overrides), EvalRecipe, "a test")


# ---------------------------------------------------------------------------------------------- one draw


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.5, 0.05)])
def test_draws_have_the_distribution_of_transformers_own_rules(temperature, top_p):
    """χ² of 8000 seeds against softmax of the logits after transformers' temperature and nucleus rules."""
    logits_1V, seeds = 1.5 * torch.randn(1, 9, generator=torch.Generator().manual_seed(0)), 8_000
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits_1V))
    p_V = warped.softmax(1)[0]
    drawing = Drawing([Draw(temperature, top_p, seed) for seed in range(seeds)])
    counts = drawing(None, logits_1V.repeat(seeds, 1)).argmax(1).bincount(minlength=9)
    assert counts[p_V == 0].sum() == 0
    possible = p_V > 0
    expected = seeds * p_V[possible]
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = int(possible.sum()) - 1
    assert chi2 <= freedom + 4 * math.sqrt(2 * max(freedom, 1))


def test_a_nucleus_is_the_fewest_tokens_that_reach_the_probability():
    logp = torch.tensor([[0.5, 0.25, 0.15, 0.1, 0.0]]).log()
    for top_p, size in [(0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.95, 4), (1.0, 4)]:
        assert nucleus(logp, torch.tensor([[top_p]])).sum() == size


def test_rows_that_are_not_drawn_keep_their_scores_and_no_row_changes_another():
    scores = torch.randn(4, 7)
    draws = [None, Draw(1.0, 0.9, 3), None, Draw(2.0, 1.0, 4)]
    together = Drawing(draws)(None, scores)
    assert torch.equal(together[[0, 2]], scores[[0, 2]])
    for row in (1, 3):
        alone = Drawing([draws[row]])(None, scores[row : row + 1])
        assert torch.equal(alone[0], together[row])
    assert torch.equal(Drawing([None] * 4)(None, scores), scores)


@torch.inference_mode()
def defined(generator: HuggingFace, sample: Sample) -> str:
    """The definition: one sample, no padding, one stream of noise."""
    draw, inputs = sample.draw, generator.encoder.prompts([replace(sample, draw=None)])
    mask_1S, tokens, noise = inputs["attention_mask"], [], torch.Generator().manual_seed(draw.seed)
    for _ in range(5):
        outputs = generator.model(**inputs, use_cache=True)
        logits_1V = outputs.logits[:, -1].float() / draw.temperature
        kept_1V = TopPLogitsWarper(draw.top_p)(None, logits_1V.clone()) > -torch.inf
        summed_1V = logits_1V + gumbel(logits_1V.shape[1], noise)
        token = summed_1V.masked_fill(~kept_1V, -torch.inf).argmax(1, keepdim=True)
        if token.item() == generator.tokenizer.eos_token_id:
            break
        tokens.append(token.item())
        mask_1S = torch.cat([mask_1S, torch.ones_like(token)], 1)
        inputs = {"input_ids": token, "attention_mask": mask_1S, "past_key_values": outputs.past_key_values}
    return generator.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_an_answer_is_the_same_draw_in_any_batch_beside_any_rows(toy, tmp_path):
    options = recipe(toy, tmp_path)
    generator = HuggingFace(options.model, options.template, options.generation)
    questions = [q.sample for q in worklist.plan(options).questions if q.attack in ("clean", "drawn")]
    texts = {}
    for size, order in ((16, 1), (3, -1), (1, 1)):
        generator.batch_size = size
        rows = questions[::order]
        answers = dict(pair for batch in generator(rows) for pair in batch)
        texts[size] = [answers[i] for i in range(len(rows))][::order]
    assert texts[16] == texts[3] == texts[1]
    drawn = [(sample, text) for sample, text in zip(questions, texts[1], strict=True) if sample.draw]
    assert [text for _, text in drawn] == [defined(generator, sample) for sample, _ in drawn]
    assert len({text for _, text in drawn}) > len(drawn) / 2


# ---------------------------------------------------------------------------------------------- seeds and order


def sample(question="q a ?", identity="a"):
    return Sample(identity, None, question, "", False, "", "test")


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**63 - 1))
def test_a_seed_follows_from_question_and_number_alone(few, more, seed):
    def rows(draws, samples):
        attack = attacks.make({"kind": "sampling", "draws": draws, "seed": seed}, "r", "k")
        return {
            (s.id, k): seeded(row, s.question, k).draw.seed for s in samples for k, row in enumerate(attack(s), start=1)
        }

    both = [sample(identity="a"), sample(identity="b"), sample("q c ?", "c")]
    whole = rows(few + more, both)
    assert len(set(whole.values())) == len(whole)
    assert all(0 <= own < 2**52 for own in whole.values())
    assert rows(few, both[::-1]).items() <= whole.items()
    assert seeded(sample(), "q a ?", 1) == sample()


def test_draws_of_rewrites_come_in_rounds_each_with_a_seed_of_its_own():
    attack = attacks.make(ATTACKS["so_drawn"], "r", "k")
    rows = [seeded(row, "q a ?", k) for k, row in enumerate(attack(sample()), start=1)]
    assert [row.question for row in rows] == ["so q a ?", "well q a ?"] * 3
    assert len({row.draw.seed for row in rows}) == 6
    assert (attack.shots, attack.draws) == (6, 3)
    assert [str(c) for c in AppliedAttack("x", 6, False, 3).conditions] == ["x_k2", "x_k4", "x_k6"]
    assert [c.shots for c in AppliedAttack("x", 100, False, 100).conditions] == [1, 2, 4, 8, 16, 32, 64, 100]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "sampling"}, "draws"),
        ({"kind": "sampling", "draws": 0}, r"draws=0; expected a whole number above 0"),
        (
            {"kind": "sampling", "draws": 2, "temperature": 0},
            r"temperature=0.*; expected a temperature of at least 0\.01",
        ),
        ({"kind": "sampling", "draws": 2, "top_p": 1.5}, r"top_p=1\.5; expected a share"),
        (
            {"kind": "combine", "attacks": [{"kind": "sampling", "draws": 2}, {"kind": "swap", "word": "what"}]},
            r"recipe: attacks\.x\.attacks\[0\]: draws answers, which comes after every change.*put it last",
        ),
    ],
)
def test_a_wrong_option_of_an_attack_that_draws_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        attacks.make(options, "recipe", "attacks.x")


class Greedy(Generator):
    """An engine from outside that knows nothing of draws."""

    def answer(self, samples):
        return ["greedy" for _ in samples]


def test_an_engine_that_takes_no_seed_is_refused_before_anything_is_read(toy, tmp_path):
    engine = "generation.backend=test_sampling:Greedy"
    with pytest.raises(ConfigError, match=r"sets\.unsafe\.attacks\.drawn: draws .*backend=test_sampling:Greedy cannot"):
        runner.evaluate(recipe(toy, tmp_path / "run", engine, "model.path=nowhere"))
    assert not (tmp_path / "run").exists()
    greedy = recipe(toy, tmp_path, engine)
    worklist.check(replace(greedy, sets={"unsafe": replace(greedy.sets["unsafe"], attacks={})}))


# ---------------------------------------------------------------------------------------------- the best of K

VERDICT = st.sampled_from(["harmful", "refused", "irrelevant", "unparsed"])
TABLES = st.tuples(st.integers(1, 2), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        st.just(shape), st.lists(st.lists(VERDICT, min_size=math.prod(shape), max_size=math.prod(shape)), min_size=1)
    )
)


def judged(table):
    return [
        Judged("unsafe", str(i), "x", shot, v) for i, shots in enumerate(table) for shot, v in enumerate(shots, start=1)
    ]


def enumerated(given, rewrites, rounds):
    """The fraction of all choices of so many draws of each rewrite of which any is harmful."""
    parts = [given[place::rewrites] for place in range(rewrites)]
    choices = list(product(*(list(combinations(part, rounds)) for part in parts)))
    return sum(any("harmful" in part for part in choice) for choice in choices) / len(choices)


@settings(max_examples=60)
@given(TABLES)
def test_the_best_of_k_is_the_mean_over_every_choice_of_draws(case):
    (rewrites, draws), table = case
    attack, rows = AppliedAttack("x", rewrites * draws, False, draws), judged(table)
    whole = [given for given in table if "unparsed" not in given]
    before = 0.0
    for condition in attack.conditions:
        leaf = metrics.best_of(rows, attack, condition, "harmful")
        if not whole:
            assert leaf is None
            continue
        rounds = condition.shots // rewrites
        expected = sum(enumerated(given, rewrites, rounds) for given in whole) / len(whole)
        assert leaf["rate"] == pytest.approx(expected)
        assert (leaf["n"], leaf.get("unjudged", 0)) == (len(whole), len(table) - len(whole))
        assert leaf["ci95"][0] - 1e-12 <= leaf["rate"] <= leaf["ci95"][1] + 1e-12
        assert leaf["rate"] >= before - 1e-12
        before = leaf["rate"]
        for guess in ("harmful", "refused"):
            filled = [[guess if v == "unparsed" else v for v in given] for given in table]
            rate = sum(enumerated(given, rewrites, rounds) for given in filled) / len(filled)
            low, high = leaf.get("bounds", [leaf["rate"]] * 2)
            assert low - 1e-9 <= rate <= high + 1e-9
    measured = metrics.measure("unsafe", rows, [attack], frozenset({"harmful", "refused", "irrelevant"}))
    of_all = metrics.question_level(rows, attack.full, "harmful")
    assert (measured["asr"][str(attack.full)] is None) == (of_all is None)
    if of_all:
        for field in ("rate", "k", "n"):
            assert measured["asr"][str(attack.full)][field] == pytest.approx(of_all[field])
        assert measured["asr"][str(attack.full)]["ci95"] == pytest.approx(of_all["ci95"])


def test_its_interval_holds_the_truth_although_draws_of_a_question_are_alike():
    """50 questions with a chance of their own each, ten draws: coverage of the true best of K over 200 suites."""
    chance = np.random.default_rng(0)
    a, b, draws = 0.4, 1.6, 10
    attack = AppliedAttack("x", draws, False, draws)
    held = dict.fromkeys(attack.conditions, 0)
    for _ in range(200):
        hits = chance.random((50, draws)) < chance.beta(a, b, 50)[:, None]
        rows = judged([["harmful" if hit else "refused" for hit in own] for own in hits])
        for condition in attack.conditions:
            low, high = metrics.best_of(rows, attack, condition, "harmful")["ci95"]
            k = condition.shots  # E[1 − (1 − p)^k] of a beta distribution
            truth = 1 - math.exp(math.lgamma(b + k) + math.lgamma(a + b) - math.lgamma(b) - math.lgamma(a + b + k))
            held[condition] += low <= truth <= high
    assert all(count >= 180 for count in held.values()), held


# ---------------------------------------------------------------------------------------------- a whole suite


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("sampling") / "run"
    runner.evaluate(recipe(toy, run))
    return run


def answers(run: Path) -> dict[str, dict]:
    lines = [line for file in (run / "evals/s/rows").iterdir() for line in file.read_bytes().splitlines(keepends=True)]
    return {row["key"]: row for row in (state.parse("row", line, "") for line in lines)}


def test_a_suite_that_is_resumed_with_another_batch_draws_the_same(toy, finished, tmp_path):
    before = answers(finished)
    assert len(before) == 5 * (1 + 4 + 6)
    shutil.copytree(finished, tmp_path / "run")
    (file,) = (tmp_path / "run/evals/s/rows").iterdir()
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:20]))
    (tmp_path / "run/evals/s/metrics.json").unlink()
    runner.evaluate(recipe(toy, tmp_path / "run", "generation.batch_size=3"))
    assert answers(tmp_path / "run") == before
    assert results.read(tmp_path / "run/evals/s") == results.read(finished / "evals/s")


def test_a_row_says_how_it_was_drawn_and_another_seed_is_another_suite(toy, finished):
    rows = list(answers(finished).values())
    draws = [row["draw"] for row in rows if row["attack"] == "drawn"]
    assert {(d["temperature"], d["top_p"]) for d in draws} == {(2.0, 0.95)}
    assert len({d["seed"] for d in draws}) == len(draws) == 20
    assert all("draw" not in row for row in rows if row["attack"] == "clean")
    with pytest.raises(ConfigError, match=r"attacks\.drawn\.seed: 6 here, 5 there"):
        runner.evaluate(recipe(toy, finished, "sets.unsafe.attacks.drawn.seed=6"))


def test_the_report_has_success_against_draws(finished, tmp_path):
    summary = report.report({"m": finished}, tmp_path / "out")
    curves = {curve["attack"]: curve for curve in summary["budgets"]}
    assert [p["answers"] for p in curves["drawn"]["points"]] == [1, 2, 4]
    assert [(p["answers"], p["draws"]) for p in curves["so_drawn"]["points"]] == [(2, 1), (4, 2), (6, 3)]
    own = results.read(finished / "evals/s")["judges"]["keyword"]["entry"]["asr"]
    for name, curve in curves.items():
        assert curve["n"] == 5
        for point in curve["points"]:
            leaf = own[str(Condition(name, point["answers"]))]
            assert (point["rate"], point["ci95"]) == (leaf["rate"], leaf["ci95"])
    assert json.loads((tmp_path / "out/summary.json").read_text())["budgets"] == summary["budgets"]
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("Attack success rate against draws") == 2 * 2  # heading and description of each figure


def test_a_sweeps_frontier_counts_draws_as_the_suite_does(finished):
    [run] = load.read({"m": finished}, "s")
    conditions = [key for key in run.rates("asr") if key != "clean"]
    assert conditions == ["drawn_k1", "drawn_k2", "drawn_k4", "so_drawn_k2", "so_drawn_k4", "so_drawn_k6"]
    for key in conditions:
        own, unjudged = measures.values(run, Place("asr", "s", "unsafe", key))
        assert sum(own.values()) / len(own) == pytest.approx(run.rates("asr")[key]["rate"])
        assert not unjudged


def test_samples_of_a_file_are_never_drawn(tmp_path):
    one = replace(sample(), draw=Draw(1.0, 1.0, 1))
    formats.samples.write_samples(tmp_path / "x.jsonl", [one])
    assert "draw" not in json.loads((tmp_path / "x.jsonl").read_text())
    (read,) = sources.read(formats.source("samples", str(tmp_path / "x.jsonl"))).samples
    assert read.draw is None
