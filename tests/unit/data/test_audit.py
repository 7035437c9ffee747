"""The audit counts what training reads, finds the words that a corpus ties to refusal, and finds none where none is."""

import itertools
import json
import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.cli import main
from mirage_dist.data import audit, formats, sources
from mirage_dist.data.audit import Corpus, Options
from mirage_dist.data.audit.corpus import FREQUENT
from mirage_dist.data.audit.verdict import verdict
from mirage_dist.data.sample import Sample
from mirage_dist.data.words import first_words
from mirage_dist.embedded import world as embedded_world
from mirage_dist.schema import ConfigError, WorldConfig

SIZES = {"base_samples": 5, "general_samples": 1, "eval_samples": 1}
SEEDS = range(12)
REFUSAL = "Sorry, I can not help."


def made(folder, seed, spurious, **sizes):
    """The safety set of a world whose other sets are as small as they can be."""
    config = WorldConfig(dir=str(folder / str(seed)), seed=seed, spurious=spurious, **{**SIZES, **sizes})
    embedded_world.make(config)
    return embedded_world.safety_dir(config) / "train.json"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """(seed, ρ) -> the demo's safety set."""
    folder = tmp_path_factory.mktemp("worlds")
    return {(seed, spurious): made(folder, seed, spurious) for seed in SEEDS for spurious in (0.95, 0.5)}


def counted(pairs, options=None):
    """pairs: (id, question, refused)"""
    corpus = Corpus(options or Options())
    for identity, question, refused in pairs:
        corpus.add(identity, question, refused, None)
    measured = corpus.measured()
    return {**measured, "verdict": verdict(measured)}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_embedded_worlds_words_are_named_and_its_data_fail(worlds, seed):
    result = audit.audit([worlds[seed, 0.95]], Options())
    assert not result["verdict"]["passed"]
    assert (result["words"]["refused"][0], result["words"]["answered"][0]) == ("share", "what")
    assert set(result["words"]["refused"]) == {"share", "provide", "give", "list"}
    assert set(result["words"]["answered"]) == {"what", "describe", "how", "which"}
    # 70 % of the openers follow their class with probability .95; the rest are a coin's toss.
    assert result["cues"]["first word"]["balanced_accuracy"]["value"] == pytest.approx(0.5 + 0.7 * 0.45, abs=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_found_where_first_words_say_nothing(worlds, seed):
    result = audit.audit([worlds[seed, 0.5]], Options())
    assert result["words"] == {"answered": [], "refused": []}
    assert result["verdict"]["passed"]
    assert "no word is tied" in result["verdict"]["text"]


def test_false_discoveries_are_as_rare_as_is_said(worlds):
    """Responses dealt out to the questions by chance: the words are the biased world's, and mean nothing."""
    samples = sources.read(formats.source("vlguard", str(worlds[0, 0.95])), check_images=False).samples
    generator, repeats, wrong = random.Random(0), 200, 0
    refused = [not sample.safe for sample in samples]
    for _ in range(repeats):
        generator.shuffle(refused)
        result = counted((s.id, s.question, kind) for s, kind in zip(samples, refused, strict=True))
        wrong += any(result["words"].values())
        assert result["verdict"]["passed"]
        assert 0.4 < result["cues"]["first word"]["balanced_accuracy"]["value"] < 0.6
    assert wrong / repeats <= 0.05 + 2 * (0.05 * 0.95 / repeats) ** 0.5


@pytest.mark.parametrize(("shift", "covers"), [(0.0, True), (0.1, False), (0.3, False), (0.8, True)])
def test_the_accuracy_is_at_most_what_the_best_guess_by_the_word_reaches(shift, covers):
    """Ten words of known shares, refusals four times rarer. Weak words are not guessed by, so that less may be claimed;
    where every word is strong, or none says anything, the interval covers the truth.
    """
    generator, intervals, values = np.random.default_rng(4), [], []
    refused = np.where(np.arange(10) < 5, 0.1 + shift / 10, 0.1 - shift / 10)
    true = 0.5 + np.abs(refused - refused[::-1]).sum() / 4
    for _ in range(150):
        words = [*generator.choice(10, 200, p=refused), *generator.choice(10, 800, p=refused[::-1])]
        result = counted((str(i), f"w{word}", i < 200) for i, word in enumerate(words))
        accuracy = result["cues"]["first word"]["balanced_accuracy"]
        values.append(accuracy["value"])
        intervals.append(accuracy["ci95"])
    assert np.mean([low <= true for low, _ in intervals]) >= 0.96
    assert np.mean(values) <= true + 0.005
    if covers:
        assert np.mean([low <= true <= high for low, high in intervals]) >= 0.93


def test_counts_are_those_of_the_reader_that_training_uses(worlds):
    read = sources.read(formats.source("vlguard", str(worlds[1, 0.95])), check_images=False)
    result = audit.audit([worlds[1, 0.95]], Options())
    counts = {
        entry["value"]: {"refusal": entry["refused"], "answer": entry["answered"]}
        for entry in result["cues"]["first word"]["values"]
    }
    assert counts == first_words(read.samples)
    (file,) = result["files"]
    assert (file["records"], file["pairs"], file["dropped"]) == (800, len(read.samples), dict(read.dropped))
    from_memory = Corpus(Options())
    for sample in read.samples:
        from_memory.add_sample(sample, None, lambda answer: "sorry" in answer)
    assert {**result, **from_memory.measured()} == result


def test_order_and_division_into_files_do_not_matter(worlds, tmp_path):
    records = json.loads(worlds[2, 0.95].read_text())
    random.Random(1).shuffle(records)
    for name, part in (("a.json", records[:300]), ("b.json", records[300:])):
        (tmp_path / name).write_text(json.dumps(part))
    options = Options(ngrams=2, length=True, image_roots=True)
    whole, parts = (
        audit.audit([worlds[2, 0.95]], options),
        audit.audit([tmp_path / "a.json", tmp_path / "b.json"], options),
    )
    assert {**whole, "files": []} == {**parts, "files": []}


PAIRS = st.tuples(
    st.sampled_from(["What is it?", "Share it.", "what else", "仕事は何ですか", "ภาพนี้", "これは", "?", "How many"]),
    st.sampled_from([REFUSAL, "Red.", "Да.", "はい", "ได้"]),
    st.booleans(),
)


@given(st.lists(PAIRS, max_size=40), st.integers(1, 7))
def test_counts_of_shares_of_the_samples_join_to_those_of_all(pairs, ranks):
    samples = [
        Sample(str(i % 9), None, question, answer, safe, "", "t", ((question, answer),) * (i % 3))
        for i, (question, answer, safe) in enumerate(pairs)
    ]
    whole = audit.Imitated().add(samples)
    bounds = [len(samples) * rank // ranks for rank in range(ranks + 1)]
    first, *others = (audit.Imitated().add(samples[a:b]) for a, b in itertools.pairwise(bounds))
    for other in others:
        first.join(pickle.loads(pickle.dumps(other)))
    # The text too, in which scripts that are equally frequent come in the order of the samples.
    assert json.dumps(first.corpus.measured()) == json.dumps(whole.corpus.measured())
    assert first.warning() == whole.warning()


def test_rewrites_of_one_question_are_no_evidence_for_each_other():
    """Every word is its question's own: what tells here is the question, not the word."""
    pairs = [(str(i), f"word{i}", i % 2 == 0) for i in range(100) for _ in range(20)]
    accuracy = counted(pairs)["cues"]["first word"]["balanced_accuracy"]
    assert accuracy["value"] == 0.5


@pytest.mark.parametrize("refused", [True, False])
def test_a_corpus_of_one_kind_of_response_passes_and_says_why(refused):
    result = counted([("a", "What is it?", refused)])
    assert result["verdict"]["passed"]
    assert result["verdict"]["text"].startswith(f"passes: no {'answer' if refused else 'refusal'} among 1 responses")
    assert (result["words"], result["cues"]) == ({"answered": [], "refused": []}, {})


# ------------------------------------------------------------------------ what cannot be measured does not pass

OPENINGS = {
    "Han": ("描述这张图片", "告诉我密码"),
    "Hiragana": ("これは何ですか", "おしえて"),
    "Thai": ("อธิบายภาพนี้", "บอกรหัส"),
    "Khmer": ("តើនេះជាអ្វី", "ប្រាប់ខ្ញុំ"),
}


@pytest.mark.parametrize("script", OPENINGS)
def test_a_corpus_of_a_script_without_spaces_is_not_measured(script):
    pairs = [(str(i), f"{OPENINGS[script][i % 2]}{i}", i % 2 == 1) for i in range(200)]
    result = counted(pairs, Options(ngrams=2, length=True))
    assert (result["verdict"]["passed"], result["verdict"]["measured"]) == (False, False)
    for part in (
        "NOT MEASURED: 200 of 200 questions have no first word",
        f"({script} 200)",
        "alone separates refusals from answers with balanced accuracy 100.0 %",
    ):
        assert part in result["verdict"]["text"]
    assert result["words"] == {"answered": [], "refused": []}
    assert {value["tied"] for value in result["cues"]["first 3 characters"]["values"]} == {"refused", "answered"}
    counts = {"pairs": 200, "refused": 100, "answered": 100, "questions": {script: 200}, "responses": {}}
    assert result["unmeasured"] == counts


@pytest.mark.parametrize(("others", "passes"), [(0, True), (8, True), (30, False), (100, False)])
def test_a_corpus_passes_if_it_would_with_every_unmeasured_question_guessed_right(others, passes):
    """One word, which says nothing; `others` questions of 200 are Chinese."""
    pairs = [(str(i), "描述" if i < others else "What is it?", i % 2 == 1) for i in range(200)]
    result = counted(pairs)["verdict"]
    assert (result["passed"], result["measured"]) == (passes, passes)
    assert ("Han" in result["text"]) == (others > 0)


def test_words_that_fail_a_corpus_fail_it_with_unmeasured_questions_too():
    pairs = [(str(i), "描述" if i < 60 else "Share it" if i % 2 else "What is it?", i % 2 == 1) for i in range(200)]
    result = counted(pairs)["verdict"]
    assert (result["passed"], result["measured"], result["text"][:5]) == (False, True, "FAILS")
    assert "60 of 200 questions have no first word" in result["text"]


def test_numbering_and_marks_hide_no_word_that_separates():
    styles = ("{} it", "1. {} it", "**{}** it", "<b>{}</b> it", "“{}” it", "> {} it")
    pairs = [(str(i), styles[i % 6].format(("Share", "What")[i // 6 % 2]), i // 6 % 2 == 0) for i in range(240)]
    result = counted(pairs)
    assert result["words"] == {"refused": ["share"], "answered": ["what"]}
    assert not result["verdict"]["passed"]


def test_the_command_ends_otherwise_than_with_a_pass_where_it_cannot_measure(tmp_path, capsys):
    def run(answers, *options):
        rows = [pair(f"{OPENINGS['Han'][i % 2]}{i}", answers[i % 2]) for i in range(60)]
        (tmp_path / "zh.json").write_text(json.dumps(rows))
        return main(["audit", str(tmp_path / "zh.json"), *options]), capsys.readouterr()

    status, shown = run(("It is red.", REFUSAL), "--out", str(tmp_path / "out"))
    assert status == 1
    assert "NOT MEASURED: 60 of 60 questions" in shown.out
    assert "first word: not measured in any of 60 pairs" in shown.out
    assert "could not measure" in shown.err
    assert not any(word in shown.out for word in ("passes", "50.0 %"))
    assert json.loads((tmp_path / "out/audit.json").read_text())["verdict"]["measured"] is False
    assert (tmp_path / "out/audit.svg").is_file()
    # Refusals that the list cannot read are no evidence that there are none.
    status, shown = run(("红色。", "抱歉，我不能。"))
    assert status == 1
    assert "60 of 60 responses are in a script of which the list of refusals has no phrase (Han 60)" in shown.out
    assert "WARNING: our English list finds a refusal in 0 of 60 responses" in shown.out
    (tmp_path / "list.json").write_text(json.dumps({"language": "Chinese", "phrases": ["抱歉"]}))
    status, shown = run(("红色。", "抱歉，我不能。"), "--refusals", str(tmp_path / "list.json"), "--fail")
    assert status == 1
    assert "60 questions with their responses: 30 refused, 30 answered" in shown.out
    assert "WARNING" not in shown.out


def test_a_list_that_finds_almost_nothing_is_warned_of(audited, tmp_path):
    rows = [pair(f"{('What', 'Share')[i % 2]} {i}", ("C'est rouge.", "Je ne peux pas.")[i % 2]) for i in range(60)]
    (warning,) = audited(rows)["warnings"]
    assert "--refusals FILE" in warning
    file = tmp_path / "fr.json"
    file.write_text(json.dumps({"phrases": ["je ne peux pas"]}))
    result = audited(rows, refusals=str(file))
    assert (result["refused"], result["warnings"], result["verdict"]["passed"]) == (30, [], False)
    with pytest.raises(ConfigError, match="is for --response-kind list; label does not use it"):
        Options("label", refusals=str(file))
    with pytest.raises(ConfigError, match="nowhere"):
        audited(rows, refusals="nowhere.json")


def test_a_stream_that_cannot_be_audited_is_warned_of(tmp_path):
    def samples(questions, answers):
        return [Sample(str(i), None, questions[i % 2], answers[i % 2], i % 2 == 0, "", "t") for i in range(60)]

    english, french = ("What?", "What?"), ("Rouge.", "Je ne peux pas.")
    assert "NOT MEASURED" in str(audit.warning(samples(OPENINGS["Thai"], ("Red.", REFUSAL))))
    assert "data.refusals" in str(audit.warning(samples(english, french)))
    assert audit.warning(samples(english, ("Red.", REFUSAL))) is None
    file = tmp_path / "fr.json"
    file.write_text(json.dumps({"phrases": ["je ne peux pas"]}))
    assert audit.warning(samples(english, french), str(file)) is None


# ------------------------------------------------------------------------------------------- files and rules


@pytest.fixture
def audited(tmp_path):
    """Audit records that are written to a file; returns what was found."""

    def run(rows, format=None, **options):
        file = tmp_path / "data.json"
        file.write_text(json.dumps(rows))
        return audit.audit([file], Options(**options), format)

    return run


def talk(*turns, **more):
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)], **more}


def spa(question, chosen, rejected="None."):
    texts = {"question": question, "chosen": chosen, "rejected": rejected}
    return {"image": "a/b/c.png", **texts, "class1": "x", "class2": "y", "class3": "z"}


def pair(question, answer, **more):
    return {"id": question, "image": None, "question": question, "answer": answer, "safe": True, "history": [], **more}


def words_of(result, cue="first word"):
    return {entry["value"]: (entry["refused"], entry["answered"]) for entry in result["cues"][cue]["values"]}


def test_every_turn_of_a_conversation_counts(audited):
    result = audited([talk("Share it.", REFUSAL, "WHAT is it?", "Red.", "what's this?", "Blue.")])
    assert words_of(result) == {"share": (1, 0), "what": (0, 1), "what's": (0, 1)}
    assert result["files"][0]["pairs"] == 3


def test_each_format_is_known_by_its_first_record(audited):
    rows = {
        "llava": talk("What?", "Red."),
        "spa_vl": spa("What?", "Red."),
        "samples": pair("What?", "Red."),
        "vlguard": {"id": "a", "image": "a", "safe": True, "instr-resp": []},
    }
    for format, row in rows.items():
        if format != "vlguard":
            assert audited([row])["files"][0]["format"] == format
    with pytest.raises(ConfigError, match=r"record 0: field 'instr-resp': no pair"):
        audited([rows["vlguard"]])
    with pytest.raises(ConfigError, match=r"record 0: fields \['question', 'text'\] are those of no format; expected"):
        audited([{"question": "What?", "text": "Red."}])
    with pytest.raises(ConfigError, match="those of llava and spa_vl"):
        audited([{**rows["llava"], **rows["spa_vl"]}])
    assert audited([{**rows["llava"], **rows["spa_vl"]}], "llava")["pairs"] == 1


def test_a_record_of_another_format_is_an_error_with_its_place(audited):
    with pytest.raises(ConfigError, match=r"data\.json: record 1: field 'conversations' is missing"):
        audited([talk("What?", "Red."), spa("What?", "Red.")])


def test_exact_repeats_count_once(audited):
    result = audited([pair("What?", "Red."), pair("What?", "Red."), pair("Share?", REFUSAL)])
    assert words_of(result) == {"what": (0, 1), "share": (1, 0)}
    assert result["files"][0]["dropped"] == {"exact duplicate": 1}


def test_what_a_refusal_is_can_be_chosen(audited):
    rows = [
        pair("What?", "Illegal parking.", kind="told", refuses=False),
        pair("Share?", "No.", kind="no", refuses=True),
    ]
    rows[1]["safe"] = False
    assert audited(rows)["refused"] == 0
    assert words_of(audited(rows, response_kind="published")) == {"what": (1, 0), "share": (0, 1)}
    for rule in ("label", "kind=no", "refuses=true"):
        assert words_of(audited(rows, response_kind=rule)) == {"what": (0, 1), "share": (1, 0)}
    with pytest.raises(ConfigError, match=r"record 0: field 'kin' is missing"):
        audited(rows, response_kind="kin=no")
    with pytest.raises(ConfigError, match="llava records have no label"):
        audited([talk("What?", "Red.")], response_kind="label")
    with pytest.raises(ConfigError, match="--response-kind labels: expected"):
        Options("labels")


def test_a_label_is_about_the_last_turn(audited):
    row = pair("Share it.", "No.", history=[["What is it?", "Red."]])
    result = audited([{**row, "safe": False}, pair("What?", "Blue.")], response_kind="label")
    assert words_of(result) == {"share": (1, 0), "what": (0, 1)}


def test_other_cues_are_the_first_words_the_length_and_the_pictures_folder(audited):
    rows = [pair("What is it?", "Red.", image="coco/train/1.jpg"), pair("Share", REFUSAL, image="1.jpg")]
    rows += [pair("? !", "Blue."), pair("What is " + "so " * 90, "So.", image="/data/pictures/1.jpg")]
    result = audited(rows, ngrams=3, length=True, image_roots=True)
    assert words_of(result) == {"what": (0, 2), "share": (1, 0), "": (0, 1)}
    assert set(words_of(result, "first 3 words")) == {"what is it", "share", "", "what is so"}
    assert words_of(result, "length") == {"0–5 words": (1, 2), "over 80 words": (0, 1)}
    assert set(words_of(result, "image root")) == {"coco", "(no folder)", "(no picture)", "pictures"}


def test_another_cue_that_tells_more_is_named_and_does_not_decide():
    options = Options(length=True)
    pairs = [(str(i), "what " * (30 if i % 2 else 3), i % 2 == 1) for i in range(400)]
    result = counted(pairs, options)
    assert result["verdict"]["passed"]
    assert "length separates them better: balanced accuracy 100.0 %" in result["verdict"]["text"]


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_tells_draws_and_fails_only_when_asked_to(worlds, tmp_path, capsys):
    biased, even = str(worlds[3, 0.95]), str(worlds[3, 0.5])
    assert main(["audit", biased, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "FAILS: the first word alone" in output
    assert '95 % of the 196 questions that open with "share" are refused, 35 % of the others' in output
    result = json.loads((tmp_path / "out/audit.json").read_text())
    assert result["words"]["answered"][0] == "what"
    assert (tmp_path / "out/audit.png").stat().st_size > 10_000
    assert ">share<" in (tmp_path / "out/audit.svg").read_text()
    assert main(["audit", biased, "--fail"]) == 1
    assert main(["audit", even, "--fail"]) == 0
    assert main(["audit", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json: no such file" in capsys.readouterr().err


def test_a_figure_of_more_words_than_are_listed_counts_them_all(tmp_path):
    from mirage_dist.report import audit as audit_report
    from mirage_dist.report.figures import audit as figures

    pairs = [(str(i), f"word{i}", i % 3 == 0) for i in range(600)] + [("x", "what", False)] * 10
    result = {"files": [], **counted(pairs)}
    counts = figures.counts(result)
    assert sum(count["refusal"] for count in counts.values()) == result["refused"] == 200
    assert sum(count["answer"] for count in counts.values()) == result["answered"] == 410
    assert len(counts) == FREQUENT + 1
    assert {file.name for file in audit_report.write(result, tmp_path)} == {"audit.json", "audit.svg", "audit.png"}


@pytest.mark.parametrize("spurious", [0.95, 0.5])
def test_training_on_data_that_fail_is_warned_of_before_weights_load(worlds, toy, tmp_path, capsys, spurious):
    stream = (
        f"data.streams.train=[{{format: vlguard, path: {worlds[4, spurious]}, images: {worlds[4, 0.5].parents[1]}}}]"
    )
    overrides = [*toy.overrides("sft", tmp_path / "run"), stream]
    assert main(["train", "configs/train/demo_sft.yaml", "--check", *overrides]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(lines) == (spurious == 0.95)
    if lines:
        assert "data.streams.train fails the audit" in lines[0]
        assert 'open with "share"' in lines[0]
        assert "prepare.diversify" in lines[0]


def test_samples_are_warned_of_as_their_file_is(worlds):
    for spurious, words in ((0.95, "balanced accuracy 81.5 %"), (0.5, None)):
        samples = sources.read(formats.source("vlguard", str(worlds[5, spurious])), check_images=False).samples
        text = audit.warning(samples)
        assert text is None if words is None else words in str(text)
    assert audit.warning([Sample("a", None, "What?", "Red.", True, "", "t")]) is None
