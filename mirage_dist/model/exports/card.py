"""The card of an exported model: README.md, whose YAML head the hub reads (model card metadata, hub-docs).

What it says comes from the run's own files: recipe, manifest, data.json and the checkpoint's manifest. No path of this
machine is in it. huggingface_hub's own classes make the head and read it again, which checks it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mirage_dist import config as configs
from mirage_dist import runs
from mirage_dist.data.published import hub
from mirage_dist.model import directory
from mirage_dist.schema import ConfigError, TrainRecipe

FILE = "README.md"
TERMS = tuple(pattern for pattern in directory.TERMS if pattern != FILE)  # the base model's, which go with its weights
# An absolute path of two parts or more that is no part of an address or a word.
PLACE = re.compile(r"(?<![\w:/.~<])/(?:[\w.+@-]+/)+[\w.+@-]*")
OF_A_LICENSE = ("license", "license_name", "license_link")  # keys of a card
USE = (
    "For research on the safety of vision-language models: what safety fine-tuning and unlearning change, and how "
    "attacks undo it. It is not meant as a safeguard of a product, and it was not examined for any other purpose."
)
LIMITS = (
    "A low attack success rate describes behaviour on the questions that were asked. It proves neither that knowledge "
    "was erased nor that other wordings, languages, attacks or pictures fail; tests of erasure are `mirage erasure`.",
    "A model that answers with noise, or refuses everything, has a low attack success rate as well: read it beside the "
    "irrelevant rate, the rejection rate and the right answers to harmless questions.",
    "Intervals are over questions. They do not show how much another training seed changes the rates.",
    "The base model's limits and terms, and those of the training data, hold for this model too.",
)


@dataclass(frozen=True)
class Rate:
    """One rate of one set of a suite, under one condition, by the suite's first judge.

    measure: its short name, such as asr. title: its name in words. condition: in words. rate: from 0 to 1. interval:
    95 %, likewise. judge: in words. unjudged: answers without a verdict, which are not among n.
    """

    set: str
    measure: str
    title: str
    condition: str
    rate: float
    k: float
    n: int
    interval: tuple[float, float]
    judge: str
    unjudged: int = 0


@dataclass(frozen=True)
class Evaluation:
    """A suite's rates of the model that a card describes.

    judge: the first, in words. cautions: what a reader must know first. recipe_hash: equal for comparable evaluations.
    """

    suite: str
    judge: str
    seed: int
    recipe_hash: str
    rates: tuple[Rate, ...]
    cautions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    step, checkpoint_hash: of the checkpoint, the latter SHA-256 of its manifest. form: merged, adapter or both. task:
    the hub's pipeline tag. base: the base model's name on the hub; None where it has none.
    """

    run: Path
    recipe: TrainRecipe
    step: int
    checkpoint_hash: str
    base_hash: str
    form: str
    task: str
    base: str | None = None
    evaluations: Sequence[Evaluation] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        return self.recipe.run.name or Path(os.path.realpath(self.run)).name

    @property
    def base_shown(self) -> str:
        """The base model's name for readers, never the path of its directory."""
        folder = Path(self.recipe.model.path)
        own = f"{folder.parent.name}/{folder.name}" if folder.name == "export" else folder.name
        return self.base or re.sub(r"[^\w.+/ -]", "_", own)


def hub_name(path: str) -> str | None:
    """The name on the hub of a recipe's `model.path`: itself, or that of a snapshot in the hub's cache; else None."""
    if not Path(path).is_dir():
        return path
    for part in Path(os.path.realpath(path)).parts:
        if part.startswith("models--") and "snapshots" in Path(os.path.realpath(path)).parts:
            return part.removeprefix("models--").replace("--", "/", 1)  # a model's own name may hold others
    return None


def text(subject: Subject) -> str:
    """The whole README.md."""
    metadata = ModelCardData(
        model_name=subject.name,
        eval_results=list(_results(subject)) or None,
        base_model=subject.base,
        library_name="peft" if subject.form == "adapter" else "transformers",
        pipeline_tag=subject.task,
        datasets=_datasets(subject.recipe) or None,
        tags=["mirage_dist", "safety", str(subject.recipe.objective["name"])],
        base_model_hash=subject.base_hash,
        checkpoint_hash=subject.checkpoint_hash,
        **_license(subject.recipe.model.path),
    )
    if metadata.eval_results is None:
        metadata.pop("model_name")  # a member of a list of results only
    head = metadata.to_yaml(line_break="\n")
    return f"---\n{head}\n---\n{_body(subject)}"


def read(content: str, file: object) -> ModelCardData:
    """The head of a card, as the hub's library reads it. Raises ConfigError, which names `file`, for a wrong one."""
    try:
        if not content.startswith("---"):
            raise ValueError("it does not begin with --- and metadata")
        return ModelCard(content).data  # pyright: ignore[reportReturnType]
    except Exception as error:  # YAML's errors and those of the library's checks have no common class
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{file}: is no model card: {why}; export to a new directory") from error


def read_file(file: Path) -> ModelCardData:
    """See `read`. Raises ConfigError also for a file that is no UTF-8."""
    try:
        return read(file.read_text(encoding="utf-8"), file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 at byte {error.start}; export to a new directory") from error


def _license(path: str) -> dict[str, Any]:
    """The license that the base model's own card names."""
    try:
        content = (directory.resolve(path) / FILE).read_text(encoding="utf-8", errors="replace")
        head = ModelCard(content, ignore_metadata_errors=True).data.to_dict() if content.startswith("---") else {}
    except Exception:  # whatever somebody else's card holds: the base model may have none
        return {}
    return {key: str(head[key]) for key in OF_A_LICENSE if isinstance(head.get(key), str)}


def _datasets(recipe: TrainRecipe) -> list[str]:
    """Names of the hub's data sets among the sources."""
    places = (hub.address(source.path) for sources in recipe.data.streams.values() for source in sources)
    return list(dict.fromkeys(place.name for place in places if place is not None))


def _results(subject: Subject) -> Iterator[EvalResult]:
    """`model-index` of the head: one result for each rate."""
    for own in subject.evaluations:
        for rate in own.rates:
            yield EvalResult(
                task_type=subject.task,
                dataset_type=own.suite,
                dataset_name=f"{own.suite}: {rate.set}, {rate.condition}",
                dataset_config=rate.set,
                dataset_split=rate.condition,
                dataset_args={"recipe_hash": own.recipe_hash, "seed": own.seed},
                metric_type=rate.measure,
                metric_name=f"{rate.title} (fraction)",
                metric_value=rate.rate,
                metric_args={"k": rate.k, "n": rate.n, "ci95": list(rate.interval), "judge": rate.judge},
            )


# ------------------------------------------------------------------------------------------------------- the body


def _body(subject: Subject) -> str:
    recipe = subject.recipe
    parts = [
        f"# {_inert(subject.name)}",
        f"`{subject.base_shown}` after `{recipe.objective['name']}` training with mirage_dist: step {subject.step}, "
        f"recipe hash `{configs.config_hash(recipe)[:16]}`.{_form(subject)}",
        "## Intended use",
        USE,
        "## Training",
        _table(("key", "value"), _settings(recipe)),
        "## Training data",
        *_data(subject),
        "## Evaluation",
        *_evaluations(subject),
        "## Limits",
        "\n".join(f"- {line}" for line in LIMITS),
        "## Provenance",
        _table(("what", "value"), _provenance(subject)),
    ]
    return "\n\n".join(parts) + "\n"


def _form(subject: Subject) -> str:
    base = f"`{subject.base_shown}`"
    return {
        "adapter": f" This is a peft adapter: load it on {base}, the model with the base hash below.",
        "both": f" The whole model, and in `adapter/` the same as a peft adapter on {base}.",
    }.get(subject.form, "")


def _settings(recipe: TrainRecipe) -> Iterator[tuple[str, object]]:
    """Keys of the recipe that decide a training most; none of them is a path."""
    train, model = recipe.train, recipe.model
    yield from ((f"objective.{key}", _no_path(value)) for key, value in recipe.objective.items())
    if model.lora is not None:
        yield from ((f"model.lora.{key}", value) for key, value in configs.to_dict(model.lora).items())
    else:
        yield "model.train", model.train or "decoder and connector"
        if model.freeze:
            yield "model.freeze", model.freeze
    names = ("lr", "global_batch", "max_steps", "epochs", "schedule", "warmup", "weight_decay", "clip", "dtype")
    yield from ((f"train.{name}", getattr(train, name)) for name in names)
    yield from ((f"train.optimizer.{key}", _no_path(value)) for key, value in train.optimizer.items())
    yield "reference", recipe.reference
    yield "seed", recipe.seed


def _no_path(value: object) -> object:
    """An option's value; of a path, which an objective from outside the package may take, the last part."""
    if isinstance(value, Mapping):
        return {_no_path(key): _no_path(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_no_path(own) for own in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def without_places(sentence: str) -> str:
    """A text with the last part of each absolute path in place of the path."""
    return PLACE.sub(lambda match: Path(match[0]).name, sentence)


def _data(subject: Subject) -> Iterator[str]:
    begun, summary = runs.manifest(subject.run), runs.data(subject.run)
    if begun is None:
        yield "The run's manifest is not there: hashes of its data are not known."
        return
    rows = []
    for stream, record in begun["data"].items():
        sources = subject.recipe.data.streams.get(stream, [])
        own = summary["streams"].get(stream) if summary else None
        commits = own["commits"] if own else {}
        named = (f"{_source(s.path)}{f' at {commits[s.path]}' if s.path in commits else ''}" for s in sources)
        rows.append((stream, record["samples"], f"`{record['sha256']}`", ", ".join(dict.fromkeys(named))))
    yield _table(("stream", "samples", "SHA-256", "sources"), rows)
    yield "The SHA-256 is over the samples in their order, with each picture named by the SHA-256 of its file."


def _source(path: str) -> str:
    return path if hub.address(path) is not None else Path(path).name


def _evaluations(subject: Subject) -> Iterator[str]:
    if not subject.evaluations:
        yield (
            "No evaluation of this checkpoint was in the run's directory when this card was written, so nothing is "
            "known here of its attack success and rejection rates."
        )
    for own in subject.evaluations:
        yield f"**{_inert(own.suite)}**, judged by {_inert(own.judge)}. In percent, with 95 % intervals over questions."
        yield from (f"**{_inert(caution)}**" for caution in own.cautions)
        rows = ((r.set, r.title, r.condition, _percent(r), f"{r.k:g}/{r.n}{_missing(r)}") for r in own.rates)
        yield _table(("set", "measure", "condition", "rate", "counts"), rows)


def _percent(rate: Rate) -> str:
    low, high = (100 * bound for bound in rate.interval)
    return f"{100 * rate.rate:.1f} ({low:.1f}–{high:.1f})"


def _missing(rate: Rate) -> str:
    return f", {rate.unjudged} without verdict" if rate.unjudged else ""


def _provenance(subject: Subject) -> Iterator[tuple[str, str]]:
    yield "base model", f"`{subject.base_shown}`"
    yield "SHA-256 of the base model's files", f"`{subject.base_hash}`"
    yield "SHA-256 of the checkpoint's manifest", f"`{subject.checkpoint_hash}`"
    begun = runs.manifest(subject.run)
    if begun is not None:
        yield "git commit", str(begun["git_commit"])
        yield "versions", ", ".join(f"{name} {version}" for name, version in begun["versions"].items())


def _table(head: Sequence[str], rows: Iterator[tuple] | Sequence[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_inert(cell) for cell in line) + " |" for line in lines)


def _inert(cell: object) -> str:
    """A cell without what would end it, or that Markdown and HTML would interpret."""
    return re.sub(r"([\\*_\[\]<>|])", r"\\\1", str(cell).replace("\n", " ")) if not _is_code(cell) else str(cell)


def _is_code(cell: object) -> bool:
    return isinstance(cell, str) and re.fullmatch(r"`[\w.:/-]+`|-+", cell) is not None
