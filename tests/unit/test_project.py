"""The verbs about the project: what is listed is what exists, a directory is made whole, values name their origin."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.config import HOME, REPOSITORY, home, provenance
from mirage_dist.data import formats
from mirage_dist.evals import attacks, defences, judges
from mirage_dist.objectives.base import REGISTRY as OBJECTIVES
from mirage_dist.paper import steps
from mirage_dist.paper.recipe import PaperRecipe
from mirage_dist.project import directory, listing
from mirage_dist.schema import ConfigError, EvalRecipe, TrainRecipe
from mirage_dist.train.optimizers.base import REGISTRY as OPTIMIZERS

REGISTRIES = {
    "objectives": OBJECTIVES,
    "attacks": attacks.REGISTRY,
    "judges": judges.REGISTRY,
    "defences": defences.REGISTRY,
    "formats": formats.REGISTRY,
    "optimizers": OPTIMIZERS,
}


# ------------------------------------------------------------------------------------------------------------- list


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_list_has_every_entry_of_its_registry_with_a_sentence(kind: str):
    listed = listing.entries(kind)
    assert list(listed) == list(REGISTRIES[kind])
    assert all(len(about) > 10 for about in listed.values())


def test_a_list_has_every_recipe_and_a_line_each(capsys):
    for kind, folders in listing.RECIPES.items():
        files = {str(f.relative_to(REPOSITORY)) for name in folders for f in (HOME / "configs" / name).glob("*.yaml")}
        assert cli.main(["list", kind]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines} == files
        assert all(len(line) <= listing.WIDTH and len(line.split()) > 1 for line in lines)
    assert cli.main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].strip()] == list(listing.KINDS)


def test_an_unknown_word_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["list", "objektives"])
    assert ended.value.code == 2
    assert "'objektives': did you mean 'objectives'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["list", "xyz"])
    assert "known here: recipes, objectives, attacks" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- init


def test_a_directory_gets_all_or_keeps_what_it_had(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/sft.sh").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 2
    assert "slurm: in the way, and nothing was copied" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["notes.txt", "slurm"]
    os.rename("slurm", "mine")
    assert cli.main(["init"]) == 0
    assert sorted(os.listdir()) == [".env.example", "configs", "launch", "mine", "notes.txt", "slurm"]
    assert f"export MIRAGE_PYTHON={sys.executable} " in Path(".env.example").read_text()
    assert cli.main(["init"]) == 2
    assert "configs, launch, slurm, .env.example: in the way" in capsys.readouterr().err
    assert cli.main(["init", "notes.txt"]) == 2
    assert "notes.txt is a file" in capsys.readouterr().err


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Here the last of the folders cannot be read."""
    source = tmp_path / "source"
    for name in ("configs", "launch"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text("x")
    (source / ".env.example").write_text("export MIRAGE_PYTHON=PYTHON\n")
    monkeypatch.setattr(home, "HOME", source)
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(FileNotFoundError):
            directory.make(tmp_path / name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "there"]
    assert not list((tmp_path / "there").iterdir())


# ----------------------------------------------------------------------------------------------- files found from here


def test_a_file_here_wins_over_one_of_the_package_and_the_log_names_both(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "configs/model/llava_1_5_7b.yaml"
    assert configs.find(name) == HOME / name
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text((HOME / name).read_text())
    assert configs.find(name) == Path(name)
    assert capsys.readouterr().err == ""  # it is the same
    Path(name).write_text("model: {path: mine}\n")
    recipe = configs.load("configs/train/npo.yaml", [], TrainRecipe)  # includes it
    assert recipe.model.path == "mine"
    assert f"{name}: the file here is used; the one in {HOME} differs from it" in capsys.readouterr().err


def test_a_chain_in_a_folder_of_its_own_has_the_recipes_of_the_directory_it_was_started_in(tmp_path, monkeypatch):
    monkeypatch.delenv("MIRAGE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    name = "configs/train/npo.yaml"
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text((HOME / name).read_text() + "\n# mine\n")
    recipe = configs.load("configs/paper/tiny.yaml", [], PaperRecipe)
    with steps.within(recipe):
        assert configs.find(name).samefile(tmp_path / name)
        assert configs.find("configs/train/rmu.yaml") == HOME / "configs/train/rmu.yaml"
        with pytest.raises(ConfigError, match=rf"looked here and in {tmp_path} and in {HOME}"):
            configs.find("no.yaml")
    assert "MIRAGE_HOME" not in os.environ


# ------------------------------------------------------------------------------------------------------------- show


def test_each_value_names_the_line_that_set_it(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "objective:\n  name: npo\n  beta: 0.7\ntrain:\n  lr: 1e-4\n  epochs: 2\n  micro_batch: 1\nmodel: {path: base}\n"
    )
    (tmp_path / "own.yaml").write_text(
        f"include: {tmp_path}/base.yaml\n"
        "run:\n  dir: runs/x\n"
        "train: {epochs: 3}\n"
        "data:\n  max_length: 8\n  streams:\n"
        "    train: {path: '${run.dir}/data.json', format: llava}\n"
        "objective: {name: sft}\n"
    )
    (tmp_path / "late.yaml").write_text("model:\n  path: late\n")
    overrides = [f"include={tmp_path}/late.yaml", "train.global_batch=4", "model.train=[decoder]"]
    shown = {line.key: line for line in provenance.values(tmp_path / "own.yaml", overrides)}
    origins = {
        "run.dir": f"{tmp_path}/own.yaml:3",
        "train.epochs": f"{tmp_path}/own.yaml:4",
        "train.lr": f"{tmp_path}/base.yaml:5 (include)",
        "model.path": f"{tmp_path}/late.yaml:2 (include)",
        "data.streams.train[0].path": f"{tmp_path}/own.yaml:8, as ${{run.dir}}/data.json",
        "objective.name": f"{tmp_path}/own.yaml:9",
        "train.global_batch": "override",
        "model.train[0]": "override",
        "seed": "default",
    }
    assert {key: shown[key].origin for key in origins} == origins
    assert "objective.beta" not in shown  # of another class than the one chosen in the end
    assert shown["data.streams.train[0].path"].value == "runs/x/data.json"


@pytest.mark.parametrize("file", ["train/npo_parity", "train/rmu_lora", "eval/vlguard", "prepare/vlguard", "eval/demo"])
def test_a_value_with_a_line_stands_in_that_line_and_all_lines_together_are_the_recipe(file: str):
    path = f"configs/{file}.yaml"
    lines = provenance.values(path, [])
    recipe = configs.load(path, [], configs.schema_of(path))
    for line in lines:
        assert configs.value(recipe, line.key) == line.value
        if line.origin == provenance.DEFAULT:
            continue
        place, _, written = line.origin.partition(", as ")
        source, _, number = place.removesuffix(" (include)").rpartition(":")
        text = Path(source).read_text().splitlines()[int(number) - 1]
        if not written and isinstance(line.value, str | bool | int) and not text.rstrip().endswith((">-", "|")):
            words = line.value if isinstance(line.value, str) else str(line.value).lower()
            assert words[:20] in text, f"{line} is not in: {text}"
    assert len({line.key for line in lines}) == len(lines)


def test_shown_lines_are_overrides_that_read_back(capsys):
    assert cli.main(["show", "configs/eval/pope.yaml", "run.dir=runs/it's"]) == 0
    lines = [line.rpartition("  # ")[0].rstrip() for line in capsys.readouterr().out.splitlines()]
    wanted = configs.load("configs/eval/pope.yaml", ["run.dir=runs/it's"], EvalRecipe)
    assert configs.load("configs/eval/pope.yaml", lines, EvalRecipe) == wanted
    assert cli.main(["show", "configs/eval/pope.yaml", "run.dri=x"]) == 2
    assert "did you mean 'dir'?" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- train --ranks


STUB = """#!/bin/bash
[[ $1 != -c ]] || exec {python} "$@"
trap 'echo "$RANK" >>{folder}/stopped; exit 75' TERM
echo "$RANK of $WORLD_SIZE: ${{*:3}}" >>{folder}/started
if [[ -e {folder}/fail && $RANK == 1 ]]; then exit 7; fi
while :; do sleep 0.05; done
"""


@pytest.fixture
def ranks(tmp_path):
    """`mirage train` with three ranks, each of which writes down that it has started and whether it was stopped."""
    (tmp_path / "python").write_text(STUB.format(python=sys.executable, folder=tmp_path))
    (tmp_path / "python").chmod(0o700)
    words = ["train", "configs/train/npo.yaml", "run.dir=x y", "--ranks", "3"]
    code = f"import sys; sys.executable = {str(tmp_path / 'python')!r}; from mirage_dist import cli; cli.main({words})"
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}

    def start() -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=inherited, **pipes)

    return start


def test_ranks_are_started_stopped_on_request_and_their_status_is_the_commands(ranks, tmp_path):
    process = ranks()
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() or len((tmp_path / "started").read_text().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    started = sorted((tmp_path / "started").read_text().splitlines())
    assert started == [f"{rank} of 3: train configs/train/npo.yaml run.dir=x y" for rank in range(3)]
    assert sorted((tmp_path / "stopped").read_text().split()) == ["0", "1", "2"]


def test_a_rank_that_fails_ends_the_others(ranks, tmp_path):
    (tmp_path / "fail").touch()
    process = ranks()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 7, output
    assert "rank 1 ended with status 7; stopping the others" in output


def test_ranks_are_refused_in_a_rank_and_a_typo_starts_none(monkeypatch, capsys):
    assert cli.main(["train", "configs/train/npo.yaml", "train.lrr=1", "--ranks", "2"]) == 2
    assert "did you mean 'lr'?" in capsys.readouterr().err
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "configs/train/npo.yaml", "--ranks", "2"]) == 2
    assert "--ranks 2 starts processes, and this one is already one of 4" in capsys.readouterr().err


def test_completion_knows_every_verb_and_word(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("train", "init", "--check-recipe", "optimizers"))


def test_a_recipe_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="has none of the keys"):
        provenance.values(tmp_path / "a.yaml", [])
