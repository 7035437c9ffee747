"""What each verb of the command does with its parsed arguments."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from mirage_dist import config as configs
from mirage_dist import launching, signals
from mirage_dist.imports import loading
from mirage_dist.progress import put, show
from mirage_dist.ranks import check_rendezvous, exit_well, place
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, RunError, TrainRecipe


def demo(parsed: argparse.Namespace) -> None:
    from mirage_dist import demo
    from mirage_dist.report import require_whole, table

    story, place = (demo.REAL, "runs/real") if parsed.real else (demo.EMBEDDED, "runs/demo")
    summary = demo.demo(out := parsed.out or Path(place), parsed.overrides, parsed.full, story)
    lines = demo.ending(out, summary, parsed.full, parsed.real, parsed.overrides)
    show(table(summary), *lines)
    require_whole(summary)
    exit_well()


def prepare(parsed: argparse.Namespace) -> None:
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


def audit(parsed: argparse.Namespace) -> None:
    from mirage_dist.data import audit
    from mirage_dist.report import audit as page

    options = audit.Options(parsed.response_kind, parsed.ngrams, parsed.length, parsed.image_roots, parsed.refusals)
    result = audit.audit(parsed.data, options, parsed.format, parsed.on_bad_record, parsed.configuration, parsed.split)
    files = page.write(result, parsed.out) if parsed.out else []
    show(page.table(result), *files)
    if not result["verdict"]["measured"]:
        raise RunError("the audit could not measure these data; the last line above says why")
    if parsed.fail and not result["verdict"]["passed"]:
        raise RunError("the data fail the audit (--fail)")


def paper(parsed: argparse.Namespace) -> None:
    signals.install()
    # A word with "=" in the place of the recipe is an override of the default one.
    file, overrides = str(parsed.config), list(parsed.overrides)
    if "=" in file:
        file, overrides = "configs/paper/llava_1_5_7b.yaml", [file, *overrides]
    file = "configs/paper/tiny.yaml" if parsed.scale == "tiny" else file
    from mirage_dist.paper.recipe import PaperRecipe

    recipe = configs.load(file, overrides, PaperRecipe)
    from mirage_dist.paper import chain, plan, steps

    with steps.within(recipe):
        if parsed.links:
            put("".join(f"{line}\n" for line in chain.lines(recipe, file, overrides)))
        elif parsed.check:
            show(*steps.check(recipe))
        elif parsed.plan:
            show(plan.text(recipe))
        elif parsed.data:
            steps.data(recipe)
        else:
            if parsed.local:
                steps.run(recipe)
            summary = steps.results(recipe)
            show(steps.table(recipe), f"report: {Path(recipe.folder) / recipe.out / 'report' / 'index.html'}")
            from mirage_dist.report import require_whole

            require_whole(summary)
    if parsed.local:
        exit_well()


def data(parsed: argparse.Namespace) -> None:
    from mirage_dist.data.published import check, download, hub, listing
    from mirage_dist.data.published.catalogue import DATASETS

    remote = [name for name in parsed.names if hub.address(name) is not None]
    for name in parsed.names:
        if name not in DATASETS and (name not in remote or parsed.action != "get"):
            hint = configs.suggestion(name, list(DATASETS)) or "`mirage data list` has all of them"
            raise ConfigError(f"{name}: no dataset of the catalogue; {hint}")
    if parsed.action == "list":
        show(listing.table())
        return
    if parsed.action == "get":
        if not parsed.names:
            raise ConfigError("mirage data get: name what to download; `mirage data list` has all of it")
        for name in parsed.names:
            show(*download.get(name, parsed.root))
        return
    wrong = []
    for name in parsed.names or DATASETS:
        seen = list(check.findings(DATASETS[name], parsed.root))
        if not parsed.names and all(one.state in ("missing", "optional") for one in seen):
            show(f"{name}: not here")
            continue
        show(*(f"{name}: {one.state:8} {one.place}: {one.detail}" for one in seen))
        if not check.whole(seen):
            wrong.append(name)
    if wrong:
        raise RunError(f"not as published: {', '.join(wrong)}; docs/get_data.md says what belongs where")


def train(parsed: argparse.Namespace) -> None:
    if parsed.ranks and not (parsed.check or parsed.check_recipe):
        configs.load(parsed.config, parsed.overrides, TrainRecipe)  # a typo is an error before any process starts
        launching.replace(parsed.ranks, parsed.config, parsed.overrides)
    signals.install()
    with signals.start_up():
        recipe = configs.load(parsed.config, parsed.overrides, TrainRecipe)
        if not (parsed.check or parsed.check_recipe):
            check_rendezvous()
        with loading():
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
        with loading():
            from mirage_dist.train import run
            from mirage_dist.train.dry_run import run as dry

        inputs.make(recipe)
    (dry.dry_run if recipe.train.dry_run else run.train)(checked)
    exit_well()


def plan(parsed: argparse.Namespace) -> None:
    recipe = configs.load(parsed.config, parsed.overrides, TrainRecipe)
    from mirage_dist import inputs
    from mirage_dist.train.planning import plan, table
    from mirage_dist.train.planning.costs import hardware, lengths

    on = hardware.hardware(parsed.gpu, parsed.hardware)
    cluster = plan.cluster(on, parsed.nodes, parsed.gpus, parsed.ranks, parsed.price)
    data = lengths.described(parsed.samples, parsed.tokens, parsed.responses)
    if data is None and (missing := inputs.missing(recipe)):
        raise ConfigError(f"{missing[0]}: not there yet; its world is made by `mirage demo` or `mirage train`")
    # Standard output holds one object then, and no line of the log.
    with redirect_stdout(sys.stderr) if parsed.json else nullcontext():
        made = plan.plan(recipe, cluster.ranks, cluster, data, parsed.picture_tokens)
    if parsed.json:
        put(json.dumps(table.as_json(made), indent=1) + "\n")
    else:
        show(table.text(made))


def doctor(parsed: argparse.Namespace) -> None:
    signals.install()
    if parsed.overrides and parsed.recipe is None:
        raise ConfigError(f"{parsed.overrides[0]}: belongs to a recipe; give it with --recipe CONFIG")
    recipe = None if parsed.recipe is None else configs.load(parsed.recipe, parsed.overrides, TrainRecipe)
    check_rendezvous()
    from mirage_dist.doctor import run

    folder = parsed.dir or Path("runs" if recipe is None else recipe.run.dir)
    run.doctor(folder, recipe, parsed.json)
    exit_well()


def evaluate(parsed: argparse.Namespace) -> None:
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
        if recipe.model.url is None:
            show(f"{parsed.config}: the recipe is in order; neither data nor model were read")
        else:
            from mirage_dist.evals.models import remote

            asks = remote.estimate(recipe, worklist.requests(recipe))
            show(f"{parsed.config}: the recipe is in order; nothing was sent", asks)
    elif parsed.status:
        from mirage_dist.evals import status

        show(status.report(recipe))
    elif parsed.workers:
        from mirage_dist.evals import pool

        pool.run(parsed.config, parsed.overrides, parsed.workers, recipe.generation.tensor_parallel)
    else:
        with loading():
            from mirage_dist import inputs
            from mirage_dist.evals import follow, tracking

        inputs.make(recipe, parsed.worker[0] == 0)
        evaluate = tracking.evaluate if recipe.follow is None else follow.follow
        evaluate(recipe, parsed.worker)


def erasure(parsed: argparse.Namespace) -> None:
    signals.install()
    recipe = configs.load(parsed.config, parsed.overrides, EvalRecipe)
    with loading():
        from mirage_dist import inputs
        from mirage_dist.erasure import run
        from mirage_dist.evals import worklist

    run.check(recipe)
    worklist.check(recipe)  # a wrong option is an error before any data are made or read
    inputs.make(recipe)
    run.run(recipe)
    exit_well()


def config(parsed: argparse.Namespace) -> None:
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


def sweep(parsed: argparse.Namespace) -> None:
    signals.install()
    from mirage_dist.sweep.recipe import SweepRecipe

    recipe = configs.load(parsed.config, parsed.overrides, SweepRecipe)
    if parsed.ranks:
        recipe = replace(recipe, ranks=parsed.ranks)
    from mirage_dist.sweep import directory, pool, results, slurm, status
    from mirage_dist.sweep.points import plan

    planned = plan(recipe)
    directory.check(planned)
    if parsed.check:
        lines = [f"{point.name}  {point.description}".rstrip() for point in planned.everything]
        show(*lines, f"{parsed.config}: {len(lines)} points are in order; neither data nor model were read")
    elif parsed.status:
        show(status.text(planned))
    elif parsed.slurm:
        show(slurm.text(planned))
    else:
        pool.run(planned, parsed.jobs)
        if recipe.frontier is not None:
            out = Path(recipe.out) / "report"
            own, text = results.write(Path(recipe.out), out)
            show(text, f"report: {out / 'index.html'}")
            results.require_whole(own)


def report(parsed: argparse.Namespace) -> None:
    import mirage_dist.report as reports

    if bool(parsed.compare) == bool(parsed.runs or parsed.sweep):
        raise ConfigError("mirage report: name run directories, a sweep with --sweep, or files with --compare")
    if parsed.pdf and (parsed.compare or parsed.sweep):
        raise ConfigError("--pdf: is for a report of runs; leave --compare and --sweep out")
    if parsed.compare:
        show(reports.published.compare(parsed.compare))
        return
    if parsed.sweep:
        if parsed.suite:
            raise ConfigError("--suite: a sweep's report shows the suite of its forget measure; leave it out")
        from mirage_dist.sweep import results

        out, runs = parsed.out or parsed.sweep / "report", reports.named(parsed.runs) if parsed.runs else None
        own, text = results.write(parsed.sweep, out, runs, parsed.outputs)
        show(text, out / "index.html")
        results.require_whole(own)
        return
    out = parsed.out or parsed.runs[0] / "report"
    named = reports.named(parsed.runs)
    summary = reports.report(named, out, suite=parsed.suite, outputs=parsed.outputs, pdf=parsed.pdf)
    show(reports.table(summary), out / "index.html")
    reports.require_whole(summary)


def merge(parsed: argparse.Namespace) -> None:
    from mirage_dist.model.adapters import task_vectors

    vectors = [task_vectors.Vector(path, scale) for path, scale in parsed.vectors]
    task_vectors.merge(parsed.base, vectors, parsed.out)
    show(parsed.out)


def export(parsed: argparse.Namespace) -> None:
    for flag, given in (("--public", parsed.public), ("--dry-run", parsed.dry_run)):
        if given and parsed.push is None:
            raise ConfigError(f"{flag}: belongs to an upload; give --push OWNER/NAME")
    if parsed.push is not None and parsed.artifact is not None:
        raise ConfigError("--push and --artifact: give one, and the same command with the other afterwards")
    from mirage_dist.hub import artifact, measured, push, remote
    from mirage_dist.model import export

    base = None if parsed.base is None else remote.check_name(parsed.base, "--base")
    if parsed.push is not None:
        target = push.Target(parsed.push, parsed.public, parsed.dry_run)
        show(*push.push(parsed.run_dir, parsed.out, parsed.step, parsed.form, target, base))
        return
    if parsed.artifact is not None:
        show(*artifact.add(parsed.run_dir, parsed.out, parsed.step, parsed.form, parsed.artifact, base))
        return
    own = partial(measured.evaluations, parsed.run_dir)
    export.export(parsed.run_dir, parsed.out, parsed.step, form=parsed.form, base=base, evaluations=own)
    show(parsed.out)
