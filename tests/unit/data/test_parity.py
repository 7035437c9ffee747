"""On look-alikes of VLGuard's published files, readers, attack files and keyword tests count what is published."""

import json
import random
from collections import Counter
from pathlib import Path

import lookalike
import pytest
from lookalike import MISSING, NO_QUESTION, SHARED, TEST, TRAIN, UNCHANGED

from mirage_dist import config as configs
from mirage_dist.data import formats, gold, pictures, sources
from mirage_dist.evals import attacks, rows, runner
from mirage_dist.evals.judges import parity
from mirage_dist.schema import ConfigError, EvalRecipe


@pytest.fixture(scope="module")
def vlguard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlguard")
    lookalike.write(folder)
    return folder


def read(folder: Path, name: str, split: str = "all") -> sources.Source:
    return sources.read(formats.source("vlguard", str(folder / f"{name}.json"), str(folder / name), split=split))


@pytest.mark.parametrize(("split", "count"), [("unsafes", 442), ("safe_safes", 558), ("safe_unsafes", 558)])
def test_the_test_split_has_the_published_counts(vlguard, split, count):
    source = read(vlguard, "test", split)
    assert len(source.samples) == count
    assert (source.dropped, source.renamed, source.skipped) == ({}, 0, 0)


def test_the_training_split_has_its_traps_and_each_is_counted(vlguard):
    records = json.loads((vlguard / "train.json").read_text())
    assert Counter(record["safe"] for record in records) == {False: 1023, True: 977}
    source = read(vlguard, "train")
    assert source.dropped == {f"{name} is N/A": n for name, n in NO_QUESTION.items()}
    assert source.dropped.total() == 14
    assert source.renamed == 1
    assert len(source.samples) + 14 == TRAIN["unsafe"] + 2 * TRAIN["safe"]
    assert len({(s.id, s.safe) for s in source.samples}) == len(source.samples)
    assert "tu100#2" in {s.id for s in source.samples}


def test_pictures_that_both_splits_have_are_known(vlguard):
    records = {name: json.loads((vlguard / f"{name}.json").read_text()) for name in ("train", "test")}
    assert len({r["image"] for r in records["train"]} & {r["image"] for r in records["test"]}) == SHARED == 8
    train, test = ([sample.image for sample in read(vlguard, name).samples] for name in ("train", "test"))
    assert pictures.shared(train, test) == {str(vlguard / f"train/bad/{i}.png") for i in range(SHARED)}


def recipe(folder: Path, *overrides: str) -> EvalRecipe:
    sets = [
        f"sets.{name}.sources=[{{format: vlguard, path: {folder}/test.json, images: {folder}/test, split: {name}}}]"
        for name in ("unsafes", "safe_safes")
    ]
    files = [
        f"sets.unsafes.attacks.what.path={folder}/attacks/what.json",
        f"sets.safe_safes.attacks.share.path={folder}/attacks/share.json",
    ]
    return configs.load("configs/eval/vlguard_attacked.yaml", [*sets, *files, *overrides], EvalRecipe)


def test_the_attack_files_meet_their_sets_as_published(vlguard, capsys):
    work = rows.plan(recipe(vlguard))
    assert rows.by_condition(work.asks) == {
        "unsafes": {"clean": 442, "what": 1326},
        "safe_safes": {"clean": 558, "share": 556},
    }
    what, share = work.coverage["unsafes"]["what"], work.coverage["safe_safes"]["share"]
    assert (what.asked, what.without, what.unknown, what.unchanged) == (442, [], [], 0)
    assert (share.asked, len(share.without), share.unknown, share.unchanged) == (556, MISSING, [], UNCHANGED)
    report = rows.coverage_report(work)["safe_safes"]["attacks"]["share"]
    assert report["samples_without_rewrites"] == {"count": 2, "first": ["s556", "s557"]}
    assert report["unchanged_rewrites"] == 17
    runner._tell(recipe(vlguard), work)
    output = capsys.readouterr().out
    assert "share on safe_safes: 2 samples without rewrites" in output
    assert "17 rewrites equal to the question" in output


def test_what_a_reader_leaves_out_is_printed_and_in_the_manifest(vlguard, capsys):
    """VLGuard's training questions as a set, as a harvest asks them."""
    source = f"[{{format: vlguard, path: {vlguard}/train.json, images: {vlguard}/train, split: unsafes}}]"
    harvest = configs.load("configs/eval/harvest.yaml", [f"sets.forget.sources={source}"], EvalRecipe)
    work = rows.plan(harvest)
    report = rows.coverage_report(work)["forget"]
    left = {"instruction is N/A": NO_QUESTION["instruction"]}
    assert report["samples"] == TRAIN["unsafe"] - NO_QUESTION["instruction"]
    assert (report["skipped_records"], report["dropped"], report["renamed"]) == (0, left, 1)
    runner._tell(harvest, work)
    assert (
        "forget: 1017 questions; left out or changed: instruction is N/A × 6, ids renamed × 1"
        in capsys.readouterr().out
    )


def test_rewrites_are_joined_by_id_whatever_the_order_of_the_file(vlguard, tmp_path):
    """Sampling or shuffling must not break the groups of three."""
    shuffled = lookalike.what_rows()
    random.Random(0).shuffle(shuffled)
    (tmp_path / "what.json").write_text(json.dumps(shuffled))
    samples = read(vlguard, "test", "unsafes").samples[::7]
    attack = attacks.make({"kind": "file", "path": str(tmp_path / "what.json"), "shots": 3}, "the test", "what")
    rewrites, coverage = attacks.apply(attack, samples, "what")
    for sample, own in zip(samples, rewrites, strict=True):
        number = sample.id.removeprefix("u")
        assert {r.question for r in own} == {
            f"What would {word} say of number {number}?" for word in ("one", "two", "three")
        }
    assert len(coverage.unknown) == TEST["unsafe"] - len(samples)


def test_a_file_that_lacks_more_than_it_may_is_an_error_with_counts(vlguard):
    with pytest.raises(ConfigError, match=r"1 rewrites for 556 of 558 samples; min_match asks for 100%"):
        rows.plan(recipe(vlguard, "sets.safe_safes.attacks.share.min_match=1.0"))


def test_keyword_tests_on_the_files_own_answers_err_as_published(vlguard, capsys):
    test, train = (gold.refusals(vlguard / f"{name}.json") for name in ("test", "train"))
    assert (test["safe_safes"]["published"], test["safe_safes"]["answers"]) == (4, 558)
    assert (train["unsafes"]["published"], train["unsafes"]["answers"]) == (1023, 1023)
    assert (train["safe_unsafes"]["published"], train["safe_unsafes"]["answers"]) == (811, 977)
    assert test["safe_safes"]["ours"] == 0
    assert gold.main([str(vlguard / "test.json")]) == 0
    assert "safe_safes: of 558 answers taken for refusals 0 by ours, 4 by published" in capsys.readouterr().out


def test_the_parity_judge_says_of_the_files_own_answers_what_the_list_says(vlguard):
    verdicts = Counter(
        parity.rule({"response": s.answer, "attack": "clean", "kind": "safe"})
        for s in read(vlguard, "test", "safe_safes").samples
    )
    assert verdicts == {"refused": 4, "answered": 554}


def test_answers_that_are_none_of_vlguards_are_named(vlguard, tmp_path, capsys):
    records = lookalike.test_records()[:3]
    del records[2]["instr-resp"][0]["response"]
    (tmp_path / "bad.json").write_text(json.dumps(records))
    assert gold.main([str(tmp_path / "bad.json")]) == 2
    assert "bad.json: record 2: field 'response' is missing" in capsys.readouterr().err
    assert gold.main([]) == 2
