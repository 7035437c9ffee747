"""What a training run's directory records of it, for whoever reads it: `manifest`, `recipe`, `data`.

They are written by `train.rundir` at the first start, and stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, cast

from omegaconf import OmegaConf

from mirage_dist import config as configs
from mirage_dist import state
from mirage_dist.schema import ConfigError, TrainRecipe


class StreamRecord(TypedDict):
    """One stream as training takes it: the number of its samples, and `data.sample.stream_digest` of them, with each
    picture named by the SHA-256 of its file.
    """

    samples: int
    sha256: str


class Hardware(TypedDict):
    machine: str
    cpus: int | None
    gpu: str | None


class RunManifest(TypedDict):
    """manifest.json of a run: what its first start was made of.

    config_hash leaves out the keys that may change between two starts: `may_change`. data: by stream. packed: whether
    batches were, which `data.packing: auto` leaves to the model. load_in_4bit: whether the base model was quantised.
    base_hash: see `model.directory.model_hash`. refusals: SHA-256 of `data.refusals`, if it names a list. command: the
    first start's. versions: by distribution name.
    """

    config_hash: str
    may_change: list[str]
    data: dict[str, StreamRecord]
    packed: bool
    load_in_4bit: bool
    base_hash: str
    refusals: str | None
    seed: int
    wandb_id: str
    command: list[str]
    git_commit: str | None
    versions: dict[str, str]
    hardware: Hardware


class StreamSummary(TypedDict):
    """One stream in data.json: its samples, those that were left out, and the first words of its questions.

    dropped: reason -> count of samples that cannot be used, such as repeats. renamed: samples that got a new id.
    skipped: bad records. first_words: word -> count of questions by kind of answer ("refusal", "answer"). commits:
    dataset of the hub -> the commit that was read.
    """

    samples: int
    dropped: dict[str, int]
    renamed: int
    skipped: int
    first_words: dict[str, dict[str, int]]
    commits: dict[str, str]


class DataSummary(TypedDict):
    """data.json of a run."""

    streams: dict[str, StreamSummary]


def manifest(run: Path) -> RunManifest | None:
    """manifest.json; None before the run has begun.

    Raises state.Damaged when it is torn or edited, ConfigError when a newer version of this package wrote it.
    """
    remedy = (
        "Restore the file from a copy, or move it away: the next start of the same recipe writes it anew and resumes, "
        "under another W&B id"
    )
    try:
        return cast(RunManifest, state.read("run", run / "manifest.json", remedy))
    except FileNotFoundError:
        return None


def recipe(run: Path) -> TrainRecipe:
    """The recipe, as the first start wrote it to config.yaml.

    Raises ConfigError when config.yaml cannot be read or is no longer what manifest.json has the hash of, and what
    `manifest` raises. A run without manifest.json has not begun: nothing is compared. The file of a run that an earlier
    version of this package began lacks the keys that came since: they have their defaults, and the hash is without
    them.
    """
    file, rest = run / "config.yaml", "restore the file, or start a run of the changed recipe in another run.dir"
    begun = manifest(run)
    if begun is None:
        return configs.load(file, [], TrainRecipe)
    try:
        own = configs.load(file, [], TrainRecipe)
    except ConfigError as error:
        raise ConfigError(f"{error}. This run began with another content of config.yaml; {rest}") from error
    as_written = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    if begun["config_hash"] not in {configs.config_hash(tree, begun["may_change"]) for tree in (own, as_written)}:
        raise ConfigError(f"{file}: was changed after this run began, whose manifest.json has its hash; {rest}")
    return own


def data(run: Path) -> DataSummary | None:
    """data.json; None where there is none. Raises as `manifest`."""
    remedy = "Restore the file from a copy, or move it away: a report then lacks the first words of the training data"
    try:
        return cast(DataSummary, state.read("data", run / "data.json", remedy))
    except FileNotFoundError:
        return None
