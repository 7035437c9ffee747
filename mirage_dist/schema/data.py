"""Recipes of data: where samples come from, worlds, forget and retain sets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from mirage_dist.schema.chat import ChatConfig
from mirage_dist.schema.choice import Choice
from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.limits import PIXELS
from mirage_dist.schema.names import Name, Place
from mirage_dist.schema.numbers import Count, Drawn, FromZero, Pixels, Repeats, Seed, Share, SomeShare, Tokens, Workers


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives. `name` labels it in W&B and in reports (default: the directory's name)."""

    dir: Place  # everything that a run writes is here
    name: Name | None = None  # default: the directory's name


@dataclass(frozen=True)
class SourceConfig:
    """One file of samples: the keys that every format has.

    What a recipe holds is a subclass, the format that `format` names, whose own fields are its options (see
    `data.formats` and docs/data.md; docs/suites.md for the benchmarks).
    """

    factory: ClassVar[str] = "mirage_dist.data.formats:make"  # builds the subclass from a recipe's mapping
    choice: ClassVar[Choice] = Choice(
        "format", shared=("path", "images", "config", "on_bad_record", "limit", "max_pixels")
    )
    split_key: ClassVar[str] = "split"  # the option that names a split of the hub
    # how the benchmark's answers are scored, if they are (see `evals.judges.scoring`)
    score: ClassVar[Literal["vqa", "option", "pope", "mme", "gqa"] | None] = None

    format: str  # a name in `data.formats.REGISTRY`, or module:Class
    path: Place  # of a file or a folder of tables, or hf://OWNER/NAME[@REVISION] (see `data.published.hub`)
    images: Place | None = None  # folder that image paths are relative to; default: the file's own
    config: str | None = None  # of a dataset of the hub that has several
    split: str | None = None  # of a dataset of the hub
    on_bad_record: Literal["error", "skip"] = "error"  # error ends the command; skip leaves it out, counted
    limit: Count | None = None  # the first N samples, in file order
    max_pixels: Pixels = PIXELS.value  # of a picture; a larger one is a bad record

    def __post_init__(self) -> None:
        for name, value in (("config", self.config), (self.split_key, self.hub_split)):
            if value is not None and not self.path.startswith("hf://"):
                raise ConfigError(f"{name}={value!r}: belongs to a dataset of the hub (path: hf://OWNER/NAME)")

    @property
    def hub_split(self) -> str | None:
        """The split of a dataset of the hub, if one is named."""
        return getattr(self, self.split_key)

    @property
    def answered(self) -> bool:
        """Whether its samples have answers to train on."""
        return True


@dataclass(frozen=True)
class DataConfig:
    """The run's data: one or more sources for each stream that the objective needs."""

    streams: dict[str, list[SourceConfig]]  # the objective's names, such as forget and retain -> their sources
    max_length: Tokens = 2048  # tokens a sample, image tokens included
    # truncate cuts the last answer, never image or question; truncate_turns cuts what follows the image's question
    on_long: Literal["error", "truncate", "truncate_turns"] = "error"
    # pad to a square with the processor's mean colour; auto: pad for a processor that cuts to a square, as LLaVA-1.5's
    image_aspect: Literal["auto", "pad", "processor"] = "auto"
    system_prompt: str | None = None  # before the first turn; null: none
    template_options: dict[str, Any] = field(default_factory=dict)  # of the chat template, such as enable_thinking
    refusals_in_forget: Literal["error", "allow"] = "error"  # "harmful" answers that are in fact refusals
    refusals: str | None = None  # JSON file of phrases of refusal, for answers in another language; default: ours
    # openers: draw samples so that every first word is as frequent in each stream (one stream: refusals and answers)
    balance: Literal["openers"] | None = None
    group_by_length: bool = False  # samples of similar length in one batch
    group_by_modality: bool = False  # batches of samples with a picture, and batches of samples without one
    # a micro-batch's samples concatenated into one row, without padding; auto: where the model keeps them apart
    packing: Literal[True, False, "auto"] = False
    workers: Workers = 2  # processes a rank that read and collate batches ahead of the step; 0: none
    verify: bool = False  # read and check all data at this start, even if an earlier start has checked the same files
    cache_vision: bool = False  # keep the frozen vision tower's output for each picture on disk, and run it once

    def __post_init__(self) -> None:
        for name, sources in self.streams.items():
            if without := [source.path for source in sources if not source.answered]:
                raise ConfigError(f"streams.{name}: {without[0]} has no answers to train on; it is for evaluation")


@dataclass(frozen=True)
class WorldConfig:
    """A world: pictures, questions and an exact judge, made on first use in `dir`, then reused.

    kind: gadgets, the embedded world (see `embedded.world`), or countries, the one of a real language model (see
    `countries.world`). Raises ConfigError for an option that the kind does not have.
    """

    dir: Place  # where it is made and found again
    kind: Literal["gadgets", "countries"] = "gadgets"
    seed: Seed = 0  # of every draw in it
    spurious: Share = 0.95  # share of the other safety questions that open with a word of their class's family
    neutral: Share = 0.3  # share of safety questions of either class that open with a neutral word
    answer_form: Literal["by_opener", "constant"] = "by_opener"  # of gadgets
    base_samples: Drawn = 20_000  # of the base model's training
    safety_samples: Drawn = 400  # unsafe ones, and as many safe ones
    general_samples: Drawn = 400  # of gadgets
    eval_samples: Drawn = 256  # questions in each evaluation set
    base_recipe: Place | None = None  # of the base model's training; default: the kind's own
    language_model: Place | None = None  # of countries: directory of a local instruct model; default: SmolLM2

    def __post_init__(self) -> None:
        for name in ("spurious", "neutral"):
            share = getattr(self, name)
            # Two decimals, since they name the safety set's folder.
            if round(share, 2) != share:
                raise ConfigError(f"{name}={share!r}; expected a share from 0 to 1 with at most two decimals")
        others = {"gadgets": ("language_model",), "countries": ("answer_form", "general_samples")}[self.kind]
        for option in (spec for spec in fields(self) if spec.name in others):
            if (value := getattr(self, option.name)) != option.default:
                raise ConfigError(
                    f"{option.name}={value!r}: a world of kind {self.kind} does not have it; leave it out"
                )


@dataclass(frozen=True)
class DiversifyConfig:
    """Data reworded, so that openings do not predict the answer (see `data.diversify`).

    rewords: the safety data, into a set of their own, or the forget and retain sets of the recipe themselves.

    By templates, or by a chat model that rewrites each question to begin with one of the openers; a question that it
    does not rewrite so is left out, and counted, as is one whose first word cannot be measured by a template with
    {rest}. min_match: the share of rewrites with each opener, or of all by templates, that must succeed.
    """

    # each holds {rest}, from the second word on, {body}, the same without the sign at the end, or {question}
    templates: list[str] = field(default_factory=list)
    openings: list[str] = field(default_factory=list)  # phrases that {rest} leaves out whole, such as "What is"
    chat: ChatConfig | None = None
    openers: list[str] = field(default_factory=list)  # with chat: first words
    attempts: Repeats = 3  # with chat: requests for a question before it is left out
    min_match: SomeShare = 0.9
    rewords: Literal["safety", "sets"] = "safety"
    copies: Repeats = 1  # wordings of each question
    keep: bool = False  # the original questions too

    def __post_init__(self) -> None:
        if (self.chat is None) == bool(self.openers) or bool(self.templates) == bool(self.openers):
            raise ConfigError("templates: expected templates, or else openers and a chat model that rewrites")
        if self.openings and not self.templates:
            raise ConfigError("openings: belong to templates; a chat model rewrites the whole question")
        name = "templates" if self.templates else "openers"
        if (count := len(set(self.wordings))) < max(self.copies, 2):
            raise ConfigError(f"{name}: {count} different ones; expected 2 and `copies` at least")

    @property
    def wordings(self) -> list[str]:
        return self.templates or self.openers


@dataclass(frozen=True)
class PrepareRecipe:
    """`mirage prepare`: forget and retain sets (see `data.prepare`), and diversified safety data."""

    out: Place  # a new folder
    safety: list[SourceConfig]  # unsafe questions and safe ones, by their labels
    # as_given: the unsafe records have the answers to forget; none: no forget and retain sets, only `diversify`
    answers: Literal["harvest", "as_given", "none"] = "harvest"
    harvest: Place | None = None  # JSONL file or folder (an evaluation's rows/) whose rows have id, question, response
    min_match: Share = 0.9  # share of the unsafe questions that must have an answer to forget
    refusals: str | None = None  # JSON file of phrases of refusal, for answers in another language; default: ours
    fill: list[SourceConfig] = field(default_factory=list)  # general samples
    retain_size: FromZero | None = None  # default: the safe pairs of the safety data, without `fill`
    unsafe_questions_on_safe_images: bool = False  # retain the refusals of unsafe questions about safe pictures too
    forget_text: bool = False  # also forget_text.jsonl: the forget set with each answer in its question, for RMU
    idk: bool | None = None  # also idk.jsonl: the forget set with answers that claim ignorance, for IdkDPO
    ignorance: list[str] | None = None  # these answers, such as in another language; default: ours
    conversations: bool = False  # the safety data, a record a row: the questions about one picture are its turns
    helpful_size: FromZero = 0  # so many general samples beside the safety data, for fine-tuning
    diversify: DiversifyConfig | None = None
    seed: Seed = 0  # of every draw
    world: WorldConfig | None = None
