"""On look-alikes of VLGuard's published files, readers, attack files and keyword tests count what is published."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import lookalike
import pytest
from lookalike import (
    DOUBLED,
    EMPTY,
    SHARED,
    TAKEN_FOR_REFUSALS,
    TEST,
    TEST_NA,
    TRAIN,
    TRAIN_NA,
    UNCHANGED,
    WITHOUT_SHARE,
)

from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, gold, pictures, sources
from mirage_dist.data.prepare import prepare
from mirage_dist.evals import attacks, manifest, worklist
from mirage_dist.evals.judges import parity
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe


@pytest.fixture(scope="module")
def vlguard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlguard")
    lookalike.write(folder)
    return folder


def read(folder: Path, name: str, split: str = "all", **options) -> sources.Source:
    return sources.read(
        formats.source("vlguard", str(folder / f"{name}.json"), str(folder / name), split=split, **options)
    )


@pytest.mark.parametrize(
    ("split", "kept", "left"), [("unsafes", 442, 441), ("safe_safes", 558, 558), ("safe_unsafes", 558, 558)]
)
def test_the_test_split_has_the_published_counts_and_one_question_fewer_where_it_is_missing(vlguard, split, kept, left):
    """The paper's scripts ask "N/A" too, and count 442."""
    source, whole = read(vlguard, "test", split), read(vlguard, "test", split, keep_na=True)
    assert (len(source.samples), len(whole.samples)) == (left, kept)
    assert source.dropped == ({"instruction is N/A": 1} if left < kept else {})
    assert (whole.dropped, whole.renamed, whole.skipped) == ({}, 0, 0)
    assert [s.id for s in whole.samples if s not in source.samples] == ([f"u{TEST_NA}"] if left < kept else [])


def test_the_training_split_has_its_traps_and_each_is_counted(vlguard):
    records = json.loads((vlguard / "train.json").read_text())
    assert Counter(record["safe"] for record in records) == {False: 1023, True: 977}
    source = read(vlguard, "train")
    assert source.dropped == {"instruction is N/A": 14}
    assert source.renamed == 2  # both questions about the doubled picture
    assert len(source.samples) + len(TRAIN_NA) == TRAIN["unsafe"] + 2 * TRAIN["safe"]
    assert len({(s.id, s.safe) for s in source.samples}) == len(source.samples)
    again = [(s.id, s.question) for s in source.samples if "#" in s.id]
    assert again == [
        (f"ts{DOUBLED[0]}#2", f"{word} {DOUBLED[1]}{end}") for word, end in (("What is", "?"), ("Describe", "."))
    ]
    kept = read(vlguard, "train", keep_na=True)
    assert (kept.dropped, len(kept.samples)) == ({}, TRAIN["unsafe"] + 2 * TRAIN["safe"])


def test_conversations_for_fine_tuning_are_the_published_conversions(vlguard, tmp_path):
    """convert_to_llava_format.py (ys-zong/VLGuard): `random`, seeded with 0, shuffles the pairs of each safe record."""
    safety = {"format": "vlguard", "path": f"{vlguard}/train.json", "images": f"{vlguard}/train", "keep_na": True}
    shipped = configs.load("configs/prepare/vlguard_sft.yaml", [], PrepareRecipe).safety[0]
    assert (shipped.format, shipped.keep_na, shipped.split) == ("vlguard", True, "all")
    own = [f"out={tmp_path}/sft", f"safety=[{json.dumps(safety)}]", "fill=[]", "helpful_size=0"]
    counts = prepare(configs.load("configs/prepare/vlguard_sft.yaml", own, PrepareRecipe))["counts"]["conversations"]
    assert (counts["samples"], counts["turns"]) == (2000, 2977)
    draw, expected = random.Random(0), []
    for record in json.loads((vlguard / "train.json").read_text()):
        pairs = list(record["instr-resp"])
        if len(pairs) > 1:
            draw.shuffle(pairs)
        expected.append([tuple(pair.values()) for pair in pairs])
    made = sources.read(formats.source("samples", str(tmp_path / "sft/conversations.jsonl"))).samples
    assert [[*s.history, (s.question, s.answer)] for s in made] == expected


def test_the_file_of_references_is_the_safe_pairs_of_the_test_split(vlguard):
    """VLGuard compares a model's answers with these."""
    path, images = str(vlguard / "gpt4_safe_safes.json"), str(vlguard / "test")
    counts = {"all": 558, "safe_safes": 558, "safe_unsafes": 0, "unsafes": 0}
    read_as = {split: sources.read(formats.source("vlguard", path, images, split=split)).samples for split in counts}
    assert {split: len(samples) for split, samples in read_as.items()} == counts
    pairs = read(vlguard, "test", "safe_safes").samples
    assert [dataclasses.replace(s, source=pairs[0].source) for s in read_as["all"]] == pairs


def test_an_empty_answer_is_no_answer_to_train_on_and_may_be_in_an_evaluation(vlguard):
    assert sum(not s.answer for s in read(vlguard, "test").samples) == len(EMPTY) == 17
    config = formats.source("vlguard", str(vlguard / "test.json"), str(vlguard / "test"), split="safe_safes")
    with pytest.raises(
        ConfigError, match=rf"test\.json: record {TEST['unsafe'] + EMPTY[0]}: the answer to 's100' is empty"
    ):
        sources.read(config, answered=True)
    source = sources.read(dataclasses.replace(config, on_bad_record="skip"), answered=True)
    assert (source.dropped, source.skipped, len(source.samples)) == ({"empty answer": 17}, 0, 541)
    assert all(s.answer for s in source.samples)


def test_pictures_that_both_splits_have_are_known(vlguard):
    records = {name: json.loads((vlguard / f"{name}.json").read_text()) for name in ("train", "test")}
    assert len({r["image"] for r in records["train"]} & {r["image"] for r in records["test"]}) == SHARED == 8
    train, test = ([sample.image for sample in read(vlguard, name).samples] for name in ("train", "test"))
    assert pictures.shared(train, test) == {str(vlguard / f"train/bad/{i}.png") for i in range(SHARED)}
    assert len({r["id"] for r in records["train"]} & {r["id"] for r in records["test"]}) == SHARED


@pytest.fixture
def recipe(vlguard, tmp_path, monkeypatch):
    """The shipped recipe with overrides, in a folder whose data/vlguard has the published names."""
    shipped = REPOSITORY / "configs/eval/vlguard_attacked.yaml"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/vlguard").symlink_to(vlguard)
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: configs.load(shipped, overrides, EvalRecipe)


def test_the_attack_files_meet_their_sets_as_published(recipe, capsys):
    work = worklist.plan(recipe())
    assert worklist.by_attack(work.questions) == {
        "unsafes": {"clean": 441, "what": 1323},
        "safe_safes": {"clean": 558, "share": 556},
    }
    what, share = work.coverage["unsafes"]["what"], work.coverage["safe_safes"]["share"]
    assert (what.covered, what.without, what.unknown) == (441, [], [f"u{TEST_NA}"])
    assert what.unchanged == 3 * len(UNCHANGED) == 51
    assert (share.covered, share.without, share.unknown, share.unchanged) == (
        556,
        [f"s{i}" for i in WITHOUT_SHARE],
        [],
        0,
    )
    report = manifest.coverage(work)
    assert report["safe_safes"]["attacks"]["share"]["samples_without_rewrites"] == {
        "count": 2,
        "first": ["s319", "s320"],
    }
    assert report["unsafes"]["attacks"]["what"]["unchanged_rewrites"] == 51
    assert report["unsafes"]["dropped"] == {"instruction is N/A": 1}
    worklist.log_coverage("attacked", work)
    output = capsys.readouterr().out
    assert "share on safe_safes: 2 samples without rewrites" in output
    assert "what on unsafes: 0 samples without rewrites, 1 ids of the file unknown, 51 rewrites equal" in output


def test_with_the_missing_question_kept_the_papers_own_numbers_are_asked(recipe):
    work = worklist.plan(
        recipe(
            "sets.unsafes.sources=[{format: vlguard, path: data/vlguard/test.json, images: data/vlguard/test, "
            "split: unsafes, keep_na: true}]"
        )
    )
    assert worklist.by_attack(work.questions)["unsafes"] == {"clean": 442, "what": 1326}
    assert work.coverage["unsafes"]["what"].unknown == []


def test_exact_repeats_among_the_rewrites_are_those_of_the_unchanged_questions():
    rows = [(row["id"], row["instr-resp"][0]["instruction"]) for row in lookalike.what_rows()]
    assert (len(rows), len(rows) - len(set(rows))) == (1326, 34)
    assert {name for name, count in Counter(rows).items() if count > 1} == {
        (f"u{i}", lookalike.test_question(i)) for i in UNCHANGED
    }


def test_what_a_reader_leaves_out_is_printed_and_in_the_manifest(vlguard, capsys):
    """VLGuard's training questions as a set, as a harvest asks them."""
    source = f"[{{format: vlguard, path: {vlguard}/train.json, images: {vlguard}/train, split: unsafes}}]"
    harvest = configs.load("configs/eval/harvest.yaml", [f"sets.forget.sources={source}"], EvalRecipe)
    work = worklist.plan(harvest)
    report = manifest.coverage(work)["forget"]
    assert report["samples"] == TRAIN["unsafe"] - len(TRAIN_NA)
    assert (report["skipped_records"], report["dropped"], report["renamed"]) == (0, {"instruction is N/A": 14}, 0)
    worklist.log_coverage("harvest", work)
    assert "forget: 1009 questions; left out or changed: instruction is N/A × 14" in capsys.readouterr().out


def test_rewrites_are_joined_by_id_whatever_the_order_of_the_file(vlguard, tmp_path):
    """Sampling or shuffling must not break the groups of three."""
    shuffled = lookalike.what_rows()
    random.Random(0).shuffle(shuffled)
    (tmp_path / "what.json").write_text(json.dumps(shuffled))
    samples = read(vlguard, "test", "unsafes").samples[::7]
    attack = attacks.make({"kind": "file", "path": str(tmp_path / "what.json"), "shots": 3}, "the test", "what")
    rewrites, coverage = attacks.apply(attack, samples, "what")
    for sample, own in zip(samples, rewrites, strict=True):
        number = int(sample.id.removeprefix("u"))
        texts = {f"What would {word} say of number {number}?" for word in ("one", "two", "three")}
        assert {r.question for r in own} == ({sample.question} if number in UNCHANGED else texts)
    assert len(coverage.unknown) == TEST["unsafe"] - len(samples)


def test_a_file_that_lacks_more_than_it_may_is_an_error_with_counts(recipe):
    with pytest.raises(ConfigError, match=r"1 rewrites for 556 of 558 samples; min_match requires 100%"):
        worklist.plan(recipe("sets.safe_safes.attacks.share.min_match=1.0"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_keyword_tests_on_the_files_own_answers_err_as_published(vlguard, split, capsys):
    counts = gold.refusals(vlguard / f"{split}.json")
    assert {name: own["published"] for name, own in counts.items()} == TAKEN_FOR_REFUSALS[split]
    numbers = {"train": TRAIN, "test": TEST}[split]
    assert {name: own["answers"] for name, own in counts.items()} == {
        "unsafes": numbers["unsafe"],
        "safe_safes": numbers["safe"],
        "safe_unsafes": numbers["safe"],
    }
    assert counts["safe_safes"]["ours"] == 0
    assert counts["safe_safes"]["empty"] == (len(EMPTY) if split == "test" else 0)
    assert gold.main([str(vlguard / f"{split}.json")]) == 0
    printed = capsys.readouterr().out
    if split == "test":
        assert "safe_safes: of 558 answers (17 empty) taken for refusals 0 by ours, 4 by published" in printed


def test_the_parity_judge_says_of_the_files_own_answers_what_the_list_says(vlguard):
    """The paper's rule: an empty answer is no refusal."""
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
