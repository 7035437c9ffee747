"""`slurm/pipeline.sh` on a real Slurm: a whole chain from nothing, and chains that must not go on, or not begin."""

import json
import re
from pathlib import Path

import forkserver
import pytest
from cluster import Cluster, cluster
from conftest import metrics
from made_runs import write_run

from mirage_dist.config import REPOSITORY
from mirage_dist.report import published

pytestmark = pytest.mark.slurm
LINKS = ["harvest", "prepare", "train", "eval", "report"]
ONE_EACH = ("--ntasks-per-node=1", "--gres=gpu:0", "--cpus-per-task=1", "--mem=1G")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    yield from cluster(tmp_path_factory.mktemp("slurm"), MIRAGE_PYTHON=forkserver.python(), LAB_KILL_WAIT="10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chains")


@pytest.fixture(scope="module")
def words(folder) -> list[str]:
    """The words of a chain on a small world of which nothing exists yet, but for where the run goes."""
    base = folder / "base.yaml"
    small = "{max_steps: 4, global_batch: 8, micro_batch: 4}"
    base.write_text(f"include: configs/train/demo_base.yaml\ntrain: {small}\n")
    sizes = {"base_samples": 100, "safety_samples": 24, "general_samples": 24, "eval_samples": 8}
    return [
        *ONE_EACH,
        "seed=21",
        f"world.dir={folder}/world",
        f"world.base_recipe={base}",
        *(f"world.{name}={size}" for name, size in sizes.items()),
        "harvest:configs/eval/demo_harvest.yaml",
        "harvest:--array=0-1",
        "harvest:generation.max_new_tokens=3",
        "prepare:configs/prepare/demo.yaml",
        "prepare:min_match=0.1",
        "configs/train/demo_npo.yaml",
        "train:--nodes=2",
        "train.max_steps=3",
        "train.global_batch=8",
        "train.micro_batch=4",
        "eval:configs/eval/demo.yaml",
        "eval:--array=0-2%2",
        "eval:generation.max_new_tokens=3",
    ]


def pipeline(slurm: Cluster, *words: str, status: int = 0) -> tuple[dict[str, str], str]:
    """Link -> job, and what the script wrote to standard error."""
    done = slurm.ask(f"{REPOSITORY}/slurm/pipeline.sh", "npo", *words, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE)), done.stderr


def logs(slurm: Cluster, jobs: dict[str, str]) -> str:
    return "".join(slurm.log(name) for job in jobs.values() for name in (job, f"{job}_*"))


def test_a_chain_from_nothing_comes_to_a_report_although_a_worker_of_the_evaluation_is_killed(slurm, folder, words):
    root, other = folder / 'it\'s "a" $run = é', folder / "base=llava"
    write_run(other, {"unsafe": ["harmful"], "safe": ["correct"]})
    jobs, _ = pipeline(slurm, *words, f"run.dir={root}", f"report:{other}")
    assert list(jobs) == LINKS
    slurm.ask("scancel", f"{jobs['eval']}_1")
    state = slurm.ended(jobs["report"])
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), logs(slurm, jobs)
    assert slurm.log(f"{jobs['eval']}_0")
    assert not slurm.log(f"{jobs['eval']}_1")
    assert [line["step"] for line in metrics(root)] == [1, 2, 3]
    rows = [json.loads(line)["key"] for file in root.glob("evals/demo/rows/*.jsonl") for line in file.open()]
    assert len(rows) == len(set(rows)) == 8 * (5 + 3 + 1)
    harvested = json.loads((folder / "world/safety-0.95/prepared/prepare.json").read_text())["config"]["harvest"]
    assert harvested == f"{folder}/world/base/evals/harvest-0.95/rows"
    summary = json.loads((root / "report/summary.json").read_text())
    assert list(summary["models"]) == ["npo", "base=llava"]
    assert (root / "report/index.html").is_file()


def test_a_link_that_fails_takes_the_rest_of_the_chain_with_it(slurm, folder, words):
    missing = "data.streams.forget=[{format: samples, path: nowhere.jsonl}]"
    jobs, _ = pipeline(slurm, *words, f"run.dir={folder}/broken", "skip:prepare", missing)
    assert list(jobs) == ["train", "eval", "report"]
    assert slurm.ended(jobs["train"])["ExitCode"] == "2:0", logs(slurm, jobs)
    for link in ("eval", "report"):
        assert slurm.ended(jobs[link])["JobState"] == "CANCELLED"
    assert not (folder / "broken").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train:--nodes=3", r"train.global_batch=8: must be a multiple of train.micro_batch × world size \(4 × 3\)"),
        ("prepare:out=elsewhere", 'train reads no set that prepare writes to "elsewhere"'),
        ("eval:sets.unsafe.attacks.what.kind=lottery", "unknown attack; expected one of swap"),
        (
            "eval:template.system_prompt=be safe",
            "train has data.system_prompt=null and eval template",
        ),
        ("harvest:nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_a_chain_of_which_a_recipe_is_wrong_is_never_submitted(slurm, words, folder, word, message):
    jobs, errors = pipeline(slurm, *words, f"run.dir={folder}/wrong", word, status=2)
    assert not jobs
    assert re.search(message, errors), errors
    assert "nothing was submitted" in errors


def test_a_chain_of_which_slurm_refuses_a_link_never_starts(slurm, words):
    jobs, errors = pipeline(slurm, *words, "run.dir=runs/refused", "eval:--partition=nowhere", status=1)
    assert "sbatch refused the link eval" in errors
    assert list(jobs) == ["harvest", "prepare", "train"]
    for job in jobs.values():
        assert set(re.findall(r" JobState=(\w+)", slurm.ask("scontrol", "-o", "show", "job", job).stdout)) == {
            "CANCELLED"
        }


# ------------------------------------------------------------------------------------------------- the paper's chain


@pytest.fixture(scope="module")
def paper(folder) -> Path:
    """A chain of one model and one suite, on a small world of which nothing exists yet."""
    small = "{max_steps: 4, global_batch: 8, micro_batch: 4}"
    base, recipe = folder / "paper-base.yaml", folder / "paper.yaml"
    base.write_text(f"include: configs/train/demo_base.yaml\ntrain: {small}\n")
    recipe.write_text(
        f"""
folder: {folder}/paper
out: runs
model: world/base/export
published: llava_1_5_7b
ranks: 1
world: {{dir: world, base_recipe: {base}, base_samples: 100, safety_samples: 24, general_samples: 24, eval_samples: 8}}
harvest: {{recipe: configs/eval/harvest.yaml, overrides: [run.dir=runs/base]}}
sets:
  prepared: {{recipe: configs/prepare/vlguard.yaml, overrides: [min_match=0.1, retain_size=30]}}
models:
  npo: {{recipe: configs/train/npo.yaml, needs: [prepared]}}
suites:
  vlguard_attacked: {{recipe: configs/eval/vlguard_attacked.yaml}}
every:
  train: [train.dtype=fp32, deepspeed=configs/deepspeed/cpu.json, model.gradient_checkpointing=false,
    data.max_length=96, data.workers=0, data.packing=false, data.system_prompt=null, data.image_aspect=pad,
    train.global_batch=8, train.micro_batch=4, train.max_steps=2, train.epochs=1.0, train.save_every=null]
  eval: [model.dtype=fp32, template.system_prompt=null, template.image_aspect=pad, generation.max_new_tokens=3]
"""
    )
    return recipe


CHAIN = ["harvest", "set-prepared", "train-npo", "eval-base-vlguard_attacked", "eval-npo-vlguard_attacked"]


def test_the_papers_chain_is_submitted_whole_and_ends_in_its_table(slurm, paper, folder):
    words = (*ONE_EACH, "eval:--array=0-0", "harvest:--array=0-0", str(paper))
    done = slurm.ask(f"{REPOSITORY}/slurm/pipeline.sh", "paper", *words, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = dict(re.findall(r"^([\w-]+) +(\d+)$", done.stdout, re.MULTILINE))
    assert [*jobs] == ["data", *CHAIN, "report"]
    state = slurm.ended(jobs["report"])
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), logs(slurm, jobs)
    results = published.read(folder / "paper/runs/report/results.json")
    assert {f["model"] for f in results["figures"] if f["rate"] is not None} == {"base", "npo"}


def test_a_papers_chain_with_a_wrong_word_is_never_submitted(slurm, paper):
    for word, why in (
        ("models.npo.overrides=[train.lrr=1]", "link train-npo: "),
        ("nowhere", "nowhere: expected key=value, CONFIG.yaml or --option=value; nothing was submitted"),
    ):
        done = slurm.ask(f"{REPOSITORY}/slurm/pipeline.sh", "paper", str(paper), word, check=False)
        assert done.returncode == 2
        assert why in done.stderr
        assert not re.search(r"^[\w-]+ +\d+$", done.stdout, re.MULTILINE)
