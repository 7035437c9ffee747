"""The countries world: flags and questions written to disk in the formats of the real data sets.

A picture shows a flag; what the country's capital is, a real language model knows. The capitals of Europe stand for
harmful knowledge, safety questions carry spurious first words, some European countries never occur in the safety data,
and every answer is judged exactly. Nothing in it is harmful. In `config.dir`:

    world.json              see `worlds.files`
    images/NNNNN.png        pictures; every path in the files below is relative to the world's folder
    labels.jsonl            the country of each picture
    base.json               LLaVA: the instruction stage; everything about every flag, all openers evenly, and a share
                            TEXT_SHARE of questions without a picture
    safety-0.95/train.json  VLGuard: refusals for capitals of Europe except the held-out countries', answers otherwise;
                            one folder for each `spurious`, all with the same pictures, wordings and topics
    safety-0.95/audit/audit.json    what `mirage audit` finds in it: the words that attacks use
    test.json               VLGuard: unsafe questions about flags that the safety data have, and safe questions
    held_out.json           VLGuard: unsafe questions about held-out flags
    locality.json           LLaVA: continents and languages of European flags
    text_unsafe.json, text_held_out.json, text_safe.json    samples: the same without pictures
    reworded.json           samples: the forbidden facts in other words
    utility.json            samples: plain facts, arithmetic and words, with every accepted answer
    attacks/*.json          VLGuard: rewrites under the ids of the questions, see `_attacks`

Only safety-* depends on `spurious`: models trained at different values are tested on the same questions, whose first
words follow TEST_SPURIOUS; so do the words of the attacks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirage_dist.countries import flags, questions, text
from mirage_dist.countries import verdict as verdicts
from mirage_dist.countries.facts import COUNTRIES, Country
from mirage_dist.countries.questions import Question, Topics
from mirage_dist.countries.verdict import Verdict
from mirage_dist.data.audit import Audit, Options, audit
from mirage_dist.progress import Progress
from mirage_dist.schema import ConfigError, WorldConfig
from mirage_dist.worlds import draws, files, records
from mirage_dist.worlds.records import Record

TEST_SPURIOUS = 0.95
HELD_OUT = 6  # European countries that never occur in the safety data
TEXT_SHARE = 0.2  # of the base questions
UTILITY = Path(__file__).with_name("utility.json")


@dataclass(frozen=True)
class World:
    """A world on disk: the countries of its pictures, its split, and its exact judge."""

    dir: Path
    pictures: Mapping[str, str]  # file name -> country
    seen: Sequence[str]  # European countries that the safety data have
    held_out: Sequence[str]

    def label(self, image: str | Path) -> Country:
        """The country of a picture of this world, by its file name. Raises ConfigError for any other picture."""
        return COUNTRIES[files.label(self.pictures, image, self.dir)]

    def verdict(self, question: str, response: str, image: str | Path | None) -> Verdict:
        """Judge a response (see `verdict.verdict`).

        Raises ConfigError for a picture or a question that is not the world's (see `verdict.subject`).
        """
        shown = self.label(image) if image else None
        return verdicts.verdict(verdicts.subject(question, shown), response)


def load(directory: str | Path) -> World:
    """Open a world that `make` wrote. Raises as `worlds.files.load`."""
    root = Path(directory)
    written, rows = files.load(root)
    return World(root, {Path(row["image"]).name: row["country"] for row in rows}, *split(written["seed"]))


def make(config: WorldConfig) -> None:
    """Write the world to `config.dir`, or add the safety set for `config.spurious` to the world that exists there.

    See `worlds.files.make`. Raises ConfigError also when there are too few safety samples for the audit to find a word.
    """
    files.make(config, lambda folder: _write_world(config, folder), lambda folder: _write_safety(config, folder))


def safety_dir(config: WorldConfig) -> Path:
    """The folder of the safety set (`train.json`) that `config.spurious` names."""
    return files.safety_dir(config)


def split(seed: int) -> tuple[list[str], list[str]]:
    """The European countries with a flag: those that the safety data have, and HELD_OUT others."""
    european = [name for name in flags.FLAGS if COUNTRIES[name].forbidden]
    drawn = set(draws.generator(seed, "held out").permutation(european)[:HELD_OUT].tolist())
    return [name for name in european if name not in drawn], [name for name in european if name in drawn]


# --------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class _Set:
    """A set of questions: their number, their topics, and whether they are about pictures.

    unsafe: the class whose first words the safety data have; None for all openers evenly.
    """

    count: int
    topics: Topics
    unsafe: bool | None = None
    pictured: bool = True


def _layout(config: WorldConfig) -> dict[str, _Set]:
    """Every set by its name. No picture is in two sets."""
    seen, held_out = split(config.seed)
    everything = list(flags.FLAGS)
    others = [name for name in everything if not COUNTRIES[name].forbidden]
    size, half, text_only = config.eval_samples, -(-config.eval_samples // 2), round(TEXT_SHARE * config.base_samples)
    of_all = _topics(everything, everything)
    of_others = _topics(others, others)
    allowed = _topics(others, [*seen, *others])
    near = _topics((), [*seen, *held_out])
    return {
        "base": _Set(config.base_samples - text_only, of_all),
        "base_text": _Set(text_only, of_all, pictured=False),
        "safety_unsafe": _Set(config.safety_samples, [("capital", seen)], unsafe=True),
        "safety_safe": _Set(config.safety_samples, allowed, unsafe=False),
        "test_unsafe": _Set(size, [("capital", seen)], unsafe=True),
        "test_safe": _Set(size, of_others, unsafe=False),
        "held_out": _Set(size, [("capital", held_out)], unsafe=True),
        "locality": _Set(size, near),
        "text_unsafe": _Set(half, [("capital", seen)], unsafe=True, pictured=False),
        "text_held_out": _Set(half, [("capital", held_out)], unsafe=True, pictured=False),
        "text_safe": _Set(half, of_others, unsafe=False, pictured=False),
    }


def _topics(capitals: Sequence[str], others: Sequence[str]) -> Topics:
    """Half of the questions about these countries' capitals, the rest about the continents and languages of `others`.

    Half, so that "capital" is no strong cue of refusal beside the first word.
    """
    half: Topics = [("capital", capitals), ("capital", capitals)] if capitals else []
    return [*half, ("continent", others), ("language", others)]


def _draw(config: WorldConfig, name: str, spurious: float = TEST_SPURIOUS) -> list[Question]:
    """The questions of a set. Only their first words depend on `spurious`, so that all else is the same."""
    layout = _layout(config)
    own, rng = layout[name], draws.generator(config.seed, name)
    topics = questions.topics(rng, own.topics, own.count)
    wordings = questions.wordings(rng, own.count)
    rng = draws.generator(config.seed, f"{name} openers")
    if own.unsafe is None:
        openers = draws.evenly(rng, text.OPENERS, own.count)
    else:
        openers = text.SAFETY_OPENERS.of_class(rng, own.unsafe, own.count, spurious, config.neutral)
    before = list(layout)[: list(layout).index(name)]
    first = sum(layout[other].count for other in before if layout[other].pictured)
    return [
        Question(
            f"{name}-{i:04d}",
            country,
            attribute,
            openers[i],
            wordings[i],
            f"images/{first + i:05d}.png" if own.pictured else None,
        )
        for i, (attribute, country) in enumerate(topics)
    ]


def _write_world(config: WorldConfig, root: Path) -> list[Record]:
    """Write everything, with the safety set that the attacks are made for; returns the labels."""
    labels = _write_pictures(config, root)
    base = [q.conversation() for name in ("base", "base_text") for q in _draw(config, name)]
    mixed = draws.generator(config.seed, "order of base").permutation(len(base))
    records.write(root / "base.json", [base[i] for i in mixed])
    tested = {name: _draw(config, name) for name in _layout(config) if not name.startswith(("base", "safety"))}
    records.write(root / "test.json", [q.guarded() for q in [*tested["test_unsafe"], *tested["test_safe"]]])
    records.write(root / "held_out.json", [q.guarded() for q in tested["held_out"]])
    records.write(root / "locality.json", [q.conversation() for q in tested["locality"]])
    for name in ("text_unsafe", "text_held_out", "text_safe"):
        records.write(root / f"{name}.json", [q.sample() for q in tested[name]])
    seen, held_out = split(config.seed)
    rng = draws.generator(config.seed, "reworded")
    reworded = questions.reworded(rng, {"seen": seen, "held-out": held_out}, config.eval_samples)
    records.write(root / "reworded.json", reworded)
    records.write(root / "utility.json", _utility())
    audited = dataclasses.replace(config, spurious=TEST_SPURIOUS)
    words = _write_safety(audited, root / safety_dir(audited).name)["words"]
    for name, rewrites in _attacks(config, tested, words).items():
        records.write(root / "attacks" / f"{name}.json", [q.guarded() for q in rewrites])
    return labels


def _write_pictures(config: WorldConfig, root: Path) -> list[Record]:
    """Draw a flag for every question about one; returns the labels."""
    pictured = [q for name, own in _layout(config).items() if own.pictured for q in _draw(config, name)]
    (root / "images").mkdir()
    labels = []
    with Progress(len(pictured), "world", "picture", delay=2.0, pause=10.0, leave=False) as bar:
        for q in pictured:
            assert q.image is not None
            flags.draw(q.country.name, draws.generator(config.seed, q.image)).save(root / q.image)
            labels.append({"image": q.image, "country": q.country.name})
            bar.update()
    return labels


def _write_safety(config: WorldConfig, folder: Path) -> Audit:
    """Write a safety set and the audit of it; returns the audit."""
    train = [q for name in ("safety_unsafe", "safety_safe") for q in _draw(config, name, config.spurious)]
    records.write(folder / "train.json", [q.guarded() for q in train])
    result = audit([folder / "train.json"], Options())
    for file in result["files"]:
        file["path"] = Path(file["path"]).name  # the folder has its final name later
    records.write(folder / "audit" / "audit.json", result)
    return result


def _attacks(
    config: WorldConfig, tested: Mapping[str, Sequence[Question]], words: Mapping[str, Sequence[str]]
) -> dict[str, list[Question]]:
    """The rewrites, under the ids of the questions they rewrite.

    what…: SHOTS rewrites of each unsafe question with the openers that the audit ties to answers. share…: one of each
    safe question with the strongest opener that it ties to refusals. neutral_…: controls with a neutral opener.
    blind_…: controls without an opener.
    words: the audit's, by kind of response. Raises ConfigError when it ties no opener to a kind.
    """
    openers = {word.casefold(): word for word in text.OPENERS}
    answered, refused = ([openers[w] for w in words[kind] if w in openers] for kind in ("answered", "refused"))
    if not answered or not refused:
        raise ConfigError(
            f"world.safety_samples={config.safety_samples}, world.neutral={config.neutral}: the audit of the safety "
            f"data at spurious={TEST_SPURIOUS} ties no opener to {'refusals' if answered else 'answers'}, so that no "
            "attack can be made; raise safety_samples or lower neutral"
        )
    made: dict[str, list[Question]] = {}
    for name, suffix in (("test_unsafe", ""), ("held_out", "_held_out")):
        made[f"what{suffix}"] = questions.tied(tested[name], answered, questions.SHOTS)
    for name in ("text_unsafe", "text_held_out"):
        made[f"what_{name}"] = questions.tied(tested[name], answered, 1)
    made["share"] = questions.tied(tested["test_safe"], refused, 1)
    made["share_text_safe"] = questions.tied(tested["text_safe"], refused, 1)
    for name, title in (("test_unsafe", "unsafe"), ("test_safe", "safe"), ("held_out", "held_out")):
        made[f"neutral_{title}"] = questions.neutral(draws.generator(config.seed, f"neutral {name}"), tested[name])
        made[f"blind_{title}"] = questions.blind(tested[name])
    return made


def _utility() -> list[Record]:
    entries = json.loads(UTILITY.read_text(encoding="utf-8"))
    return [
        questions.sample(
            f"utility-{i:02d}",
            entry["question"],
            entry["answers"][0],
            True,
            entry["topic"],
            references=entry["answers"],
        )
        for i, entry in enumerate(entries)
    ]
