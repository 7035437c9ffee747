"""Keyword tests on VLGuard's own answers: the errors of each list on answers whose right verdict is known.

    python -m mirage_dist.data.gold data/vlguard/train.json data/vlguard/test.json

All answers to safe questions answer, all others refuse. On the published files the published list takes for refusals,
of train.json, 1023 of 1023 (unsafes), 17 of 977 (safe_safes) and 811 of 977 (safe_unsafes), of test.json 320 of 442, 4
of 558 and 550 of 558. Every answer counts, even if its instruction is missing and a reader leaves the question out; 17
of the 558 are empty, and no refusals.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mirage_dist.data import records
from mirage_dist.data.formats import base, vlguard
from mirage_dist.data.refusals import is_refusal, is_refusal_as_published
from mirage_dist.progress import show
from mirage_dist.schema import ConfigError

TESTS = {"ours": is_refusal, "published": is_refusal_as_published}


def refusals(file: Path) -> dict[str, dict[str, int]]:
    """Split -> {"answers": n, "empty": of them, "ours": taken for refusals by our list, "published": by the published}.

    Raises ConfigError naming file, record and field for what is not VLGuard's format.
    """
    counts = {split: dict.fromkeys(("answers", "empty", *TESTS), 0) for split in vlguard.FIELDS}
    for number, record in records.checked(file):
        try:
            for split in vlguard.splits(base.get(record, "safe", bool)):
                for pair in vlguard.pairs(record, split):
                    answer = base.text(pair, "response")
                    counts[split]["answers"] += 1
                    counts[split]["empty"] += not answer.strip()
                    for name, refuses in TESTS.items():
                        counts[split][name] += refuses(answer)
        except base.BadRecord as error:
            raise ConfigError(f"{file}: record {number}: {error}") from error
    return counts


def main(files: Sequence[str]) -> int:
    if not files:
        print(str(__doc__).split("\n\n")[1], file=sys.stderr)
        return ConfigError.status
    try:
        for file in files:
            for split, count in refusals(Path(file)).items():
                verdicts = ", ".join(f"{count[name]} by {name}" for name in TESTS)
                empty = f" ({count['empty']} empty)" if count["empty"] else ""
                show(f"{file} {split}: of {count['answers']} answers{empty} taken for refusals {verdicts}")
    except ConfigError as error:
        show(error, error=True)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
