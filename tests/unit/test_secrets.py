"""What looks like a key goes into no recipe, no message and no log; what only resembles one is text like any other."""

import pytest
from omegaconf import OmegaConf

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, secrets

RANDOM = "a1" * 12
KEYS = (
    f"sk-proj-{RANDOM}",
    f"sk-ant-api03-Ab1_cd-{RANDOM}-AA",
    "sk-or-v1-" + "0a" * 32,
    "sk-lf-12345678-1234-1234-1234-123456789abc",
    f"sk_live_{RANDOM}",
    "hf_" + "AbCdEfGhIj" * 3 + "KlMn",
    "ghp_" + "A1b2" * 9,
    f"github_pat_11ABCDEFG0_{RANDOM}",
    f"glpat-Ab3-{RANDOM}",
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdefGHIJ",
    "AIza" + "Sy" * 16 + "abc",
    f"ya29.{RANDOM}",
    f"nvapi-aB3_{RANDOM}",
    f"gsk_{RANDOM}",
    f"xai-{RANDOM}",
    f"wandb_v1_{RANDOM}",
    f"SG.{RANDOM}.{RANDOM}",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    f"Bearer {RANDOM}",
    "authorization: Basic dXNlcjpwYXNzd29yZDE=",
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    "https://user:p4ss@host/v1",
    "postgresql://u:p4ss@db/x",
    "https://:p4ss@host",
    "https://" + "5f" * 20 + "@github.com/x",
    "https://host/v1?api_key=abcdefgh12",
    "http://host/?a=1&token=abcdefgh",
    "https://host/v1?X-Amz-Signature=" + "0a" * 16,
)
TEXTS = (
    "runs/sk-baseline-experiment-3",
    "sk-learn",
    "hf-internal-testing/tiny-random-LlavaForConditionalGeneration",
    "hf_transformers_baseline",
    "xai-saliency-baseline-experiment-20261126",
    "glm-4v-9b-experiment-20261126",
    "npm_packages/list",
    "ghp_notes",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "user@host:/path/to/x",
    "git@github.com:x/y.git",
    "ssh://git@host/x",
    "http://localhost:8000/v1",
    "https://host/v1?page=12345678",
    "What is the token=abcdefgh of it?",
    "the bearer acknowledgements of 2023",
    "basic 2+2=4 arithmetic",
)


@pytest.mark.parametrize("key", KEYS)
def test_every_form_of_a_key_is_known_in_any_place_of_a_text_and_masked(key):
    for text in (key, f"a {key}", f"key_env={key!r}, x", f"({key})\n"):
        assert secrets.contains(text)
        assert not secrets.contains(secrets.masked(text))
    assert "p4ss" not in secrets.masked(key)
    assert RANDOM not in secrets.masked(key)


@pytest.mark.parametrize("text", TEXTS)
def test_what_resembles_a_key_is_text(text):
    assert not secrets.contains(text)
    assert secrets.masked(text) == text


@pytest.mark.parametrize("text", ["sk-" * 20_000, "?key" * 20_000, "://" * 20_000, "a-" * 20_000, "api_key" * 10_000])
def test_a_long_text_is_searched_in_linear_time(text):
    """A quadratic search would take minutes, and the suite's time limit would end it."""
    assert secrets.masked(text) == text


RECIPE = {
    "run": {"dir": "r"},
    "suite": "s",
    "model": {"path": "m"},
    "sets": {"a": {"kind": "safe", "sources": []}},
    "judges": [{"kind": "vlm", "url": "http://h/v1", "model": "m"}],
}
KEY = f"sk-proj-{RANDOM}"


@pytest.mark.parametrize(
    "override",
    [
        f"template.template_options={{a: [{{b: {KEY}}}]}}",
        f"template.template_options={{{KEY}: 1}}",
        f"judges[0].{KEY}=1",
        f"judges[0].key_env={KEY}",
        f"judges[0].url=http://h/v1?api_key={RANDOM}",
        f"judges[0].extra={{headers: {{Authorization: {RANDOM}}}}}",
        f"judges[0].extra={{headers: {{x-api-key: [{RANDOM}]}}}}",
        f"template.template_options={{hf_token: {RANDOM}}}",
        f"{KEY}=1",
        f"seed={KEY}",
        f"suite={KEY}",
        f"run.name={KEY}",
        f"sets.{KEY}.kind=safe",
        f"template.image_aspect={KEY}",
        f"template.defence=sk-proj-${{run.dir}}{RANDOM}",
        f"template.defence=${{oc.env:{KEY}}}",
        f"template.defence=${{oc.decode:{KEY}}}",
        f"template.defence=${{{KEY}}}",
        f"template.defence=[{KEY}",
        f"api_key={RANDOM}",
        f"include={KEY}",
        KEY,
    ],
)
def test_a_key_at_any_place_of_an_evaluation_is_refused_without_being_shown(override, tmp_path):
    OmegaConf.save(OmegaConf.create(RECIPE), tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError) as refused:
        configs.load(tmp_path / "recipe.yaml", [override], EvalRecipe)
    assert RANDOM not in str(refused.value)


def test_a_variable_of_the_environment_is_named_and_reaches_no_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    OmegaConf.save(OmegaConf.create(RECIPE), tmp_path / "recipe.yaml")
    recipe = configs.load(tmp_path / "recipe.yaml", ["judges[0].key_env=OPENAI_API_KEY"], EvalRecipe)
    assert KEY not in configs.to_yaml(recipe)
    (tmp_path / "included.yaml").write_text("template: {defence: '${oc.env:OPENAI_API_KEY}'}\n")
    with pytest.raises(ConfigError, match="What is secret stays in the environment"):
        configs.load(tmp_path / "recipe.yaml", [f"include={tmp_path}/included.yaml"], EvalRecipe)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "configs/train/demo_sft.yaml", KEY],
        ["train", "configs/train/demo_sft.yaml", "--ranks", KEY],
        ["train", KEY],
        ["prepare", "configs/prepare/demo.yaml", f"safety={KEY}"],
        ["prepare", "configs/prepare/demo.yaml", f"harvest={KEY}", "--check", "answers=as_given"],
        ["eval", "configs/eval/demo.yaml", f"run.dir={KEY}"],
        ["eval", "configs/eval/demo.yaml", "--worker", KEY],
        ["erasure", "configs/eval/demo.yaml", f"run.dir=r erasure={KEY}"],
        ["plan", "configs/train/demo_sft.yaml", f"--token={KEY}"],
        ["config", "configs/train/demo_sft.yaml", "--get", KEY],
        ["config", "configs/train/demo_sft.yaml", f"model.path=x_{KEY}"],
        ["audit", KEY],
        ["audit", "README.md", f"--api-key={RANDOM}"],
        ["report", KEY],
        ["export", KEY, "out"],
        ["export", KEY],
        ["demo", KEY],
        [KEY],
    ],
)
def test_no_verb_shows_a_key_in_a_wrong_place(words, capsys):
    try:
        status = cli.main(words)
    except SystemExit as end:  # argparse's
        status = end.code
    shown = capsys.readouterr()
    assert status == ConfigError.status
    assert RANDOM not in shown.out + shown.err
    assert shown.err


def test_errors_and_logs_never_repeat_a_key(capsys):
    for kind in (ConfigError, RunError):
        assert str(kind(f"proxy http://u:p4ss@host: {KEY}")) == "proxy http://***@host: ***"
    log.warning(f"a library's message: {KEY}")
    assert RANDOM not in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb", [["export", "a"], ["train", "x", "--\x1b[2J"], ["\x1b[2J"], ["audit", "x", "--ngrams=\x07"]]
)
def test_a_wrong_command_line_is_shown_without_its_control_characters(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main(verb)
    assert not set("\x1b\x07") & set(capsys.readouterr().err)


def test_a_bugs_traceback_shows_neither_keys_nor_control_characters(capsys, monkeypatch):
    def fail(*_):
        raise AttributeError(f"{KEY} \x1b[2J")

    monkeypatch.setattr(configs, "load", fail)
    assert cli.main(["eval", "configs/eval/demo.yaml"]) == RunError.status
    shown = capsys.readouterr().err
    assert "AttributeError" in shown
    assert RANDOM not in shown
    assert "\x1b" not in shown
