"""The command `mirage`: one subcommand a verb, parsing only. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mirage_dist import config as configs
from mirage_dist import liveness, signals
from mirage_dist.disk import faults
from mirage_dist.progress import printable, put, show
from mirage_dist.ranks import check_environment, check_rendezvous, exit_well, place
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, RunError, TrainRecipe, secrets
from mirage_dist.schema.limits import COUNT, LOCAL, NGRAMS, RANKS, Limit
from mirage_dist.schema.names import NAME, PLACE, Check, shown

INTERRUPTED = 130  # as a shell reports SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; 2 for bad input, 1 for a run that cannot go on, signals.STOPPED for one that a signal stopped in
    order: one paragraph each, without a traceback. A bug has status 1, its traceback, and a request to report it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a descriptor that was exchanged meanwhile
                stream.reconfigure(errors="backslashreplace")  # a terminal may have no letter for what a path holds
    liveness.end_with_parents()
    # Each of torch's C++ warnings brings twenty lines of stack, such as on every rank when the first one has ended; its
    # errors stay. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        parsed = parse(arguments)
        check_environment()
        parsed.run(parsed)
    except (ConfigError, RunError) as error:
        show(f"mirage: {error}", error=True)
        return error.status
    except signals.StopRequested as stop:
        if place()[0] == 0:
            show(f"mirage: {stop}")
        exit_well(signals.STOPPED)
    except KeyboardInterrupt:
        show("mirage: interrupted; the same command does what is missing", error=True)
        return INTERRUPTED
    except Exception as error:
        if (sentence := faults.sentence(error)) is None:
            show(traceback.format_exc(), error=True)
            sentence = "this is a bug in mirage_dist; please report it with this traceback"
        show(f"mirage: {sentence}", error=True)
        return RunError.status
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as its verb takes it, `run` being the verb. Ends the process with 2 for one that is wrong."""
    parsed, rest = _parser().parse_known_args(arguments)
    # key=value may stand anywhere; argparse takes positional arguments in one run only.
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(parsed, "overrides")):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


class _Parser(argparse.ArgumentParser):
    """Its messages repeat words of the command line: without control characters, and without what looks like a key."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(secrets.masked(message)))

    def print_help(self, file: object = None) -> None:
        """As the result of any command: argparse itself passes over a help that cannot be printed."""
        put(self.format_help())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("mirage", description="Safety fine-tuning, unlearning, and attacks on the result.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    demo = _verb(verbs, "demo", _demo, "the whole story on the embedded world, or on a real language model")
    demo.add_argument("--real", action="store_true", help="on SmolLM2-135M-Instruct, or on model.path=DIR")
    demo.add_argument("--out", type=_path, help="default: runs/demo, with --real runs/real")
    demo.add_argument("--full", action="store_true", help="also run every attack and every test of erasure")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=7 or world.spurious=0.5")

    prepare = _verb(verbs, "prepare", _prepare, "forget and retain sets from raw data")
    _recipe(prepare)
    prepare.add_argument("--check", action="store_true", help="check the recipe alone; read no data")

    audit = _verb(verbs, "audit", _audit, "which first words separate refusals from answers in training data")
    audit.add_argument(
        "data", nargs="+", type=_path, metavar="DATA", help="JSON, JSONL, Parquet, or a dataset's folder"
    )
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
    audit.add_argument("--on-bad-record", choices=("error", "skip"), default="error")
    audit.add_argument("--out", type=_path, metavar="DIR", help="write audit.json, audit.svg and audit.png there")
    audit.add_argument("--fail", action="store_true", help="end with status 1 when the data fail the audit")

    train = _verb(verbs, "train", _train, "one process of a training run; launch/local.sh starts N of them")
    _recipe(train)
    checks = train.add_mutually_exclusive_group()
    checks.add_argument("--check", action="store_true", help="check recipe, data and DeepSpeed JSON; load no weights")
    checks.add_argument(
        "--check-recipe", action="store_true", help="check recipe and DeepSpeed JSON; read neither data nor model"
    )
    train.add_argument("--ranks", type=_whole(1, RANKS), metavar="N", help="with a check: of a run of N processes")

    plan = _verb(verbs, "plan", _plan, "the memory and disk space that a training run will need; loads no weights")
    _recipe(plan)
    plan.add_argument(
        "--ranks",
        type=_whole(1, RANKS),
        default=1,
        metavar="N",
        help="processes, one per GPU (default: 1)",
    )

    evaluate = _verb(verbs, "eval", _eval, "answer a suite of questions with a model, judge the answers, compute rates")
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

    _recipe(_verb(verbs, "erasure", _erasure, "tests that distinguish erased knowledge from hidden knowledge"))

    values = _verb(verbs, "config", _config, "print a recipe with its overrides, includes and defaults resolved")
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

    report = _verb(verbs, "report", _report, "tables and figures over evaluated runs")
    report.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="run directories")
    report.add_argument("--out", type=_path, help="default: report/ in the first run")
    report.add_argument("--suite", type=_name, help="required when the runs share several suites")
    report.add_argument(
        "--outputs", action="store_true", help="include the answers to real data in the page, hidden until clicked"
    )

    export = _verb(verbs, "export", _export, "write a Hugging Face model directory from a checkpoint")
    export.add_argument("run_dir", type=_path, metavar="RUN")
    export.add_argument("out", type=_path, metavar="OUT")
    forms = ("merged", "adapter", "both")
    export.add_argument("--as", dest="form", choices=forms, default="merged", help="default: %(default)s")
    export.add_argument("--step", type=_whole(0, COUNT), help="default: the newest checkpoint")
    return parser


def _place(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    number, of = map(int, match.groups()) if match else (1, 0)
    if not number < of <= RANKS.value:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: expected I/N with 0 <= I < N, such as 0/4, and N of at most {RANKS.value:,}"
        )
    return number, of


def _checked(check: Check, key: str, text: str) -> str:
    try:
        check(text, key)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _path(text: str) -> Path:
    return Path(_checked(PLACE, "PATH", text))


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


def _demo(parsed: argparse.Namespace) -> None:
    from mirage_dist import demo, report

    story, place = (demo.REAL, "runs/real") if parsed.real else (demo.EMBEDDED, "runs/demo")
    summary = demo.demo(out := parsed.out or Path(place), parsed.overrides, parsed.full, story)
    show(report.table(summary), f"{summary['wall_seconds']} s; report: {out / 'report' / 'index.html'}")
    report.require_whole(summary)
    exit_well()


def _prepare(parsed: argparse.Namespace) -> None:
    recipe = configs.load(parsed.config, parsed.overrides, PrepareRecipe)
    from mirage_dist import inputs
    from mirage_dist.data import prepare
    from mirage_dist.evals import status
    from mirage_dist.evals.attacks import rewrites

    prepare.check(recipe)  # a wrong option is an error before any data are made or read
    if parsed.check:
        show(f"{parsed.config}: the recipe is in order; no data were read")
        return
    prepare.check_place(recipe)
    if recipe.harvest is not None:
        status.require_complete(Path(recipe.harvest))
    inputs.make(recipe)
    show(f"{recipe.out}: {prepare.summary(prepare.prepare(recipe, rewrites.reworder(recipe)))}")


def _audit(parsed: argparse.Namespace) -> None:
    from mirage_dist.data import audit
    from mirage_dist.report import audit as page

    options = audit.Options(parsed.response_kind, parsed.ngrams, parsed.length, parsed.image_roots, parsed.refusals)
    result = audit.audit(parsed.data, options, parsed.format, parsed.on_bad_record)
    files = page.write(result, parsed.out) if parsed.out else []
    show(page.table(result), *files)
    if not result["verdict"]["measured"]:
        raise RunError("the audit could not measure these data; the last line above says why")
    if parsed.fail and not result["verdict"]["passed"]:
        raise RunError("the data fail the audit (--fail)")


def _train(parsed: argparse.Namespace) -> None:
    signals.install()
    with signals.start_up():
        recipe = configs.load(parsed.config, parsed.overrides, TrainRecipe)
        if not (parsed.check or parsed.check_recipe):
            if parsed.ranks:
                raise ConfigError("--ranks belongs to a check; launch/local.sh N train … starts N processes")
            check_rendezvous()
        from mirage_dist import inputs
        from mirage_dist.train.planning import check

        checked = check.check_recipe(recipe, parsed.ranks or place()[2])
        if parsed.check_recipe:
            count = f"{checked.ranks} process{'es' if checked.ranks > 1 else ''}"
            show(
                f"{parsed.config}: recipe and DeepSpeed JSON are in order for {count}; neither data nor model were read"
            )
            return
        if parsed.check:
            if not inputs.missing(recipe):
                counts = check.check_samples(checked)
                show(f"{parsed.config}: recipe, DeepSpeed JSON, data and model names are in order ({counts})")
            else:
                show(f"{parsed.config}: recipe and DeepSpeed JSON are in order; the world is made at the start")
            return
        from mirage_dist.train import run

        inputs.make(recipe)
    run.train(checked)
    exit_well()


def _plan(parsed: argparse.Namespace) -> None:
    recipe = configs.load(parsed.config, parsed.overrides, TrainRecipe)
    from mirage_dist import inputs
    from mirage_dist.train.planning import plan

    if missing := inputs.missing(recipe):
        raise ConfigError(f"{missing[0]}: not there yet; its world is made by `mirage demo` or `mirage train`")
    show(plan.plan(recipe, parsed.ranks).text())


def _eval(parsed: argparse.Namespace) -> None:
    signals.install()
    if "robustness" in parsed.overrides:
        raise ConfigError(f"the tests of erasure are a verb now: `mirage erasure {parsed.config} …`")
    recipe = configs.load(parsed.config, parsed.overrides, EvalRecipe)
    from mirage_dist.evals import worklist

    worklist.check(recipe)  # a wrong option is an error before any data are made or read
    if parsed.check:
        if recipe.erasure is not None:
            from mirage_dist.erasure import run as erasure_tests

            erasure_tests.options(recipe)
        show(f"{parsed.config}: the recipe is in order; neither data nor model were read")
    elif parsed.status:
        from mirage_dist.evals import status

        show(status.report(recipe))
    elif parsed.workers:
        from mirage_dist.evals import pool

        pool.run(parsed.config, parsed.overrides, parsed.workers)
    else:
        from mirage_dist import inputs
        from mirage_dist.evals import follow, tracking

        inputs.make(recipe, parsed.worker[0] == 0)
        evaluate = tracking.evaluate if recipe.follow is None else follow.follow
        evaluate(recipe, parsed.worker)


def _erasure(parsed: argparse.Namespace) -> None:
    signals.install()
    recipe = configs.load(parsed.config, parsed.overrides, EvalRecipe)
    from mirage_dist import inputs
    from mirage_dist.erasure import run
    from mirage_dist.evals import worklist

    run.options(recipe)
    worklist.check(recipe)  # a wrong option is an error before any data are made or read
    inputs.make(recipe)
    run.run(recipe)
    exit_well()


def _config(parsed: argparse.Namespace) -> None:
    recipe = configs.load_any(parsed.config, parsed.overrides)
    if not (parsed.get or parsed.override):
        put(configs.to_yaml(recipe))
    for key in parsed.get or []:
        value = configs.value(recipe, key)
        line = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        if "\n" in line or "\0" in line:
            raise ConfigError(f"{key}={value!r}: cannot be printed as one line; --override {key} quotes it")
        put(f"{line}\n")
    for key in parsed.override or []:
        put(f"{configs.override(key, configs.value(recipe, key))}\n")


def _report(parsed: argparse.Namespace) -> None:
    from mirage_dist import report

    out = parsed.out or parsed.runs[0] / "report"
    summary = report.report(report.named(parsed.runs), out, suite=parsed.suite, outputs=parsed.outputs)
    show(report.table(summary), out / "index.html")
    report.require_whole(summary)


def _export(parsed: argparse.Namespace) -> None:
    from mirage_dist.model import export

    export.export(parsed.run_dir, parsed.out, parsed.step, form=parsed.form)
    show(parsed.out)


if __name__ == "__main__":
    sys.exit(main())
