"""The streams of a run as they are read: that they are those of its objective, and what is wrong with their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mirage_dist.data import sources, words
from mirage_dist.data.encoding.conversation import called
from mirage_dist.data.refusals import PhraseList, check_forget
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Source
from mirage_dist.objectives.base import Needs
from mirage_dist.runs import DataSummary
from mirage_dist.schema import ConfigError, TrainRecipe

HELD_OUT = "validation"  # the stream that no step trains on (see `measures.validation`)
SHARED = ("id", "image", "question", "history", "shown")  # fields that paired samples have in common


def check_streams(recipe: TrainRecipe, needs: Needs) -> None:
    """Raise ConfigError when the recipe's streams are not exactly those that the objective needs, or when the one that
    is to define an epoch is none of them.
    """
    given, needed = [name for name in recipe.data.streams if name != HELD_OUT], list(needs.streams)
    if sorted(given) != sorted(needed):
        raise ConfigError(
            f"data.streams: the recipe has {', '.join(given)}; objective {recipe.objective['name']} needs {needed}"
        )
    if (name := recipe.train.epoch_stream) not in (None, *needed):
        raise ConfigError(
            f"train.epoch_stream={name}: no stream of this objective; expected one of {', '.join(needed)}"
        )


def read_streams(recipe: TrainRecipe, needs: Needs) -> dict[str, Source]:
    """The samples of every stream that the objective needs, and those held out, if any.

    Opens no picture (see `sources.check_pictures`).

    Raises ConfigError for an empty stream, bad data, an empty answer, or answers to unlearn that look like refusals.
    """
    refuses, given = PhraseList.read(recipe.data.refusals), recipe.data.streams
    names = [*needs.streams, *({HELD_OUT} & set(given))]
    streams = {name: sources.read_all(given[name], check_images=False, answered=True) for name in names}
    for name, source in streams.items():
        if name in needs.unlearned and recipe.data.refusals_in_forget == "error":
            check_forget(source.samples, name, refuses)
        if not source.samples:
            raise ConfigError(f"data.streams.{name}: no sample in {[s.path for s in recipe.data.streams[name]]}")
    return streams


def check_pairs(samples: Mapping[str, Sequence[Sample]], paired: Sequence[str]) -> None:
    """Raise ConfigError unless sample i of every paired stream has the same `SHARED` fields."""
    if not paired:
        return
    first, *others = paired
    for name in others:
        mine, partners = samples[first], samples[name]
        place = f"data.streams.{name}: is paired with {first}"
        if len(mine) != len(partners):
            ids = [{sample.id for sample in kept} for kept in (mine, partners)]
            alone = next((s.id for s in (*mine, *partners) if s.id in ids[0] ^ ids[1]), None)
            first_one = "" if alone is None else f" ({alone!r} has none)"
            raise ConfigError(
                f"{place}: {len(partners)} samples for {len(mine)}; every sample needs a partner{first_one}"
            )
        for number, (one, other) in enumerate(zip(mine, partners, strict=True)):
            if any(getattr(one, name) != getattr(other, name) for name in SHARED):
                raise ConfigError(
                    f"{place}: sample {number} is {other.id!r} there and {one.id!r} in {first}; both streams need the "
                    "same ids, pictures and questions in the same order"
                )


def check_no_picture(samples: Mapping[str, Sequence[Sample]], model: str) -> None:
    """Raise ConfigError, naming the first one, when any sample has a picture."""
    for name, kept in samples.items():
        if (sample := next((s for s in kept if s.image is not None), None)) is not None:
            raise ConfigError(
                f"data.streams.{name}: {called(sample)} has a picture, but model.path={model} is a text-only model; "
                "take a vision-language model, or records without pictures"
            )


def describe(streams: Mapping[str, Source], refusals: str | None = None) -> DataSummary:
    """The contents of data.json. refusals: the file of a list of phrases of refusal; None: ours."""
    refuses = PhraseList.read(refusals)
    return {
        "streams": {
            name: {
                "samples": len(source.samples),
                **source.left_out(),
                "commits": source.commits,
                "first_words": words.first_words(source.samples, refuses),
            }
            for name, source in streams.items()
        }
    }
