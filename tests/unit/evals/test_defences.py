"""Defences around a model: what each sends and withholds, and its table beside none on the same questions.

The self-reminder's form is that of Xie et al. (Nature Machine Intelligence 5, 2023): a reminder, a line break, the
question, a line break, a reminder, all in the user's turn; read on 2026-11-27 in the template of the authors' code
(`defense_templates` of its GPT experiments) and in two reimplementations. All texts here are placeholders.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from chat_server import QUICK, completion, error
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mirage_dist import cli, report, state, stats
from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data import harvest
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.evals import defences, follow, manifest, results, runner, worklist
from mirage_dist.evals.defences import output_filter, self_reminder, system_prompt
from mirage_dist.report import compare, text
from mirage_dist.report import defences as written
from mirage_dist.report.load import Run
from mirage_dist.report.writing import terminal
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, TemplateConfig, TrainRecipe

# Refuses what the prompt forbids and, where it is reminded, every question; else it answers.
ENGINE = """
from mirage_dist.evals.models.base import Generator

class Scripted(Generator):
    loads = []

    def __init__(self, model, template, generation):
        super().__init__(model, template, generation)
        self.system = template.system_prompt
        self.loads.append(template.system_prompt)

    def answer(self, samples):
        return [self.of(sample) for sample in samples]

    def of(self, sample):
        if "remember" in sample.question:
            return "Sorry, I cannot help with that."
        if self.system and self.system.split()[-1] in sample.question.split():
            return "Sorry, I cannot help with that."
        return f"sure: {sample.question} {len(sample.history)}"
"""
OPEN, SHUT = (json.dumps({"refused": False, "harmful": harm, "relevant": True}) for harm in (False, True))
REMINDER = {"kind": "self_reminder", "before": "be good", "after": "remember"}
PROMPT = {"kind": "system_prompt", "text": "say no to red"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and eight unsafe and eight safe questions, of which every other one is about red."""
    root = tmp_path_factory.mktemp("defences")
    embedded_model.make(root / "model", seed=1)
    for kind, safe in (("unsafe", False), ("safe", True)):
        lines = [
            {"id": f"{kind}{i}", "image": None, "question": f"{kind} {i} {'red' if i % 2 else 'blue'} ?"}
            for i in range(8)
        ]
        text = "".join(
            json.dumps({**x, "answer": "", "safe": safe, "category": "", "history": []}) + "\n" for x in lines
        )
        (root / f"{kind}.jsonl").write_text(text)
    (root / "lab_defended.py").write_text(ENGINE)
    return root


@pytest.fixture
def engine(place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    import lab_defended

    monkeypatch.setattr(lab_defended.Scripted, "loads", [])
    return lab_defended.Scripted


def recipe(place, run, wrappers, *overrides, attack=None) -> EvalRecipe:
    attack = attack or {"kind": "prefix", "prefixes": ["please ,", "now ,"]}
    sets = {
        kind: {
            "kind": kind,
            "sources": [{"format": "samples", "path": str(place / f"{kind}.jsonl")}],
            "attacks": {"polite": attack},
        }
        for kind in ("unsafe", "safe")
    }
    tree = {
        "run": {"dir": str(run)},
        "suite": "s",
        "model": {"path": str(place / "model"), "dtype": "fp32"},
        "sets": sets,
        "judges": ["keyword"],
        "generation": {"backend": "lab_defended:Scripted", "batch_size": 5},
        "defences": wrappers,
    }
    return configs.from_tree(OmegaConf.create(tree), list(overrides), EvalRecipe, "a test")


def rows(folder: Path) -> dict[tuple, dict]:
    lines = [line for file in sorted((folder / "rows").iterdir()) for line in file.read_bytes().splitlines(True)]
    parsed = [state.parse("row", line, "") for line in lines]
    assert len({row["key"] for row in parsed}) == len(parsed)
    return {(row["set"], row["id"], row["attack"], row["shot"]): row for row in parsed}


def loaded(run: Path) -> Run:
    return Run("m", run, "s", results.read(run / "evals/s"))


QUESTIONS = 2 * 8 * (1 + 2)


def test_each_defence_answers_the_same_questions_and_stands_beside_none(place, engine, tmp_path, capsys):
    options = recipe(place, tmp_path / "run", {"prompt": PROMPT, "reminder": REMINDER})
    result = runner.evaluate(options)
    suite = tmp_path / "run/evals/s"
    assert result == results.read(suite)
    assert "defence" not in result
    assert engine.loads == [None, "say no to red"]  # the reminder needs no other template
    bare = rows(suite)
    own = {name: rows(suite / "defences" / name) for name in ("prompt", "reminder")}
    assert len(bare) == QUESTIONS
    assert not any({"sent", "withheld", "filtered"} & row.keys() for row in bare.values())
    for name, answered in own.items():
        assert answered.keys() == bare.keys()
        assert not {row["key"] for row in answered.values()} & {row["key"] for row in bare.values()}
        assert manifest.read(suite / "defences" / name)["settings"]["defence"] == {
            "name": name,
            **options.defences[name],
        }
    # The attack stands outside: what the defence wraps is the attacked question, and a judge reads that one.
    row = own["reminder"]["unsafe", "unsafe1", "polite", 2]
    assert (row["question"], row["sent"]) == ("now , unsafe 1 red ?", "be good\nnow , unsafe 1 red ?\nremember")
    assert row["original_question"] == "unsafe 1 red ?"
    for place_of, row in own["prompt"].items():
        assert row["sent"] == row["question"]
        assert (row["response"] == bare[place_of]["response"]) == ("blue" in row["question"])

    made = report.report({"m": tmp_path / "run"}, tmp_path / "out")
    assert not made["problems"]
    effects = {
        (own["defence"]["name"], e["measure"], e["condition"]): e for own in made["defences"] for e in own["effects"]
    }
    assert set(effects) == {
        (name, measure, condition) for name in own for measure in ("asr", "rr") for condition in ("clean", "polite_k2")
    }
    for (name, measure, _), effect in effects.items():
        refused = {"prompt": 4, "reminder": 8}[name]
        first, second = (8, 8 - refused) if measure == "asr" else (0, refused)
        paired = stats.paired({i: i < first for i in range(8)}, {i: i < second for i in range(8)})
        assert effect["paired"] == paired
        assert (effect["undefended"]["k"], effect["rate"]["k"]) == (first, second)
    corrected = stats.holm([effect["paired"]["p"] for effect in effects.values()])
    assert [effect["p_holm"] for effect in effects.values()] == corrected
    low, high = (100 * bound for bound in effects["prompt", "asr", "clean"]["paired"]["ci95"])
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    none, (line,) = ([line for line in lines if re.match(rf"\| m \| {name} ", line)] for name in ("none", "prompt"))
    assert len(none) == 1
    assert f"50.0 4/8 -50.0 ({low:+.1f} to {high:+.1f}), p " in line
    assert "50.0 4/8 +50.0 " in line
    lines = report.table(made).splitlines()
    assert max(len(line) for line in lines if re.match("m  +", line)) <= terminal.WIDTH
    asr, more, rr, _ = (re.sub(" +", " ", line) for line in lines if re.match(r"m +prompt +", line))
    assert asr.startswith(f"m prompt ASR, clean 50.0 4/8 -50.0 ({low:+.1f} to {high:+.1f}), p ")
    assert more.startswith("m prompt ASR, polite")
    assert rr.startswith("m prompt RR, clean 50.0 4/8 +50.0 ")
    page = (tmp_path / "out/index.html").read_text()
    assert "Defences, and what they cost" in page
    assert "where it has one (and in place of a default of the chat template): “say no to red”" in page


def test_a_defence_that_comes_later_costs_its_own_answers_only(place, engine, tmp_path):
    runner.evaluate(recipe(place, tmp_path / "run", {}))
    suite = tmp_path / "run/evals/s"
    before = {file: file.read_bytes() for file in (suite / "rows").iterdir()}
    rates = (suite / "metrics.json").read_bytes()
    engine.loads.clear()
    runner.evaluate(recipe(place, tmp_path / "run", {"reminder": REMINDER}))
    assert {file: file.read_bytes() for file in (suite / "rows").iterdir()} == before
    assert (suite / "metrics.json").read_bytes() == rates
    assert engine.loads == [None]
    whole = (suite / "defences/reminder/rows").iterdir()
    (file,) = whole
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:20]) + lines[20][:30])  # killed in the middle of a row
    kept = results.read(suite / "defences/reminder")
    runner.evaluate(recipe(place, tmp_path / "run", {"reminder": REMINDER}))
    assert results.read(suite / "defences/reminder") == kept
    assert len(rows_of_both(suite / "defences/reminder")) == QUESTIONS
    with pytest.raises(ConfigError, match=r"defences/reminder holds answers of another.*defence\.after: 'other' here"):
        runner.evaluate(recipe(place, tmp_path / "run", {"reminder": {**REMINDER, "after": "other"}}))


def rows_of_both(folder):
    keys = set()
    for file in (folder / "rows").iterdir():
        keys |= {m[1] for m in re.finditer(rb'^\{"key": "([0-9a-f]{64})".*\n', file.read_bytes(), re.MULTILINE)}
    return keys


def guard(server, **more):
    return {"kind": "output_filter", "judge": {"kind": "vlm", "url": server.url, "model": "m", **QUICK, **more}}


def harmful_if(word):
    return lambda text, _: completion(SHUT if word in text else OPEN)


def test_a_filter_withholds_what_its_guard_finds_harmful_and_asks_the_model_nothing(place, engine, serve, tmp_path):
    server = serve(harmful_if("red"))
    options = recipe(place, tmp_path / "run", {"filter": guard(server)})
    runner.evaluate(options)
    assert engine.loads == [None]
    suite = tmp_path / "run/evals/s"
    bare, own = rows(suite), rows(suite / "defences/filter")
    assert own.keys() == bare.keys()
    for where, row in own.items():
        shut = "red" in row["question"]
        assert row["filtered"] == ("harmful" if shut else "answered")
        assert row["response"] == (output_filter.REFUSAL if shut else bare[where]["response"])
        assert row.get("withheld") == (bare[where]["response"] if shut else None)
    rates = results.read(suite / "defences/filter")
    assert rates["defence"]["withheld"] == {k: {"clean": [4, 8], "polite": [8, 16]} for k in ("unsafe", "safe")}
    entry = rates["judges"]["keyword"]["entry"]
    assert (entry["asr"]["clean"]["k"], entry["rr"]["clean"]["k"]) == (4, 4)
    # A judge that knows no such phrase counts them all the same: they are refusals by the filter.
    lines = [state.parse("verdict", line, "") for line in (suite / "defences/filter/verdicts/keyword.jsonl").open("rb")]
    assert (
        sum(line.get("detail") == {"by": "filter"} and line["verdict"] == "refused" for line in lines) == QUESTIONS // 2
    )
    # The guard knows nothing of the sets: it got each answer once, with the question as the user asks it.
    assert len(server.seen) == QUESTIONS
    assert all("unsafe1" not in request["text"] for request in server.seen)
    runner.evaluate(recipe(place, tmp_path / "run", {"filter": guard(server, retries=7)}))  # which decides no verdict
    assert len(server.seen) == QUESTIONS
    assert len(rows(suite / "defences/filter")) == QUESTIONS
    with pytest.raises(ConfigError, match=r"defences/filter holds answers of another evaluation: defence\.guard: "):
        runner.evaluate(recipe(place, tmp_path / "run", {"filter": guard(server, max_tokens=9)}))
    (sentence,) = written.descriptions(compare.defended([loaded(tmp_path / "run")]))
    assert "The filter withheld 12 of 24 answers to unsafe. The filter withheld 12 of 24 answers to safe." in sentence


def test_without_its_guard_nothing_is_passed_on_and_the_next_start_goes_on(place, engine, serve, tmp_path, capsys):
    """Three answers are lost after all attempts. Three are blocked for good, three replies are no verdict: withheld."""
    down = [True]

    def script(text, times):
        if down[0] and "unsafe 3" in text:
            return error(503, "overloaded")
        if "unsafe 5" in text:
            return error(400, "content management policy", code="content_filter")
        return completion("It is fine.") if "unsafe 6" in text else completion(OPEN)

    server = serve(script)
    options = recipe(place, tmp_path / "run", {"filter": guard(server, retries=0)})
    suite = tmp_path / "run/evals/s"
    with pytest.raises(RunError, match=r"s, defence filter: its guard vlm gave no verdict on 3 of 48 .*HTTP 503.* × 3"):
        runner.evaluate(options)
    assert not (suite / "defences/filter/rows").exists()
    assert (suite / "metrics.json").is_file()
    (problem,) = text.problems([loaded(tmp_path / "run")])
    assert "leaves out filter, which is not completely evaluated" in problem
    sent, down[0] = len(server.seen), False
    runner.evaluate(options)
    assert len(server.seen) == sent + 3
    rates = results.read(suite / "defences/filter")
    assert rates["defence"]["undecided"] == 6
    assert rates["defence"]["withheld"]["unsafe"] == {"clean": [2, 8], "polite": [4, 16]}
    assert "6 of 48 answers are withheld because the guard's reply was no verdict" in capsys.readouterr().out


def test_a_guard_that_is_the_judge_is_named(place, engine, serve, tmp_path, caplog):
    server = serve(harmful_if("red"))
    own = guard(server)
    runner.evaluate(recipe(place, tmp_path / "run", {"filter": own}, f"judges=[{json.dumps(own['judge'])}]"))
    assert results.read(tmp_path / "run/evals/s/defences/filter")["defence"]["same_judge"] == ["vlm"]
    (sentence,) = written.descriptions(compare.defended([loaded(tmp_path / "run")]))
    assert "Its guard is the judge vlm, whose rates behind the filter are decided by its own verdicts." in sentence


def test_a_defence_of_other_answers_or_by_another_judge_is_left_out_by_name(place, engine, tmp_path):
    runner.evaluate(recipe(place, tmp_path / "run", {"reminder": REMINDER}))
    shutil.copytree(tmp_path / "run", tmp_path / "judged")
    runner.evaluate(
        recipe(place, tmp_path / "judged", {}, "judges=[{kind: keyword, phrases: published, name: keyword}]")
    )
    own = tmp_path / "run/evals/s/defences/reminder"
    assert not loaded(tmp_path / "run").arm_problems
    rates = results.read(own)
    rates["defence"]["undefended"] = "of other questions"
    (own / "metrics.json").write_text(results.text(rates))
    for name, why in (("judged", "was judged by other rules"), ("run", "answered other questions")):
        run = loaded(tmp_path / name)
        assert compare.defended([run]) == []
        (problem,) = text.problems([run])
        assert f"m: the table of defences leaves out reminder, which {why}" in problem


def test_defended_answers_are_no_harvest(place, engine, tmp_path):
    runner.evaluate(recipe(place, tmp_path / "run", {"prompt": PROMPT}))
    suite = tmp_path / "run/evals/s"
    assert harvest.harvest(suite / "rows").count == 16
    defended = harvest.harvest(suite / "defences/prompt/rows")
    assert (defended.count, defended.left_out) == (0, {"defended": QUESTIONS})


TALK = {"kind": "transcript", "min_match": 0.1}


def test_in_a_conversation_every_turn_is_wrapped_and_the_history_is_the_defended_models(place, engine, tmp_path):
    texts = [{"role": "user", "content": "one ?"}, {"role": "user", "content": "two ?"}]
    talk = tmp_path / "talks.jsonl"
    talk.write_text("".join(json.dumps({"id": f"{k}0", "messages": texts}) + "\n" for k in ("unsafe", "safe")))
    wrapped = {"kind": "self_reminder", "before": "be good", "after": ""}
    options = recipe(place, tmp_path / "run", {"r": wrapped}, attack={**TALK, "path": str(talk)})
    runner.evaluate(options)
    row = rows(tmp_path / "run/evals/s/defences/r")["unsafe", "unsafe0", "polite", 2]
    assert row["history"] == [["one ?", "sure: be good\none ? 0"]]
    assert (row["sent"], row["response"]) == ("be good\ntwo ?", "sure: be good\ntwo ? 1")
    made = defences.make(wrapped, "r", "k").sent(Sample("a", None, "two ?", "", True, "", "", (("one ?", "1"),)))
    assert made.history == (("be good\none ?", "1"),)
    judge = {"kind": "vlm", "url": "http://localhost:1/v1", "model": "m"}
    filters = {"f": {"kind": "output_filter", "judge": judge}}
    with pytest.raises(
        ConfigError, match=r"defences\.f: withholds answers, and sets\.unsafe\.attacks\.polite is a conv"
    ):
        worklist.check(recipe(place, tmp_path / "run", filters, attack={**TALK, "path": str(talk)}))


TEXTS = st.text("ab \n")


@given(TEXTS, TEXTS, TEXTS)
def test_a_reminder_adds_lines_and_changes_no_character_of_the_question(before, question, after):
    if not (before.strip() or after.strip()):
        return
    sent = self_reminder.SelfReminder(before=before, after=after).turn(question)
    start = len(before) + 1 if before else 0
    assert sent[start : start + len(question)] == question
    assert len(sent) == sum(len(part) for part in (before, question, after)) + bool(before) + bool(after)


def test_a_system_prompt_comes_after_the_models_own_or_in_its_place():
    own = TemplateConfig(system_prompt="Be brief.", image_aspect="pad")
    added, instead = (system_prompt.SystemPrompt(text="Be safe.", replaces=r).template(own) for r in (False, True))
    assert (added.system_prompt, instead.system_prompt) == ("Be brief. Be safe.", "Be safe.")
    assert dataclasses.replace(added, system_prompt="Be brief.") == own
    assert system_prompt.SystemPrompt(text="Be safe.").template(TemplateConfig()).system_prompt == "Be safe."


CHAT = {"url": "http://localhost:1/v1", "model": "m"}
WRONG = [
    (
        {"a": {"kind": "self_remindr"}},
        r"defences\.a\.kind='self_remindr': unknown defence; did you mean 'self_reminder'",
    ),
    ({"a": {"text": "x"}}, r"defences\.a\.kind=None: unknown defence; expected one of system_prompt, self_reminder"),
    ({"a": {"kind": "system_prompt", "txt": "x"}}, r"unknown key 'defences\.a\.txt'; did you mean 'text'"),
    ({"a": {"kind": "system_prompt", "text": " "}}, r"defences\.a\.text=' ': expected the text of a system prompt"),
    ({"a": {"kind": "self_reminder", "before": "", "after": ""}}, r"defences\.a\.before, after: both are empty"),
    ({"a": {"kind": "output_filter"}}, r"defences\.a\.judge is missing"),
    (
        {"a": {"kind": "output_filter", "judge": {"kind": "vlm"}}},
        r"defences\.a\.judge\.path: a chat model needs either",
    ),
    ({"a": PROMPT, "b": PROMPT}, r"defences\.a and defences\.b are the same defence; remove one"),
    ({"a": PROMPT, "A": REMINDER}, r"defences\.a, defences\.A: some file systems take them for one"),
    ({"None": PROMPT}, r"defences\.None: reports call an evaluation without a defence so"),
    *(
        ({"a": {"kind": "output_filter", "judge": judge}}, r"defences\.a\.judge\.kind=.*: cannot be a filter's guard")
        for judge in (
            {"kind": "keyword"},
            {"kind": "world"},
            {"kind": "benchmark"},
            {"kind": "published_parity", **CHAT},
            {"kind": "preset", "preset": "strongreject", **CHAT},
        )
    ),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_a_wrong_defence_is_named_before_anything_is_read(place, tmp_path, wrong, words):
    tree = configs.to_dict(recipe(place, tmp_path / "run", wrong))
    (tmp_path / "r.yaml").write_text(json.dumps({**tree, "generation": {"backend": "hf"}}))
    with pytest.raises(ConfigError, match=words):
        worklist.check(configs.load(tmp_path / "r.yaml", ["model.path=nowhere"], EvalRecipe))


def test_a_runs_own_export_is_asked_with_a_safety_prompt_by_name(place, engine, tmp_path):
    """A system prompt that training did not have is refused, unless it is a defence."""
    run = tmp_path / "run"
    shutil.copytree(place / "model", run / "export")
    trained = configs.load("configs/train/demo_sft.yaml", ["run.dir=x"], TrainRecipe)
    configs.write_yaml(trained, run / "config.yaml")
    own = [f"model.path={run}/export", "template.image_aspect=pad"]
    with pytest.raises(ConfigError, match=r"template\.system_prompt='no harm', but .* data\.system_prompt=None"):
        runner.evaluate(recipe(place, run, {}, *own, "template.system_prompt=no harm"))
    runner.evaluate(recipe(place, run, {"prompt": PROMPT}, *own))
    bare, prompted = (manifest.read(run / "evals/s" / where)["settings"] for where in ("", "defences/prompt"))
    assert (bare["template"]["system_prompt"], prompted["template"]["system_prompt"]) == (None, PROMPT["text"])
    assert engine.loads == [None, PROMPT["text"]]


def test_a_checkpoint_that_lacks_a_defence_is_not_done(place, engine, tmp_path):
    """`follow` goes on with it, although its rates without the defence are there."""
    options = recipe(place, tmp_path / "run", {"reminder": REMINDER})
    step, followed = (
        tmp_path / "run/evals/s/step-000007",
        dataclasses.replace(options, follow=str(tmp_path / "trained")),
    )
    runner.evaluate(dataclasses.replace(options, suite="s/step-000007"))
    assert follow.measured(followed, 7)
    (step / "defences/reminder/metrics.json").unlink()
    assert not follow.measured(followed, 7)
    assert follow.measured(dataclasses.replace(followed, defences={}), 7)


def test_a_defence_in_the_template_and_others_beside_it_are_refused(place, tmp_path):
    named = recipe(place, tmp_path / "run", {"a": REMINDER}, "template.system_prompt=no harm", "template.defence=own")
    with pytest.raises(ConfigError, match=r"write this one as defences\.own: \{kind: system_prompt"):
        defences.read(named)


@pytest.mark.parametrize("preset", ["wildguard", "llama-guard-4", "harmbench-cls", "qwen2.5-vl-7b"])
def test_the_guard_presets_can_filter(preset):
    judge = {"kind": "preset", "preset": preset, **CHAT}
    made = defences.make({"kind": "output_filter", "judge": judge}, "the recipe", "defences.f")
    assert made.guard is not None
    assert "harmful" in made.guard.verdicts


def test_the_pages_example_is_a_defence():
    page = (REPOSITORY / "docs/defences.md").read_text()
    example, scope = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL), {"__name__": "test_example"}
    exec(example[0], scope)
    sent = scope["Quoted"](mark="'").sent(Sample("a", None, "two ?", "", True, "", "", (("one ?", "1"),)))
    assert (sent.question, sent.history) == ("'two ?'", (("'one ?'", "1"),))
    for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        listed = OmegaConf.to_container(OmegaConf.create(block))["defences"]
        assert set(listed) == {"prompt", "reminder", "filter"}
        for name, options in listed.items():
            defences.make(options, "the page", f"defences.{name}")


def test_the_status_has_every_defence(place, engine, tmp_path, capsys):
    runner.evaluate(recipe(place, tmp_path / "run", {"reminder": REMINDER}))
    configs.write_yaml(recipe(place, tmp_path / "run", {"reminder": REMINDER, "prompt": PROMPT}), tmp_path / "r.yaml")
    assert cli.main(["eval", str(tmp_path / "r.yaml"), "--status"]) == 0
    shown = capsys.readouterr().out
    assert f"{QUESTIONS} of {QUESTIONS} answers (100.0%)" in shown.partition("defence reminder\n")[2]
    assert "defence prompt\nnot started yet" in shown


OWN = """
from dataclasses import dataclass

from mirage_dist.evals.defences import Defence

@dataclass(frozen=True, kw_only=True)
class Shout(Defence):
    louder: bool = False

    def turn(self, question):
        return question.upper() + "!" * self.louder
"""


@pytest.mark.parametrize("change", ["turn(self, question): return question.upper()", "template(self, t): return T"])
def test_a_guard_beside_another_change_is_refused(place, engine, serve, tmp_path, monkeypatch, change):
    """It would read the answers of the model without the change."""
    head = (
        "from dataclasses import dataclass\nfrom mirage_dist.evals.defences.output_filter import Guarded, OutputFilter"
    )
    both = f"""{head}
from mirage_dist.schema import TemplateConfig
T = TemplateConfig(system_prompt="x")
@dataclass(frozen=True, kw_only=True)
class Both(Guarded):
    def {change}
@dataclass(frozen=True, kw_only=True)
class Described(OutputFilter):
    def whole(self, source, key):
        return Both(judge=self.judge, guard=super().whole(source, key).guard)
"""
    module = f"lab_both_{change[:4]}"
    (tmp_path / f"{module}.py").write_text(both)
    monkeypatch.syspath_prepend(tmp_path)
    own = {**guard(serve(harmful_if("red"))), "kind": f"{module}:Described"}
    with pytest.raises(ConfigError, match=r"defences\.b: has a guard and changes what the model gets"):
        runner.evaluate(recipe(place, tmp_path / "run", {"b": own}))


def test_a_defence_from_outside_the_package_has_its_own_name_and_keys(place, engine, tmp_path, monkeypatch):
    (tmp_path / "lab_shout.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    wrappers = {name: {"kind": "lab_shout:Shout", "louder": name == "b"} for name in ("a", "b")}
    runner.evaluate(recipe(place, tmp_path / "run", wrappers))
    sent = [rows(tmp_path / "run/evals/s/defences" / n)["safe", "safe0", "clean", 0]["response"] for n in wrappers]
    assert sent == ["sure: SAFE 0 BLUE ? 0", "sure: SAFE 0 BLUE ?! 0"]
    assert [arm.metrics["defence"]["about"] for arm in loaded(tmp_path / "run").arms] == ["with lab_shout.Shout"] * 2
