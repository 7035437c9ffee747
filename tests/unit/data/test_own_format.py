"""The format of docs/data.md, written to a file outside the package, is read by every command as a built-in one is."""

import json
import re
import sys

import pytest
from PIL import Image

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, sources
from mirage_dist.schema import ConfigError, TrainRecipe

NAME = "my_lab.data:Risky"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A working directory with the example as my_lab/data.py and a file of its records."""
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/data.md").read_text(), re.S)
    assert len(example.splitlines()) <= 30
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/data.py").write_text(example)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    records = [row(i, f"It is number {i}.", 0.4) for i in range(6)] + [row(7, " ", 0.4), row(8, "Number 8.", 0.9)]
    (tmp_path / "risky.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[module]


def row(number, reply, risk):
    return {"uid": number, "photo": "a.png", "prompt": f"What is {number}?", "reply": reply, "risk": risk}


def test_records_become_samples_by_the_formats_own_option(lab):
    source = sources.read(formats.source(NAME, "risky.json"))
    assert [s.safe for s in source.samples] == [True] * 6 + [False]
    assert source.dropped == {"empty reply": 1}
    assert source.samples[0].image == "a.png"
    assert not any(s.safe for s in sources.read(formats.source(NAME, "risky.json", threshold=0.3)).samples)
    (lab / "bad.json").write_text(json.dumps([row(0, "Yes.", 1.5)]))
    with pytest.raises(ConfigError, match=r"bad\.json: record 0: field 'risk': expected 0 to 1, got 1\.5"):
        sources.read(formats.source(NAME, "bad.json"))


def test_prepare_and_the_audit_take_it(lab, capsys):
    recipe = f"{{out: out, answers: as_given, safety: [{{format: '{NAME}', path: risky.json, threshold: 0.3}}], "
    (lab / "prepare.yaml").write_text(f"{recipe} fill: [{{format: '{NAME}', path: risky.json}}], retain_size: 2}}")
    assert cli.main(["prepare", "prepare.yaml"]) == 0
    assert "forget 7 of 7 unsafe questions" in capsys.readouterr().out
    assert json.loads((lab / "out/prepare.json").read_text())["config"]["safety"][0]["threshold"] == 0.3
    assert cli.main(["audit", "risky.json", "--format", NAME, "--response-kind", "label"]) == 0
    assert f"risky.json ({NAME}): 8 records, 7 questions; left out: 1 × empty reply" in capsys.readouterr().out


def test_train_checks_it_and_a_recipe_reads_back_equal(lab, toy, capsys):
    stream = f"data.streams.train=[{{format: '{NAME}', path: {lab}/risky.json, threshold: 0.3}}]"
    overrides = [*toy.overrides("sft", lab / "run"), stream]
    assert cli.main(["train", "configs/train/demo_sft.yaml", "--check", *overrides]) == 0
    assert "train 7" in capsys.readouterr().out
    recipe = configs.load("configs/train/demo_sft.yaml", overrides, TrainRecipe)
    configs.write_yaml(recipe, lab / "config.yaml")
    assert configs.load(lab / "config.yaml", [], TrainRecipe) == recipe


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"format": "my_lab.data:Risky", "threshold": "high"}, r"train\[0\]\.threshold='high'; expected a number"),
        ({"format": "my_lab.data:Risky", "treshold": 0.3}, r"train\[0\]\.treshold'; did you mean 'threshold'"),
        ({"format": "my_lab.data:Nothing"}, r"train\[0\]\.format='my_lab\.data:Nothing': cannot be imported"),
        ({"format": "my_lab.data:Sample"}, r"train\[0\]\.format='my_lab\.data:Sample': not a subclass of .*Format"),
        ({"format": "coco"}, r"train\[0\]\.format='coco': unknown format; expected one of vlguard, .*or module:Class"),
        ({}, r"train\[0\]\.format=None: unknown format; expected one of vlguard"),
    ],
)
def test_a_wrong_name_or_option_is_an_error_before_data_are_read(lab, toy, source, words):
    overrides = toy.overrides("sft", lab / "run")
    stream = json.dumps([{"path": "nowhere.json", **source}])
    with pytest.raises(ConfigError, match=words):
        configs.load("configs/train/demo_sft.yaml", [*overrides, f"data.streams.train={stream}"], TrainRecipe)


def test_the_audit_lists_the_formats_before_it_reads(lab, capsys):
    assert cli.main(["audit", "nowhere.json", "--format", "coco"]) == 2
    assert "--format='coco': unknown format; expected one of vlguard, llava" in capsys.readouterr().err
    assert cli.main(["audit", "risky.json", "--format", "figstep"]) == 2
    assert "figstep records have no answers; there is nothing to audit" in capsys.readouterr().err


def test_every_registered_format_is_a_format_under_its_own_name():
    assert {name: issubclass(formats.load(name, "", ""), formats.Format) for name in formats.REGISTRY} == dict.fromkeys(
        formats.REGISTRY, True
    )
    assert len(set(formats.REGISTRY.entries.values())) == len(formats.REGISTRY)
