"""Defences beside none: the same model on the same questions, with paired intervals of what each one changes.

Attack success and over-refusal stand in one row: a defence that refuses everything lowers the one and raises the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from mirage_dist.evals.defences import NONE
from mirage_dist.evals.results import Condition, Leaf
from mirage_dist.report import tables, text
from mirage_dist.report.compare import BOTH, Defended, Effect
from mirage_dist.report.load import Run

TITLE = "Defences, and what they cost"
NOTE = (
    "The same model on the same questions, without a defence and with each one. Below each rate: its counts, and the "
    "difference from the rate without a defence in percentage points, with Newcombe's 95 % interval for paired rates; "
    "p is of McNemar's exact test, corrected for the number of tests in this table (Holm). A defence is worth what it "
    "takes from attack success without adding refusals of harmless questions. Attacks stand outside the defence and "
    "were not fitted against it: whoever knows the defence may do better."
)


def columns(defended: Sequence[Defended]) -> list[tuple[str, str]]:
    """(measure, condition) of every effect: attack success first, then over-refusal."""
    keys = dict.fromkeys((e["measure"], e["condition"]) for own in defended for e in own["effects"])
    return sorted(keys, key=lambda key: BOTH.index(key[0]))


def head(column: tuple[str, str]) -> str:
    return f"{column[0].upper()}, {Condition.parse(column[1]).label}"


def lines(defended: Sequence[Defended]) -> list[tuple[str, str, Mapping[tuple[str, str], Leaf | Effect]]]:
    """(model, defence, cells by column) of each row: each model's row without a defence comes before those with one."""
    rows: list[tuple[str, str, Mapping[tuple[str, str], Leaf | Effect]]] = []
    for model in dict.fromkeys(own["model"] for own in defended):
        mine = [own for own in defended if own["model"] == model]
        bare = {(e["measure"], e["condition"]): e["undefended"] for own in mine for e in own["effects"]}
        rows.append((model, NONE, bare))
        for own in mine:
            rows.append((model, own["defence"]["name"], {(e["measure"], e["condition"]): e for e in own["effects"]}))
    return rows


def cell(own: Leaf | Effect | None) -> tuple[str, str, str]:
    """Rate, counts, and difference with its interval and p; "" for what there is not."""
    if own is None:
        return "–", "", ""
    if "paired" not in own:
        return f"{100 * own['rate']:.1f}", f"{own['k']}/{own['n']}", ""
    leaf, paired = own["rate"], own["paired"]
    low, high = (100 * bound for bound in paired["ci95"])
    change = f"{100 * paired['difference']:+.1f} ({low:+.1f} to {high:+.1f}), p {text.p_value(own['p_holm'])}"
    return f"{100 * leaf['rate']:.1f}", f"{leaf['k']}/{leaf['n']}", change


def descriptions(defended: Sequence[Defended]) -> list[str]:
    """A sentence about each defence, and what each filter withheld."""
    sentences = []
    for own in defended:
        info = own["defence"]
        parts = [f"{own['model']}, {info['name']}: the model {info['about']}."]
        for name, by_attack in info.get("withheld", {}).items():
            withheld, answers = (sum(counts[i] for counts in by_attack.values()) for i in (0, 1))
            parts.append(f"The filter withheld {withheld} of {answers} answers to {name}.")
        if undecided := info.get("undecided"):
            parts.append(f"{undecided} of them because the guard's reply was no verdict.")
        if same := info.get("same_judge"):
            parts.append(
                f"Its guard is the judge {same[0]}, whose rates behind the filter are decided by its own verdicts."
            )
        sentences.append(" ".join(parts))
    return sentences


def html(runs: Sequence[Run], defended: Sequence[Defended]) -> str:
    """The table and the sentences as HTML; empty without defences."""
    if not defended:
        return ""
    keys, own = columns(defended), {run.name: run for run in runs}
    body = []
    for model, defence, cells in lines(defended):
        shown = []
        for rate, counts, change in (cell(cells.get(key)) for key in keys):
            below = f'<span class="count">{escape(counts)}</span><span class="count">{escape(change)}</span>'
            shown.append(f'<td><span class="rate">{escape(rate)}</span>{below}</td>')
        label = f"{tables.name(runs, own[model])} {escape(defence)}"
        body.append(f'<tr><th scope="row">{label}</th>{"".join(shown)}</tr>')
    titles = "".join(f'<th scope="col">{escape(head(key))}</th>' for key in keys)
    listed = "".join(f"<li>{escape(line)}</li>" for line in descriptions(defended))
    framed = tables.framed("rates main", f'<th scope="col">Model, defence</th>{titles}', "".join(body))
    return f'{framed}<ul class="facts">{listed}</ul>'


def grid(defended: Sequence[Defended]) -> list[list[str]]:
    """The same table as text: the head, then a row for each model and defence; empty without defences."""
    keys = columns(defended)
    made = [["model", "defence", *map(head, keys)]] if defended else []
    for model, defence, cells in lines(defended):
        made.append([model, defence, *(" ".join(filter(None, cell(cells.get(key)))) for key in keys)])
    return made
