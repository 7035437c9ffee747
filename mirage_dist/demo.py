"""`mirage demo`: train, unlearn, attack and report, on the embedded world or on a real language model."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mirage_dist import config as configs
from mirage_dist import disk, inputs, launching, signals, state
from mirage_dist.progress import kept_in, log
from mirage_dist.schema import EvalRecipe, RunError, TrainRecipe

if TYPE_CHECKING:
    from mirage_dist.report import Provenance, Summary
    from mirage_dist.report.curves.frontier import Frontier
    from mirage_dist.sweep.recipe import SweepRecipe

LOGS = "logs"  # the folder of the stages' logs in a demo's
Stages = Mapping[str, tuple[str, tuple[str, ...]]]  # model -> its recipe, and the overrides of its stage


@dataclass(frozen=True)
class Story:
    """A demo: the models that it trains from the base model of a world, and the suites that it asks them.

    kind: of the world, whose base model `inputs.make` trains. stages: in the order of training. more: with --full,
    after these. suite, every_attack: the latter with --full; both have their files' names. further: suites with --full
    that have reports of their own. sweep: of every unlearning method, with --full. ranks: processes of a training.
    raw: the suite that the world's initial model is asked before anything is trained, if it knows anything.
    source: for a model that can be chosen, the key on the command line, and that of the world. layers: of the decoder
    that the recipes are for, where that model may have others (see `fitted`). slow: whether evaluating one model takes
    minutes without --full, too.
    """

    kind: str
    stages: Stages
    more: Stages
    suite: str
    every_attack: str
    ranks: int
    further: tuple[str, ...] = ()
    sweep: str | None = None
    raw: str | None = None
    source: tuple[str, str] | None = None
    layers: int | None = None
    slow: bool = False

    def models(self, full: bool) -> Stages:
        return {**self.stages, **self.more} if full else self.stages


EMBEDDED = Story(
    kind="gadgets",
    stages={
        "sft": ("configs/train/demo_sft.yaml", ()),
        "sft_control": ("configs/train/demo_sft.yaml", ("world.spurious=0.5", "run.name=sft_control")),
        "sft_diversified": ("configs/train/demo_sft_diversified.yaml", ()),
        "sft_filtered": ("configs/train/demo_sft_filtered.yaml", ()),
        "npo": ("configs/train/demo_npo.yaml", ()),
        "rmu": ("configs/train/demo_rmu.yaml", ()),
    },
    more={},
    suite="configs/eval/demo.yaml",
    every_attack="configs/eval/demo_attacks.yaml",
    ranks=2,
    further=("configs/eval/demo_pixels.yaml", "configs/eval/demo_sampling.yaml"),
    sweep="configs/sweep/demo_methods.yaml",
)
REAL = Story(
    kind="countries",
    stages={
        "sft": ("configs/train/real_sft.yaml", ()),
        "sft_control": ("configs/train/real_sft.yaml", ("world.spurious=0.5", "run.name=sft_control")),
        "npo": ("configs/train/real_npo.yaml", ()),
        "npo_diversified": ("configs/train/real_npo_diversified.yaml", ()),
        "rmu": ("configs/train/real_rmu.yaml", ()),
    },
    more={
        "npo_balanced": ("configs/train/real_npo_balanced.yaml", ()),
        "sft_diversified": ("configs/train/real_sft_diversified.yaml", ()),
        "rmu_diversified": ("configs/train/real_rmu_diversified.yaml", ()),
    },
    suite="configs/eval/real.yaml",
    every_attack="configs/eval/real_attacks.yaml",
    ranks=1,
    sweep="configs/sweep/real_methods.yaml",
    raw="configs/eval/real_raw.yaml",
    source=("model.path", "world.language_model"),
    layers=30,
    slow=True,
)


def fitted(name: str, layers: int) -> list[str]:
    """Overrides that bring the recipe of a stage or of a sweep's method to a decoder of another depth.

    RMU steers the layer at 13 fifteenths and trains those up to it; the others train all layers.
    """
    if not name.startswith("rmu"):
        return []
    steered = 13 * layers // 15
    targets = [f"decoder.layers.{i}.*" for i in range(steered + 1)]
    return [configs.override("model.lora.targets", targets), f"objective.layer={steered}"]


@dataclass
class _Driver:
    """A demo under way. runs: model -> run directory. recipes: those of the trainings so far. sweep: with --full, the
    sweep of every method; frontier: its result.
    """

    story: Story
    out: Path
    overrides: Sequence[str]
    full: bool
    base: TrainRecipe
    sweep: SweepRecipe | None = None
    frontier: Frontier | None = None
    runs: dict[str, Path] = field(default_factory=dict)
    recipes: list[TrainRecipe] = field(default_factory=list)
    step: int = 0
    start: float = field(default_factory=time.monotonic)

    @property
    def world(self) -> Path:
        assert self.base.world is not None
        return Path(self.base.world.dir)

    @property
    def here(self) -> list[str]:
        """The override that gives a recipe this demo's world."""
        return [configs.override("world.dir", str(self.world))]

    @property
    def shared(self) -> list[str]:
        """The overrides of every evaluation."""
        return [*shared(self.overrides), *self.here]

    def of_model(self, name: str, run: Path) -> list[str]:
        """The overrides of an evaluation of one model."""
        return [*self.shared, configs.override("run.dir", str(run)), f"run.name={name}"]

    @property
    def stages(self) -> int:
        swept = 0 if self.sweep is None else len(self.sweep.methods)
        return len(self.story.models(self.full)) + 2 + swept + self.full * len(self.story.further)

    def log(self, text: str) -> None:
        """Begin a stage: its number, the time since the start, and what it is."""
        self.step += 1
        log.info(f"[{self.step}/{self.stages}] {self.clock()}  {text}")

    def clock(self) -> str:
        """The time since the start."""
        seconds = f"{time.monotonic() - self.start:.0f} s"
        return f"{seconds:>6}"

    def each(self) -> Iterator[tuple[str, Path]]:
        """Every model's name and run, with a line for each where a stage takes minutes for one of them."""
        indent = " " * len(f"[{self.step}/{self.stages}]")
        for number, (name, folder) in enumerate(self.runs.items(), 1):
            if self.full or self.story.slow:
                log.info(f"{indent} {self.clock()}  - {name} ({number} of {len(self.runs)})")
            yield name, folder

    def kept(self, name: str) -> AbstractContextManager[None]:
        """Keep the log of a stage in a file; on the screen are the stages, and each warning and note once."""
        return kept_in(self.out / LOGS / f"{name}.log")

    def train(self) -> None:
        self.log("base: world, base model and its answers")
        self.runs["base"] = Path(self.base.run.dir)
        self.recipes.append(self.base)
        with self.kept("base"):
            inputs.make(self.stage("npo")[0])  # reads the base model and its answers
        for name in self.story.models(self.full):
            recipe, overrides = self.stage(name)
            self.log(f"{name}: {recipe.run.dir}")
            self.runs[name] = Path(recipe.run.dir)
            self.recipes.append(recipe)
            with self.kept(name):
                inputs.make(recipe)
                if not (self.runs[name] / "export").is_dir():
                    launching.train(self.story.ranks, self.story.models(self.full)[name][0], overrides)

    def train_every_method(self, sweep: SweepRecipe) -> None:
        """Train and evaluate the sweep's points; of each method that the demo does not have, the best one joins it."""
        from mirage_dist.evals.pool import gpus
        from mirage_dist.sweep import pool, results
        from mirage_dist.sweep.points import plan

        jobs = 1 if gpus() else 2
        for name, method in sweep.methods.items():
            planned = plan(replace(sweep, methods={name: method}))
            self.log(f"{name}: {len(planned.points)} settings, for the forget–retain frontier")
            with self.kept(f"sweep-{name}"), signals.at_stop_points():
                pool.run(planned, jobs)
        with self.kept("sweep"), signals.at_stop_points():
            pool.run(plan(sweep), jobs)  # all are done: this is the sweep's record
        self.frontier = results.compute(Path(sweep.out))
        best = results.shown(Path(sweep.out), self.frontier)
        self.runs |= {name: run for name, run in best.items() if name not in self.runs}
        if none := [name for name in sweep.methods if name not in self.runs]:
            log.info(f"{', '.join(none)}: no setting reaches the level of the frontier; these have no column")

    def stage(self, name: str) -> tuple[TrainRecipe, list[str]]:
        """The recipe of a stage, with its run directory named by the recipe's hash, and the overrides that make it."""
        file, own = self.story.models(self.full)[name]
        overrides = [*self.fitted(name), *self.overrides, *own, *self.here]
        digest = configs.config_hash(configs.load(file, overrides, TrainRecipe), ("run", "monitor"))
        overrides.append(configs.override("run.dir", f"{self.out}/{name}-{digest[:8]}"))
        return configs.load(file, overrides, TrainRecipe), overrides

    def fitted(self, name: str) -> list[str]:
        """See `fitted`; nothing before the initial model exists, nor for one as deep as that of the recipes."""
        if self.story.layers is None or not (init := self.world / "init").is_dir():
            return []
        from mirage_dist.model.families import configs as families

        layers = families.load(init).get_text_config().num_hidden_layers
        return [] if layers == self.story.layers else fitted(name, layers)

    def evaluate(self) -> None:
        self.log(f"evaluation of every model, clean and attacked{', and tests of erasure' if self.full else ''}")
        for name, folder in self.each():
            own = self.of_model(name, folder)
            with self.kept(f"eval-{name}"):
                if self.full:
                    evaluate(self.story.every_attack, own)
                    _test_erasure(self.story.suite, own)
                else:
                    evaluate(self.story.suite, own)

    def evaluate_further(self) -> None:
        """The suites that have reports of their own."""
        from mirage_dist.report import report

        for suite in self.story.further:
            name = Path(suite).stem
            self.log(f"{name}: {self.further(suite) / 'index.html'}")
            for model, folder in self.each():
                with self.kept(f"{name}-{model}"):
                    evaluate(suite, self.of_model(model, folder))
            report(self.runs, self.further(suite), {"seed": self.base.seed}, suite=name)

    def further(self, suite: str) -> Path:
        """The directory of a further suite's report."""
        return self.out / f"report-{Path(suite).stem}"

    def language_model(self, raw: str) -> Provenance:
        """What the initial model answers before anything is trained, and every model's perplexity on plain English.

        raw: the suite. The initial model's perplexity is that of `init`.
        """
        from mirage_dist.evals import results

        recipe = evaluate(raw, self.shared)
        measured = results.read(Path(recipe.run.dir) / "evals" / recipe.suite)
        places = {"init": (self.world / "init", Path(recipe.run.dir))}
        places |= {name: (folder / "export", folder) for name, folder in self.runs.items()}
        return {
            "raw": measured["judges"][measured["headline"]]["entry"],
            "perplexity": {name: _perplexity(model, run) for name, (model, run) in places.items()},
        }

    def report(self) -> Summary:
        from mirage_dist.report import report

        base, trained = self.recipes[0], self.recipes[1]
        spurious = trained.world and trained.world.spurious
        provenance: Provenance = {
            "seed": base.seed,
            "world": {**configs.to_dict(base.world), "spurious": spurious},
            "config_hash": configs.config_hash([configs.config_hash(r, ("run", "monitor")) for r in self.recipes]),
        }
        if self.story.raw is not None:
            with self.kept("language-model"):
                provenance |= self.language_model(self.story.raw)
        provenance["wall_seconds"] = round(time.monotonic() - self.start, 1)
        suite = Path(self.story.every_attack if self.full else self.story.suite).stem
        if self.frontier is None:
            return report(self.runs, self.out / "report", provenance, suite=suite)
        from mirage_dist.report.curves import frontier

        lead, files = frontier.section(self.frontier), frontier.dumped(self.frontier)
        return report(self.runs, self.out / "report", provenance, suite=suite, lead=lead, files=files)


def demo(out: Path, overrides: Sequence[str], full: bool = False, story: Story = EMBEDDED) -> Summary:
    """Make every stage that does not exist yet, evaluate all models, and write the report; returns its summary.

    full: train the story's further models and its sweep, evaluate every attack and every test of erasure (DeepSpeed
    then runs in this process: see `exit_well`), and write a report for each further suite, `out`/report-SUITE.
    The folder of a stage is named by the hash of its resolved recipe, which names the stages before it. A changed
    setting therefore makes the stages anew that depend on it, and no others. `out`/logs has the log of each stage.
    Raises RunError while another process makes a demo in `out`, and ConfigError where what a stage needs cannot be had.
    """
    if story.source is not None:
        key, own = story.source
        overrides = [own + o.removeprefix(key) if o.startswith(f"{key}=") else o for o in overrides]
    base = _base(story, out, shared(overrides))
    out.mkdir(parents=True, exist_ok=True)
    with disk.alone(out, wait=False) as free:
        if not free:
            raise RunError(f"{out}: another `mirage demo` writes there; wait for its end, or choose another --out")
        driver = _Driver(story, out, overrides, full, base)
        driver.sweep = _sweep(story.sweep, driver) if full and story.sweep is not None else None
        driver.train()
        if full and story.sweep is not None:
            driver.train_every_method(_sweep(story.sweep, driver))  # anew: the decoder's depth is known by now
        driver.evaluate()
        if full:
            driver.evaluate_further()
        return driver.report()


def ending(out: Path, summary: Summary, full: bool, real: bool, overrides: Sequence[str]) -> list[str]:
    """What follows the table: where the page and the logs are, and three commands that may come next."""
    kind = ["--real"] if real else []
    more = shlex.join(["mirage", "demo", *kind, "--out", str(out), *([] if full else ["--full"]), *overrides])
    then = (
        "every stage is there: changed settings make anew what depends on them"
        if full
        else "every method, attack, erasure"
    )
    return [
        "",
        f"{summary['wall_seconds']} s; the page: {out / 'report' / 'index.html'}; each stage's log: {out / LOGS}/",
        "next:",
        f"  {more}  # {then}",
        "  mirage audit DATA  # do first words give refusals away in your data?",
        "  mirage train configs/train/npo.yaml --check model.path=DIR  # your model",
    ]


def evaluate(file: str, overrides: Sequence[str]) -> EvalRecipe:
    """Evaluate one suite in this process; returns its recipe."""
    from mirage_dist.evals import runner

    recipe = configs.load(file, overrides, EvalRecipe)
    inputs.make(recipe)
    runner.evaluate(recipe)
    return recipe


def _sweep(file: str, driver: _Driver) -> SweepRecipe:
    """The sweep's recipe with the world, the seed and the overrides of a demo, each method fitted to its decoder."""
    from mirage_dist.sweep.recipe import SweepRecipe

    seed = driver.base.seed
    own = [o for o in driver.overrides if not o.startswith("seed=")]
    every = [*own, *driver.here, configs.override("world.seed", seed)]
    words = [configs.override("seeds", [seed]), configs.override("every", every)]
    given = {o.partition("=")[0] for o in own}  # as in a stage, what the command line gives wins
    for name, method in configs.load(file, words, SweepRecipe).methods.items():
        if fitting := [o for o in driver.fitted(name) if o.partition("=")[0] not in given]:
            words.append(configs.override(f"methods.{name}.overrides", [*method.overrides, *fitting]))
    digest = configs.config_hash(configs.load(file, words, SweepRecipe), ("out",))
    return configs.load(file, [*words, configs.override("out", f"{driver.out}/methods-{digest[:8]}")], SweepRecipe)


def _test_erasure(suite: str, overrides: Sequence[str]) -> None:
    """Make the tests of erasure of one model, which evaluates the suite first."""
    from mirage_dist.erasure import run

    recipe = configs.load(suite, overrides, EvalRecipe)
    inputs.make(recipe)
    run.run(recipe)


def _perplexity(model: Path, run: Path) -> float:
    """The perplexity of a model directory on plain English, computed once and kept in a file of the run."""
    file = run / "perplexity.json"
    with suppress(FileNotFoundError):
        return state.read("perplexity", file, "Remove it, and it is computed again")["perplexity"]
    from mirage_dist.countries import perplexity

    value = perplexity.perplexity(model)
    disk.write(file, state.sealed("perplexity", {"perplexity": value}))
    return value


def shared(overrides: Sequence[str]) -> list[str]:
    """The overrides that every kind of recipe has; the others concern training only."""
    return [o for o in overrides if o.startswith(("seed=", "world."))]


def _base(story: Story, out: Path, overrides: Sequence[str]) -> TrainRecipe:
    """The base model's recipe, with the world's folder named by the recipe's hash."""
    file = inputs.KINDS[story.kind].base
    unplaced = configs.load(file, overrides, TrainRecipe)
    digest = configs.config_hash(unplaced, ("run", "monitor", "model.path", "data", "world.dir"))
    return configs.load(file, [*overrides, configs.override("world.dir", f"{out}/world-{digest[:8]}")], TrainRecipe)
