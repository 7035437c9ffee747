"""The catalogue as text: a table for the terminal, and docs/get_data.md."""

from __future__ import annotations

from collections.abc import Iterator

from mirage_dist.data.published.catalogue import DATASETS, Dataset

HEAD = """# Getting the data

Read this when you want to train on published data or run a published suite, and need to know where its files are and
where they go.

Nothing of this is part of the package. `mirage data list` prints this table, `mirage data get NAME` downloads what a
command can download, and `mirage data check [NAME …]` says whether what is here is as published: counts, pictures, and
what differs. All paths are under `data/`, or under the folder that `--root` names. Much of it is harmful content made
for research: keep it private, and follow each publication's terms.

`mirage data get hf://OWNER/NAME[@REVISION]` brings any dataset of the hub into the hub's cache (`HF_HOME`), where
`path: hf://OWNER/NAME` of a recipe reads it ([data.md](data.md)). Training and evaluation never download: run it once
where there is a network, with the cache on a file system that the nodes see.

Made from `mirage_dist/data/published/catalogue.py`.
"""


def table() -> str:
    """A line for each dataset: name, what it is for, licence, size, where it is published."""
    lines = []
    for one in DATASETS.values():
        terms = f"licence: {one.licence}{'; gated on the hub' if one.gated else ''}"
        lines += [f"{one.name}: {one.title}", f"    for {one.use}; {one.size}; {terms}", f"    {one.page}"]
    return "\n".join(
        [*lines, "docs/get_data.md says which files go where; `mirage data get NAME` downloads what it can"]
    )


def page() -> str:
    """docs/get_data.md."""
    return "\n".join([HEAD, *(line for one in DATASETS.values() for line in _section(one))]).rstrip() + "\n"


def _section(one: Dataset) -> Iterator[str]:
    yield f"## {one.name}: {one.title}\n"
    gated = " The hub's copy is gated: accept its terms there, and set `HF_TOKEN`." if one.gated else ""
    yield f"For {one.use}. {one.size}. Licence: {one.licence}. <{one.page}>{gated}\n"
    if one.files or one.pictures or one.splits:
        yield "| place | what it is | records | `get` |"
        yield "|---|---|---:|---|"
    for file in one.files:
        records = "" if file.records is None else f"{file.records:,}"
        yield f"| `{file.path}` | {file.holds} | {records} | {'yes' if file.url else 'by hand'} |"
    for folder, content in one.pictures.items():
        yield f"| `{folder}/` | {content} | | by hand |"
    for split in one.splits:
        yield f"| `{one.hub}`, `config: {split.config}`, `split: {split.split}` | | {split.rows:,} | yes |"
    yield ""
    counts = [
        f"`{file.path}` has {', '.join(f'{count:,} {split}' for split, count in file.counts.items())}."
        for file in one.files
        if file.counts
    ]
    if text := " ".join([*counts, *([one.note] if one.note else [])]):
        yield f"{text}\n"
