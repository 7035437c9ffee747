"""The arguments of each verb."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mirage_dist.cli import power as power_verb
from mirage_dist.cli import project
from mirage_dist.cli import verbs as run
from mirage_dist.config import nearest
from mirage_dist.progress import printable, put
from mirage_dist.project.listing import KINDS
from mirage_dist.schema import ConfigError, secrets
from mirage_dist.schema.limits import COUNT, LOCAL, MAGNITUDE, NGRAMS, RANKS, Limit
from mirage_dist.schema.names import NAME, PLACE, Check, shown


class _Parser(argparse.ArgumentParser):
    """Its messages repeat words of the command line: without control characters, and without what looks like a key."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(secrets.masked(message)))

    def print_help(self, file: object = None) -> None:
        """As the result of any command: argparse itself passes over a help that cannot be printed."""
        put(self.format_help())


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; `run` of what it parses is the verb's function in `cli.verbs`."""
    parser = _Parser("mirage", description="Safety fine-tuning, unlearning, and attacks on the result.")
    parser.add_argument("--version", action=project.Version, help="print the versions of mirage and of its libraries")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    demo = _verb(verbs, "demo", run.demo, "the whole story on the embedded world, or on a real language model")
    demo.add_argument("--real", action="store_true", help="on SmolLM2-135M-Instruct, or on model.path=DIR")
    demo.add_argument("--out", type=_path, help="default: runs/demo, with --real runs/real")
    demo.add_argument("--full", action="store_true", help="also every unlearning method, attack and test of erasure")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=7 or world.spurious=0.5")

    prepare = _verb(verbs, "prepare", run.prepare, "forget and retain sets from raw data")
    _recipe(prepare)
    prepare.add_argument("--check", action="store_true", help="check the recipe alone; read no data")

    audit = _verb(verbs, "audit", run.audit, "which first words separate refusals from answers in training data")
    audit.add_argument(
        "data", nargs="+", type=_data, metavar="DATA", help="JSON, JSONL, Parquet, a dataset's folder, hf://OWNER/NAME"
    )
    audit.add_argument("--config", dest="configuration", metavar="C", help="of a dataset of the hub that has several")
    audit.add_argument("--split", metavar="S", help="of a dataset of the hub")
    audit.add_argument(
        "--format", metavar="F", help="of all files, a name or module:Class; default: decided by each first record"
    )
    audit.add_argument(
        "--response-kind",
        default="list",
        metavar="KIND",
        help="what counts as a refusal: list (our phrases, the default), published (VLGuard's), label (`safe`), or "
        "FIELD=VALUE of a record",
    )
    audit.add_argument(
        "--refusals", metavar="FILE", help="a JSON list of refusal phrases in place of ours, for another language"
    )
    audit.add_argument("--ngrams", type=_whole(1, NGRAMS), default=1, metavar="N", help="also the first 2, …, N words")
    audit.add_argument("--length", action="store_true", help="also the question's length")
    audit.add_argument("--image-roots", action="store_true", help="also the first folder of the picture's path")
    audit.add_argument(
        "--on-bad-record", choices=("error", "skip"), default="error", help="end there, or leave it out and count it"
    )
    audit.add_argument("--out", type=_path, metavar="DIR", help="write audit.json, audit.svg and audit.png there")
    audit.add_argument("--fail", action="store_true", help="end with status 1 when the data fail the audit")

    data = _verb(verbs, "data", run.data, "published files: where they are, and whether those here are right")
    data.add_argument("action", choices=("list", "check", "get"), help="list all, check those here, or download")
    data.add_argument("names", nargs="*", type=_data, metavar="NAME", help="of the list, or hf://OWNER/NAME[@REVISION]")
    data.add_argument("--root", type=_path, default=Path("data"), help="the folder of all data; default: data")

    paper = _verb(
        verbs, "paper", run.paper, "a published table beside ours, from published data, as one chain of recipes"
    )
    paper.add_argument("config", nargs="?", default="configs/paper/llava_1_5_7b.yaml", help="default: %(default)s")
    paper.add_argument("overrides", nargs="*", metavar="key=value", help="such as model=DIR or out=runs/paper-2")
    paper.add_argument(
        "--scale", choices=("tiny",), help="tiny: the same recipes on a small model and look-alike files"
    )
    what = paper.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="check data and recipes; run nothing")
    what.add_argument("--plan", action="store_true", help="what runs when, side by side, and what it will take")
    what.add_argument("--local", action="store_true", help="run what is missing on this machine, and make the report")
    what.add_argument("--links", action="store_true", help="the chain for slurm/pipeline.sh, a line a link")
    what.add_argument("--data", action="store_true", help="make the look-alike files and the model of a small scale")
    what.add_argument("--report", action="store_true", help="make the report of what was run")

    train = _verb(verbs, "train", run.train, "a training run: one process of it, or (--ranks N) all of them")
    _recipe(train)
    checks = train.add_mutually_exclusive_group()
    checks.add_argument("--check", action="store_true", help="check recipe, data and DeepSpeed JSON; load no weights")
    checks.add_argument(
        "--check-recipe", action="store_true", help="check recipe and DeepSpeed JSON; read neither data nor model"
    )
    train.add_argument(
        "--ranks",
        type=_whole(1, RANKS),
        metavar="N",
        help="start N processes here; with a check: of a run of N processes",
    )

    plan = _verb(
        verbs, "plan", run.plan, "memory, time, communication, disk and cost of a training run, before it runs"
    )
    _recipe(plan)
    plan.add_argument("--nodes", type=_whole(1, RANKS), metavar="N", help="default: as many as --ranks take, or 1")
    plan.add_argument("--gpus", type=_whole(1, LOCAL), metavar="G", help="of a node; default: that GPU's usual node")
    plan.add_argument("--gpu", default="h100", metavar="NAME", help="h100, h200, a100, …; default: %(default)s")
    plan.add_argument("--ranks", type=_whole(1, RANKS), metavar="N", help="GPUs of all nodes; default: nodes × gpus")
    plan.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="FIELD=VALUE|FILE",
        help="other numbers than the table's, such as network_gb_s=25; or a YAML or JSON file of them",
    )
    plan.add_argument("--price", type=_price, metavar="P", help="of a GPU-hour, in any currency; without it no cost")
    plan.add_argument("--samples", type=_whole(1, COUNT), metavar="N", help="before there are data: of each stream")
    plan.add_argument("--tokens", metavar="MEAN[,LONGEST]", help="… tokens of a row, its picture's among them")
    plan.add_argument("--responses", metavar="MEAN[,LONGEST]", help="… tokens of the answers among them")
    plan.add_argument("--picture-tokens", type=_whole(1, COUNT), default=0, metavar="N", help="of one picture")
    plan.add_argument("--json", action="store_true", help="one JSON object (docs/planning.md) in place of the table")

    doctor = _verb(verbs, "doctor", run.doctor, "whether this machine, allocation and file system can carry a run")
    doctor.add_argument(
        "--dir", type=_path, metavar="RUNS", help="where runs are to be written; default: the recipe's, or runs"
    )
    doctor.add_argument(
        "--recipe", metavar="CONFIG", help="a recipe of training: space, model and data are checked too"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object (docs/doctor.md)")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")

    evaluate = _verb(
        verbs, "eval", run.evaluate, "answer a suite of questions with a model, judge the answers, compute rates"
    )
    _recipe(evaluate)
    how = evaluate.add_mutually_exclusive_group()
    how.add_argument(
        "--workers", type=_whole(1, LOCAL), metavar="N", help="start N workers on this machine and wait for them"
    )
    how.add_argument(
        "--worker", type=_place, default=(0, 1), metavar="I/N", help="begin at the place of worker I (from 0) of N"
    )
    how.add_argument("--status", action="store_true", help="report the progress of the evaluation and exit")
    how.add_argument("--check", action="store_true", help="check the recipe alone; read neither data nor model")

    _recipe(_verb(verbs, "erasure", run.erasure, "tests that distinguish erased knowledge from hidden knowledge"))

    values = _verb(verbs, "config", run.config, "print a recipe with its overrides, includes and defaults resolved")
    _recipe(values)
    values.add_argument(
        "--get",
        action="append",
        metavar="KEY",
        help="only this value, on a line: text as it is, else JSON; repeatable",
    )
    values.add_argument(
        "--override", action="append", metavar="KEY", help="this value as KEY=VALUE, quoted for a command; repeatable"
    )

    sweep = _verb(
        verbs, "sweep", run.sweep, "a search over recipe keys and seeds, and the forget–retain frontier of its results"
    )
    _recipe(sweep)
    sweep.add_argument(
        "--jobs", type=_whole(1, LOCAL), default=1, metavar="N", help="points at once on this machine (default: 1)"
    )
    sweep.add_argument("--ranks", type=_whole(1, RANKS), metavar="N", help="processes of a training; default: `ranks`")
    what = sweep.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="check every point and name it; run nothing")
    what.add_argument("--status", action="store_true", help="how far each point is")
    what.add_argument("--slurm", action="store_true", help="write the missing points for one job array, and print it")

    report = _verb(verbs, "report", run.report, "tables and figures over evaluated runs")
    report.add_argument("runs", nargs="*", type=_path, metavar="RUN", help="run directories")
    report.add_argument(
        "--compare",
        nargs="+",
        type=_path,
        metavar="FILE",
        help="in their place: results.json of `mirage paper`, side by side",
    )
    report.add_argument(
        "--sweep",
        type=_path,
        metavar="DIR",
        help="the frontier of a sweep first; without RUN, its chosen points follow",
    )
    report.add_argument("--out", type=_path, help="default: report/ in the sweep, or else in the first run")
    report.add_argument("--suite", type=_name, help="required when the runs share several suites")
    report.add_argument("--pdf", action="store_true", help="write each figure of the page as a PDF too")
    report.add_argument(
        "--outputs", action="store_true", help="include the answers to real data in the page, hidden until clicked"
    )

    power = _verb(verbs, "power", power_verb.power, "how many questions a difference of two rates needs, exactly")
    power.add_argument("--before", type=_share, required=True, metavar="P", help="the one rate, from 0 to 1")
    power.add_argument("--after", type=_share, metavar="P", help="the other rate: how many questions show this change?")
    power.add_argument(
        "--questions",
        type=_whole(1, COUNT),
        metavar="N",
        help="in its place: which change do so many show?",
    )
    power.add_argument(
        "--discordance",
        type=_share,
        metavar="D",
        help="paired: the share of questions on which the two measurements differ; default: of independent ones",
    )
    power.add_argument("--unpaired", action="store_true", help="two sets of different questions; N of each")
    power.add_argument(
        "--level",
        type=_part,
        default=0.05,
        metavar="A",
        help="of the two-sided test, at most 0.5; default: %(default)s",
    )
    power.add_argument(
        "--power", type=_chance, default=0.8, metavar="P", help="the chance to find the change; default: %(default)s"
    )
    power.add_argument("--json", action="store_true", help="one JSON object (docs/evaluation.md) in place of the text")

    export = _verb(verbs, "export", run.export, "write a Hugging Face model directory from a checkpoint")
    export.add_argument("run_dir", type=_path, metavar="RUN", help="the directory of a training run")
    export.add_argument("out", type=_path, metavar="OUT", help="a new directory")
    forms = ("merged", "adapter", "both")
    export.add_argument("--as", dest="form", choices=forms, default="merged", help="default: %(default)s")
    export.add_argument("--step", type=_whole(0, COUNT), help="default: the newest checkpoint")
    export.add_argument("--base", metavar="OWNER/NAME", help="the base model's name on the hub, for card and adapter")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload to a model repository of the hub, private")
    export.add_argument("--artifact", metavar="NAME", help="record OUT as an artifact of the training run's W&B run")
    export.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    export.add_argument("--dry-run", action="store_true", help="with --push: write OUT, and say what would be uploaded")

    merge = _verb(
        verbs, "merge", run.merge, "add differences of tuned models to their base: base + Σ scale·(tuned − base)"
    )
    merge.add_argument("base", type=_data, metavar="BASE", help="the model that all of them were tuned from")
    merge.add_argument("out", type=_path, metavar="OUT", help="a new directory")
    merge.add_argument(
        "vectors", nargs="+", type=_vector, metavar="DIR=SCALE", help="a tuned model; a negative scale forgets its task"
    )

    _own(verbs)
    return parser


def _own(verbs: argparse._SubParsersAction) -> None:
    """The verbs about the project itself."""
    init = _verb(verbs, "init", project.init, "copy recipes, launchers and Slurm scripts into a directory to edit")
    init.add_argument("folder", nargs="?", type=_path, default=Path(), metavar="DIR", help="default: this directory")

    listed = _verb(verbs, "list", project.listing, "what recipes can name, and which recipes there are, a line each")
    listed.add_argument("kind", nargs="?", type=_kind, choices=KINDS, metavar="WORD", help=", ".join(KINDS))

    _recipe(_verb(verbs, "show", project.values, "print a resolved recipe, with where each of its values comes from"))

    complete = _verb(verbs, "completion", project.completion(parser), "print a completion script for a shell")
    complete.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell that is to complete")


def _kind(text: str) -> str:
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {nearest(text, KINDS)}")
    return text


def _place(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    number, of = map(int, match.groups()) if match else (1, 0)
    if not number < of <= RANKS.value:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: expected I/N with 0 <= I < N, such as 0/4, and N of at most {RANKS.value:,}"
        )
    return number, of


def _vector(text: str) -> tuple[str, float]:
    folder, _, scale = text.rpartition("=")
    try:
        return _data(folder), float(scale)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: expected DIR=SCALE, such as runs/npo/export=0.5 or runs/sft/export=-1"
        ) from None


def _checked(check: Check, key: str, text: str) -> str:
    try:
        check(text, key)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _path(text: str) -> Path:
    return Path(_checked(PLACE, "PATH", text))


def _data(text: str) -> str:
    return _checked(PLACE, "DATA", text)


def _whole(low: int, limit: Limit) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` to a limit."""
    high = limit.value

    def number(text: str) -> int:
        # At most as many digits as `high` has: Python converts no text of thousands of digits.
        value = int(text) if re.fullmatch(rf"-?[0-9]{{1,{len(str(high))}}}", text) else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number from {low} to {high:,}")
        return value

    return number


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price <= MAGNITUDE.value:
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a price from 0 to {MAGNITUDE}, such as 2.5")
    return price


def _within(expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of an argument that is a number for which `fits` holds."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{shown(text)}: expected {expected}")
        return value

    return number


_share = _within("a share from 0 to 1, such as 0.25", lambda x: 0 <= x <= 1)
_part = _within("a level from 1e-9 to 0.5, such as 0.05", lambda x: 1e-9 <= x <= 0.5)
_chance = _within("a power above 0 and below 1, such as 0.8", lambda x: 0 < x < 1)


def _name(text: str) -> str:
    return _checked(NAME, "SUITE", text)


def _verb(
    verbs: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run)
    return verb


def _recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", help="a YAML recipe")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=5e-7")
