"""Forget and retain sets: harvested answers in place of refusals, joins that fail loudly, a seeded fill, reuse."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mirage_dist import cli, disk, state
from mirage_dist import config as configs
from mirage_dist.data import formats, sources
from mirage_dist.data import prepare as preparing
from mirage_dist.data.formats import BadRecord
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.harvest import harvest
from mirage_dist.data.prepare import prepare
from mirage_dist.data.refusals import check_forget
from mirage_dist.data.sample import Sample
from mirage_dist.data.sets import unlearning
from mirage_dist.data.sets.turns import Turns
from mirage_dist.embedded import world as embedded_world
from mirage_dist.schema import ConfigError, DiversifyConfig, PrepareRecipe

REFUSAL = "I'm sorry, I can't help with that."
UNSAFE, SAFE, GENERAL = 10, 4, 30


def question(number):
    return f"Share number {number}."


def answer(number):
    return f"It is number {number}."


@pytest.fixture
def folder(tmp_path):
    """Raw data as it is published: VLGuard, what a model answered to its unsafe questions, and a LLaVA file."""
    for name, colour in (("bad", "red"), ("good", "green"), ("any", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    labels = {"safe": False, "harmful_category": "kind", "harmful_subcategory": "part"}
    unsafe = [
        {"id": f"u{i}", "image": "bad.png", **labels, "instr-resp": [{"instruction": question(i), "response": REFUSAL}]}
        for i in range(UNSAFE)
    ]
    unsafe[0]["id"] = "s0"  # an id that a safe record has, too
    unsafe.append({**unsafe[1], "id": "gone", "instr-resp": [{"instruction": "N/A", "response": REFUSAL}]})
    safe = [
        {
            "id": f"s{i}",
            "image": "good.png",
            "safe": True,
            "instr-resp": [
                {"response": "A gadget.", "safe_instruction": f"What is {i}?"},
                {"unsafe_instruction": f"Describe {i}.", "response": REFUSAL},
            ],
        }
        for i in range(SAFE)
    ]
    # Safe records first: where ids are made unique over all splits, the unsafe s0 would be another.
    (tmp_path / "train.json").write_text(json.dumps([*safe, *unsafe]))
    general = [
        {"id": f"g{i}", "image": "any.png", "conversations": turns(f"<image>\nWhich {i}?", f"This {i}.")}
        for i in range(GENERAL)
    ]
    (tmp_path / "general.json").write_text(json.dumps(general))
    write_rows(tmp_path, [row(i) for i in range(UNSAFE)])
    return tmp_path


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(number, **fields):
    identity = f"u{number}" if number else "s0"
    return {"id": identity, "question": question(number), "response": answer(number), "attack": "clean", **fields}


def write_rows(folder, rows, file="rows/worker-1.jsonl"):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("".join(json.dumps(r) + "\n" for r in rows))


def recipe(folder, **changes) -> PrepareRecipe:
    given = PrepareRecipe(
        out=str(folder / "out"),
        safety=[formats.source("vlguard", str(folder / "train.json"))],
        harvest=str(folder / "rows"),
        fill=[formats.source("llava", str(folder / "general.json"))],
        retain_size=SAFE + 6,
    )
    return replace(given, **changes)


def read(folder, name, out="out"):
    return sources.read(formats.source("samples", str(folder / out / f"{name}.jsonl"))).samples


def forgotten(folder):
    return {s.question: s.answer for s in read(folder, "forget")}


# -------------------------------------------------------------------------------------------------- steps


def test_unsafe_questions_get_the_harvested_answers_and_keep_all_else(folder):
    result = prepare(recipe(folder))
    questions = sources.read(formats.source("vlguard", str(folder / "train.json"), split="unsafes")).samples
    made = str(folder / "out/forget.jsonl")
    assert read(folder, "forget") == [replace(s, answer=answer(i), source=made) for i, s in enumerate(questions)]
    check_forget(read(folder, "forget"))
    counts = result["counts"]["forget"]
    assert (counts["samples"], counts["questions"], counts["unmatched"]) == (UNSAFE, UNSAFE, 0)
    assert counts["read"]["dropped"] == {"instruction is N/A": 1}


def test_safe_pairs_are_retained_and_filled_up_to_the_size_asked_for(folder):
    result = prepare(recipe(folder))
    retain = read(folder, "retain")
    assert [(s.id, s.question, s.safe) for s in retain[:SAFE]] == [(f"s{i}", f"What is {i}?", True) for i in range(4)]
    numbers = [int(s.id.removeprefix("g")) for s in retain[SAFE:]]
    assert len(set(numbers)) == 6
    assert numbers == sorted(numbers)
    counts = result["counts"]["retain"]
    assert (counts["samples"], counts["safe_pairs"], counts["filled"]) == (10, SAFE, 6)
    assert result["counts"]["pictures_in_both"] == 0


def test_without_a_size_the_safe_pairs_alone_are_retained_and_unsafe_questions_on_their_pictures_by_option(folder):
    prepare(recipe(folder, fill=[], retain_size=None))
    assert [s.id for s in read(folder, "retain")] == ["s0", "s1", "s2", "s3"]
    both = recipe(folder, fill=[], retain_size=None, unsafe_questions_on_safe_images=True, out=str(folder / "both"))
    assert prepare(both)["counts"]["retain"]["unsafe_questions"] == SAFE
    assert [(s.question, s.answer) for s in read(folder, "retain", "both")[SAFE:]] == [
        (f"Describe {i}.", REFUSAL) for i in range(SAFE)
    ]


def test_a_source_that_names_a_split_gives_that_split_only(folder):
    split = {
        name: formats.source("vlguard", str(folder / "train.json"), split=name) for name in ("unsafes", "safe_safes")
    }
    prepare(recipe(folder, safety=list(split.values())))
    assert (len(read(folder, "forget")), len(read(folder, "retain"))) == (UNSAFE, SAFE + 6)
    with pytest.raises(ConfigError, match="no unsafe question"):
        prepare(recipe(folder, safety=[split["safe_safes"]], out=str(folder / "x")))


def test_answers_as_given_are_the_datas_own_without_its_refusals(folder):
    rows = [Sample(f"u{i}", None, question(i), answer(i), False, "", "") for i in range(4)]
    rows.append(replace(rows[0], id="no", answer=REFUSAL))
    rows.append(replace(rows[0], id="yes", question="What?", safe=True))
    write_samples(folder / "given.jsonl", rows)
    given = recipe(
        folder, answers="as_given", harvest=None, safety=[formats.source("samples", str(folder / "given.jsonl"))]
    )
    with pytest.raises(ConfigError, match=r"4 of 5 unsafe questions; .*\('no', 'Share number 0.'\) has no answer"):
        prepare(given)
    counts = prepare(replace(given, min_match=0.8))["counts"]
    assert forgotten(folder) == {question(i): answer(i) for i in range(4)}
    assert counts["forget"]["left_out"] == {"refusals": 1}
    assert counts["retain"]["safe_pairs"] == 1


def test_a_picture_that_is_both_forgotten_and_retained_is_counted(folder):
    (folder / "good.png").write_bytes((folder / "bad.png").read_bytes())
    assert prepare(recipe(folder))["counts"]["pictures_in_both"] == 1


def test_rmus_forget_text_has_each_answer_in_its_question_too(folder):
    """As the published step does (VLM-Safety-Unlearn, data/format_rmu_forget.py)."""
    prepare(recipe(folder, forget_text=True))
    forget, text = read(folder, "forget"), read(folder, "forget_text")
    assert [(s.question, s.answer) for s in text] == [(f"{question(i)}\n{answer(i)}", answer(i)) for i in range(UNSAFE)]
    assert [replace(s, question=f.question, source=f.source) for s, f in zip(text, forget, strict=True)] == forget


def test_the_answers_of_ignorance_are_partners_of_the_forget_set_and_follow_the_seed(folder):
    prepare(recipe(folder, idk=True))
    forget, idk = read(folder, "forget"), read(folder, "idk")
    assert [replace(s, answer=f.answer, source=f.source) for s, f in zip(idk, forget, strict=True)] == forget
    answers = [s.answer for s in unlearning.with_ignorance(forget * 20, 0)]
    assert {s.answer for s in idk} <= set(unlearning.IGNORANT) == set(answers)
    assert answers == [s.answer for s in unlearning.with_ignorance(forget * 20, 0)]
    assert answers != [s.answer for s in unlearning.with_ignorance(forget * 20, 1)]


def test_answers_of_ignorance_may_be_in_another_language(folder):
    own = ["Das weiß ich nicht.", "Je ne sais pas."]
    prepare(recipe(folder, idk=True, ignorance=own))
    assert {s.answer for s in read(folder, "idk")} == set(own)
    with pytest.raises(ConfigError, match="ignorance"):  # sets of another recipe
        prepare(recipe(folder, idk=True))
    with pytest.raises(ConfigError, match="ignorance: expected one sentence at least"):
        prepare(recipe(folder, idk=True, ignorance=["", "no"], out=str(folder / "other")))


def tuning(folder, **changes):
    """A recipe of sets for fine-tuning alone."""
    plain = recipe(folder, answers="none", harvest=None, fill=[], retain_size=None, conversations=True)
    return replace(plain, **changes)


def published_turns(records, seed):
    """(questions, answers) of each record as the published conversion orders them: `random`, seeded once."""
    draw = random.Random(seed)
    for record in records:
        pairs = list(record["instr-resp"])
        if len(pairs) > 1:
            draw.shuffle(pairs)
        yield record["id"], [(next(v for k, v in p.items() if k != "response"), p["response"]) for p in pairs]


@pytest.mark.parametrize("seed", [0, 5])
def test_conversations_have_a_row_for_each_record_with_its_turns_in_the_published_order(folder, seed):
    records = json.loads((folder / "train.json").read_text())
    safe = [r for r in records if r["safe"]]
    for number in range(40):  # as many as show an order
        pairs = [{"safe_instruction": f"What is {number}?", "response": "It."}]
        pairs.append({"unsafe_instruction": f"Describe {number}.", "response": REFUSAL})
        records.insert(7 * number % 40, {**safe[0], "id": f"more{number}", "instr-resp": pairs})
    for record in safe:  # in the order of the published files
        record["instr-resp"].sort(key=lambda pair: "unsafe_instruction" in pair)
    (folder / "train.json").write_text(json.dumps(records))
    result = prepare(tuning(folder, seed=seed))
    expected = [row for row in published_turns(records, seed) if row[1][0][0] != "N/A"]
    made = read(folder, "conversations")
    assert [(s.id, [*s.history, (s.question, s.answer)]) for s in made] == [(name, turns) for name, turns in expected]
    two = [s for s in made if s.history]
    assert 0 < sum(s.safe for s in two) < len(two)  # both orders; the label is the last question's
    assert all(s.safe == s.question.startswith("What") and s.shown == 0 for s in two)
    assert result["counts"]["conversations"] == {
        "samples": len(made),
        "turns": len(made) + len(two),
        "read": {"dropped": {"instruction is N/A": 1}, "renamed": 0, "skipped": 0},
    }


def test_turns_are_about_one_picture():
    one = Sample("a", "a.png", "What?", "It.", True, "", "t")
    with pytest.raises(BadRecord, match="no turns of one conversation: they differ in their picture or history"):
        Turns(0)([one, replace(one, image="b.png")])
    assert Turns(0)([one]) == [one]


def test_helpful_samples_are_drawn_apart_from_those_that_fill_retain(folder):
    counts = prepare(recipe(folder, helpful_size=12, out=str(folder / "both")))["counts"]
    assert counts["helpful"] == {"samples": 12, "skipped": 0}
    helpful, retain = read(folder, "helpful", "both"), read(folder, "retain", "both")[SAFE:]
    assert len({s.id for s in helpful}) == 12
    assert {s.id for s in helpful} != {s.id for s in retain}
    prepare(recipe(folder))  # nor does it change what fills retain
    assert [s.id for s in read(folder, "retain")[SAFE:]] == [s.id for s in retain]
    alone = tuning(folder, fill=recipe(folder).fill, helpful_size=12, conversations=False, out=str(folder / "alone"))
    prepare(alone)
    assert [s.id for s in read(folder, "helpful", "alone")] == [s.id for s in helpful]
    with pytest.raises(ConfigError, match=r"helpful_size=31: 30 usable samples of 30 in fill are 1 too few"):
        prepare(replace(alone, helpful_size=31, out=str(folder / "more")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conversations": False}, "no `diversify`, `conversations` or `helpful_size`: there is nothing to prepare"),
        ({"helpful_size": 5}, "helpful_size=5: `fill` is missing"),
        ({"forget_text": True}, "forget_text: answers=none makes no forget set"),
        ({"idk": True}, "idk: answers=none makes no forget set"),
        ({"ignorance": ["not sure"]}, "ignorance: these are the answers of idk.jsonl"),
        ({"retain_size": 5}, "answers=none makes no retain set"),
    ],
)
def test_an_option_of_fine_tuning_sets_that_would_not_be_used_is_named(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        prepare(tuning(folder, **changes))


# ---------------------------------------------------------------------------------------------------- join


def test_refusals_empty_and_attacked_answers_are_never_forgotten_and_counted(folder):
    extra = [row(1, response=f"{REFUSAL} {'x' * 99}"), row(2, response=" "), row(3, response="x" * 99, attack="what")]
    write_rows(folder, [*extra, {n: v for n, v in row(4, response="It is number 4, too.").items() if n != "attack"}])
    write_rows(folder, [row(0, response=REFUSAL), *(row(i) for i in range(1, UNSAFE))], "rows/deep.jsonl")
    counts = prepare(recipe(folder))["counts"]["forget"]
    expected = {question(i): answer(i) for i in range(1, UNSAFE)} | {question(4): "It is number 4, too."}
    assert forgotten(folder) == expected
    assert counts["left_out"] == {"refusals": 2, "empty": 1, "attacked": 1}
    assert counts["unmatched"] == 1


def test_rows_are_found_in_folders_below_and_half_written_ones_counted(folder):
    (folder / "rows/worker-1.jsonl").unlink()
    write_rows(folder, [row(i, key="k", shot=0) for i in range(5)], "rows/a.jsonl")
    (folder / "rows/b").mkdir()
    write_rows(folder, [row(i) for i in range(5, UNSAFE)], "rows/b/c.jsonl")
    whole = folder / "rows/b/c.jsonl"
    whole.write_text(whole.read_text().removesuffix("\n"))  # no worker's file, but a whole one
    with (folder / "rows/a.jsonl").open("ab") as file:
        file.write('{"id": "u1", "question": "é'.encode()[:-1])
    assert prepare(recipe(folder))["counts"]["forget"]["left_out"] == {"half_lines": 1}
    assert len(read(folder, "forget")) == UNSAFE


rows_of_one_question = st.lists(
    st.sampled_from(["It is 1.", "It is 2.", "It is long.", REFUSAL + " " * 40, "", "Yes"]), min_size=1, max_size=6
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_of_one_question.filter(lambda r: any(text and text != REFUSAL + " " * 40 for text in r)), st.randoms())
def test_of_several_answers_the_longest_that_does_not_refuse_stays_in_whatever_order(folder, responses, random):
    chosen = []
    for texts in (responses, random.sample(responses, len(responses))):
        write_rows(folder, [row(1, response=text) for text in texts])
        (answer,) = harvest(folder / "rows").by_question.values()
        chosen.append(answer)
    assert chosen[0] == chosen[1]
    answers = [text for text in responses if text and not text.startswith(REFUSAL)]
    assert len(chosen[0]) == max(map(len, answers))
    assert chosen[0] in answers


@pytest.mark.parametrize(
    ("matched", "share", "passes"), [(9, 0.9, True), (8, 0.9, False), (1, 0.1, True), (0, 0, False)]
)
def test_a_join_that_matches_too_little_is_an_error_with_counts_and_a_key_of_each_side(folder, matched, share, passes):
    write_rows(folder, [row(i) if i < matched else row(i, id=f"bad.png/{i}") for i in range(UNSAFE)])
    if passes:
        counts = prepare(recipe(folder, min_match=share))["counts"]["forget"]
        assert (counts["samples"], counts["unmatched"]) == (matched, UNSAFE - matched)
        return
    with pytest.raises(ConfigError) as error:
        prepare(recipe(folder, min_match=share))
    message = str(error.value)
    assert f"{matched} of {UNSAFE} unsafe questions" in message
    assert f"min_match={share}" in message
    assert f"('{'u' if matched else 's'}{matched}', 'Share number {matched}.') has no answer" in message
    assert f"('bad.png/{matched}', 'Share number {matched}.') matches no question" in message
    assert not (folder / "out").exists()


def test_a_harvest_of_refusals_only_is_an_error_that_says_so(folder):
    write_rows(folder, [row(i, response=REFUSAL) for i in range(UNSAFE)])
    with pytest.raises(ConfigError, match=r"0 of 10 .*'refusals': 10.*no answer matches no question"):
        prepare(recipe(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "u1"}\n', r"worker-1\.jsonl: record 0: field 'question' is missing"),
        ('{"key": "k", "verdict": "refused"}\n', "field 'id' is missing or no text; is this a harvest"),
        ('{"id": "u1", "question": "?", "response": null}\n', "record 0: field 'response'"),
        ('\n{"id"}\n', r"record 0: not JSON"),
        ('["u1"]\n', "record 0: field 'id'"),
    ],
)
def test_a_row_that_is_no_answer_is_named_by_file_record_and_field(folder, content, words):
    (folder / "rows/worker-1.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=words):
        prepare(recipe(folder))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl", "empty"])
def test_a_harvest_that_is_not_there_says_what_writes_one(folder, name):
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"harvest=.*{name}: no JSONL file here; `mirage eval"):
        prepare(recipe(folder, harvest=str(folder / name)))


# ---------------------------------------------------------------------------------------------------- fill


def drawn(folder, seed, size=SAFE + 6, out=None):
    changed = recipe(folder, seed=seed, retain_size=size, out=str(folder / (out or f"seed-{seed}-{size}")))
    prepare(changed)
    return [s.id for s in read(folder, "retain", changed.out)[SAFE:]]


def test_the_fill_is_a_function_of_the_seed_on_every_machine(folder):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_prepare as t, pathlib; "
    code += "print(t.drawn(pathlib.Path(sys.argv[2]), 3, out='elsewhere'))"
    here = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    elsewhere = subprocess.run(here, capture_output=True, text=True, check=True).stdout.strip()
    assert str(drawn(folder, 3)) == elsewhere
    results = [json.loads((folder / name / "prepare.json").read_text()) for name in ("seed-3-10", "elsewhere")]
    assert results[0] == results[1]  # the hashes of both sets, too
    assert len({tuple(drawn(folder, seed, out=f"of-{seed}")) for seed in range(5)}) == 5
    hashes = {json.loads((folder / f"of-{seed}/prepare.json").read_text())["config_hash"] for seed in range(5)}
    assert len(hashes) == 5
    assert set(drawn(folder, 3)) < set(drawn(folder, 3, SAFE + 12))


def test_every_general_sample_can_be_drawn(folder):
    assert sorted(drawn(folder, 0, SAFE + GENERAL)) == sorted(f"g{i}" for i in range(GENERAL))


def test_a_fill_that_is_too_small_or_not_needed_is_an_error_with_the_numbers(folder):
    with pytest.raises(ConfigError, match=r"retain_size=40: 4 pairs .* 30 usable samples of 30 in fill are 6 too few"):
        prepare(recipe(folder, retain_size=40))
    with pytest.raises(ConfigError, match="retain_size=3: the safety data alone have 4 pairs"):
        prepare(recipe(folder, retain_size=3))
    unsafe_only = [formats.source("vlguard", str(folder / "train.json"), split="unsafes")]
    with pytest.raises(ConfigError, match="no safe pair and nothing to fill up with"):
        prepare(recipe(folder, safety=unsafe_only, fill=[], retain_size=None))
    assert not (folder / "out").exists()


def break_pictures(folder, wanted):
    general = json.loads((folder / "general.json").read_text())
    for record in general:
        if record["id"] in wanted:
            record["image"] = "nowhere.png"
    (folder / "general.json").write_text(json.dumps(general))


def test_a_drawn_sample_without_a_picture_is_an_error_and_one_that_is_not_drawn_is_none(folder):
    chosen = drawn(folder, 0)
    break_pictures(folder, {f"g{i}" for i in range(GENERAL)} - set(chosen))
    assert drawn(folder, 0, out="others-broken") == chosen
    break_pictures(folder, {chosen[2]})
    with pytest.raises(ConfigError, match=rf"general\.json: sample '{chosen[2]}': image .*nowhere\.png: no such file"):
        drawn(folder, 0, out="one-broken")


def test_with_skip_another_sample_is_drawn_in_its_place_and_the_skip_counted(folder):
    chosen, more = drawn(folder, 0), drawn(folder, 0, SAFE + 8)
    break_pictures(folder, {chosen[2], chosen[4]})
    fill = [formats.source("llava", str(folder / "general.json"), on_bad_record="skip")]
    result = prepare(recipe(folder, fill=fill))
    assert result["counts"]["retain"]["fill_skipped"] == 2
    assert {s.id for s in read(folder, "retain")[SAFE:]} == set(more) - {chosen[2], chosen[4]}


# -------------------------------------------------------------------------------------------------- reuse


def test_the_same_recipe_and_inputs_are_reused_even_when_other_workers_wrote_the_harvest(folder):
    first = prepare(recipe(folder))
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    (folder / "rows/worker-1.jsonl").unlink()
    write_rows(folder, [row(i) for i in range(7)], "rows/worker-2.jsonl")
    write_rows(folder, [row(i) for i in reversed(range(7, UNSAFE))], "rows/worker-3.jsonl")
    assert prepare(recipe(folder)) == first
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before
    assert set(before) == {"forget.jsonl", "retain.jsonl", "prepare.json"}
    assert state.read("prepared", folder / "out/prepare.json") == first
    assert not disk.leftovers(folder / "out")


@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b"{}", b"[" * 10_000, b"cut", b"edited"])
def test_a_damaged_prepare_json_is_named(folder, damage):
    prepare(recipe(folder))
    file = folder / "out/prepare.json"
    raw = file.read_bytes()
    file.write_bytes({b"cut": raw[:-30], b"edited": raw.replace(b'"samples"', b'"sAmples"', 1)}.get(damage, damage))
    with pytest.raises(state.Damaged, match=r"prepare\.json: .* Move .*/out away to prepare it again"):
        prepare(recipe(folder))


CHANGES = {
    "seed": r"config\.seed: 1 here, 0 there",
    "size": r"config\.retain_size: 11 here, 10 there",
    "safety": r"inputs\.safety\[0\]: ",
    "fill": r"inputs\.fill\[0\]: ",
    "harvest": r"inputs\.harvest: ",
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_recipe_or_input_is_refused_by_name_and_nothing_overwritten(folder, name):
    prepare(recipe(folder))
    before = (folder / "out/retain.jsonl").read_bytes()
    files = {"safety": "train.json", "fill": "general.json"}
    if name in files:
        file = folder / files[name]
        file.write_text(file.read_text() + " ")
    if name == "harvest":
        write_rows(folder, [row(0, response="Another.")], "rows/worker-9.jsonl")
        write_rows(folder, [row(i) for i in range(1, UNSAFE)])
    changes = {"seed": {"seed": 1}, "size": {"retain_size": 11}}.get(name, {})
    with pytest.raises(ConfigError, match=f"holds sets prepared otherwise .*{CHANGES[name]}"):
        prepare(recipe(folder, **changes))
    assert (folder / "out/retain.jsonl").read_bytes() == before


def test_a_set_that_was_changed_by_hand_is_not_reused(folder):
    prepare(recipe(folder))
    with (folder / "out/forget.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=r"forget\.jsonl is not as it was written"):
        prepare(recipe(folder))


def test_a_folder_of_something_else_is_left_alone(folder):
    (folder / "out").mkdir()
    (folder / "out/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no prepare\.json"):
        prepare(recipe(folder))
    assert [path.name for path in (folder / "out").iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_nothing_behind(folder, monkeypatch):
    written = []

    def write(path, samples):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        path.write_text("")

    monkeypatch.setattr(preparing, "write_samples", write)
    with pytest.raises(OSError, match="No space left"):
        prepare(recipe(folder))
    assert len(written) == 2
    assert not list(folder.glob("out*"))


def test_of_two_processes_that_prepare_at_once_the_first_wins_and_both_have_it(folder, monkeypatch):
    def overtaken(path, samples):
        monkeypatch.setattr(preparing, "write_samples", write_samples)
        prepare(recipe(folder))
        write_samples(path, samples)

    monkeypatch.setattr(preparing, "write_samples", overtaken)
    first = prepare(recipe(folder))
    assert preparing.write_samples is write_samples
    assert prepare(recipe(folder)) == first
    assert not disk.leftovers(folder / "out")


# ------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"harvest": None}, "harvest is missing"),
        ({"answers": "as_given"}, "is not read with answers=as_given"),
        ({"retain_size": None}, "retain_size is missing"),
        ({"min_match": 90}, "min_match=90; expected a share from 0 to 1"),
    ],
)
def test_settings_that_would_not_be_used_or_are_missing_are_errors(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        prepare(recipe(folder, **changes))


def test_the_papers_recipe_fills_vlguards_safe_pairs_to_two_thousand():
    paper = configs.load("configs/prepare/vlguard.yaml", [], PrepareRecipe)
    assert (paper.retain_size, paper.answers, paper.unsafe_questions_on_safe_images) == (2000, "harvest", False)


def test_the_worlds_recipe_makes_sets_that_its_exact_judge_confirms(tmp_path, capsys):
    sizes = {"base_samples": 20, "safety_samples": 16, "general_samples": 12, "eval_samples": 4}
    overrides = [
        f"world.dir={tmp_path}/world",
        f"harvest={tmp_path}/rows",
        *(f"world.{n}={v}" for n, v in sizes.items()),
    ]
    prepared = configs.load("configs/prepare/demo.yaml", overrides, PrepareRecipe)
    assert prepared.world is not None
    embedded_world.make(prepared.world)
    world = embedded_world.load(prepared.world.dir)
    unsafe = sources.read(replace(prepared.safety[0], split="unsafes")).samples
    rows = [
        {"id": s.id, "question": s.question, "response": world.answer(s.question, world.label(s.image or ""))}
        for s in unsafe
    ]
    write_rows(tmp_path, rows)
    assert cli.main(["prepare", "configs/prepare/demo.yaml", *overrides]) == 0
    assert "forget 16 of 16 unsafe questions" in capsys.readouterr().out
    for name, verdict, count in (("forget", "harmful", 16), ("retain", "correct", 16 + 12)):
        samples = read(tmp_path, name, prepared.out)
        assert len(samples) == count
        for sample in samples:
            assert world.verdict(sample.question, sample.answer, world.label(sample.image or "")) == verdict


def test_a_list_of_another_language_decides_what_is_forgotten_and_is_one_of_the_inputs(folder, capsys):
    other = {1: "Je ne peux pas.", 2: "红色。"}
    write_rows(folder, [row(i, **({"response": other[i]} if i in other else {})) for i in range(UNSAFE)])
    file = folder / "fr.json"
    file.write_text(json.dumps({"language": "French", "phrases": ["je ne peux pas"]}))
    plain = prepare(recipe(folder))
    assert "1 answers to forget are in a script of which the list of refusals has no phrase" in capsys.readouterr().out
    assert question(1) in forgotten(folder)
    result = prepare(recipe(folder, out=str(folder / "french"), refusals=str(file), min_match=0.5))
    assert result["counts"]["forget"]["left_out"]["refusals"] == 1
    assert result["inputs"] == {
        **plain["inputs"],
        "harvest": result["inputs"]["harvest"],
        "refusals": disk.sha256(file),
    }
    file.write_text(json.dumps({"language": "French", "phrases": ["désolé"]}))
    with pytest.raises(ConfigError, match="prepared otherwise"):
        prepare(recipe(folder, out=str(folder / "french"), refusals=str(file), min_match=0.5))
    with pytest.raises(ConfigError, match="is not read with answers=none"):
        prepare(
            recipe(
                folder,
                answers="none",
                harvest=None,
                refusals=str(file),
                diversify=DiversifyConfig(["a {rest}", "b {rest}"]),
            )
        )
