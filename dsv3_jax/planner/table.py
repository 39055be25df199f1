"""A plan, and the receipts, as text of at most 100 columns."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from dsv3_jax.planner.receipts import Receipt
from dsv3_jax.planner.rows import Number, Plan, Row, Section, Value

WIDTH, CELL, UNIT, ORIGIN = 100, 13, 7, 7
LABEL, INPUTS = 33, 25  # of the receipts
# For each unit, from the largest: how much of it makes one of another, that one's name, and digits after the point.
SCALES: dict[str, tuple[tuple[Number, str, int], ...]] = {
    "s": ((1, "s", 3), (1e-3, "ms", 3), (1e-6, "us", 3)),
    "B": ((2**30, "GiB", 3), (2**20, "MiB", 3), (1, "B", 0)),
    "FLOP": ((1e15, "PFLOP", 3), (1e12, "TFLOP", 3), (1e9, "GFLOP", 3), (1e6, "MFLOP", 3), (1, "FLOP", 0)),
    "tokens": ((1e12, "T tok", 3), (1e9, "G tok", 3), (1, "tokens", 0)),
    "%": ((0.01, "%", 1),),
}
SHORT = {"parameters": "", "elements": "", "sequences": "seqs", "micro-batches": "micro", "tokens/s": "tok/s"}


def scaled(value: Value, unit: str) -> tuple[str, str]:
    """A value and its unit for people."""
    if value is None:
        return "-", ""
    if isinstance(value, str):
        return value, unit
    for factor, name, digits in SCALES.get(unit, ()):
        if abs(value) >= factor or factor == SCALES[unit][-1][0]:
            return f"{value / factor:,.{digits}f}", name
    whole = float(value).is_integer() or abs(value) >= 1e4
    return f"{value:,.0f}" if whole else f"{value:,.4g}", SHORT.get(unit, unit)


def render(plan: Plan) -> str:
    blocks = [_section(section) for section in plan.sections if section.rows]
    lines = [
        line
        for i, text in enumerate(plan.assumptions, 1)
        for line in textwrap.wrap(text, WIDTH, initial_indent=f"{i:>3}. ", subsequent_indent="     ")
    ]
    return "\n\n".join(["\n".join(block) for block in blocks] + ["\n".join(["Assumptions", *lines])])


def _section(section: Section) -> list[str]:
    few = len(section.columns) < 3
    shown = [row for row in section.rows if row.units != ("B",) or any(row.values)]  # a cause of no bytes goes without saying
    cells = [[scaled(value, row.unit(i)) for i, value in enumerate(row.values)] for row in shown]
    every = [cell for row in cells for cell in row]
    number = max([CELL if few else 0, *map(len, section.columns), *(len(text) for text, _ in every)])
    unit = max([UNIT if few else 0, *(len(name) for _, name in every)])
    label = WIDTH - len(section.columns) * (number + unit + 2) - ORIGIN

    def line(left: str, row: Sequence[tuple[str, str]], origin: str) -> str:
        return f"{left:<{label}}" + "".join(f"{text:>{number}} {name:<{unit}} " for text, name in row) + origin

    header = [(name, "") for name in section.columns] if len(section.columns) > 1 else []
    rows = [line(_fitted(row, label), found, row.origin) for row, found in zip(shown, cells, strict=True)]
    return [line(section.title, header, "").rstrip(), *rows]


def _fitted(row: Row, width: int) -> str:
    text = f"  {row.label}"
    if row.note and len(text) + len(row.note) + 3 < width:
        text += f" ({row.note})"
    return text[: width - 1]


def render_receipts(found: Sequence[Receipt], published: Mapping[str, Number]) -> str:
    """Derived and published side by side; the difference is relative to the published figure."""
    lines = [f"{'receipt':<{LABEL}}{'derived':>15} {'published':>15} {'apart':>8}  derived from"]
    for r in found:
        theirs = published.get(r.key)
        ours, given = _exact(r.value), "-" if theirs is None else _exact(theirs)
        difference = "" if theirs is None else "exact" if r.value == theirs else f"{r.value / theirs - 1:+.3%}"
        label = f"{r.label} [{r.unit}]" if r.unit in SCALES or r.unit in ("h", "$", "tokens/s") else r.label
        left, right = (textwrap.wrap(text, width) for text, width in ((label, LABEL - 1), (r.inputs, INPUTS)))
        lines.append(f"{left[0]:<{LABEL}}{ours:>15} {given:>15} {difference:>8}  {right[0]}")
        for more in zip_longest(left[1:], right[1:], fillvalue=""):
            lines.append(f"  {more[0]:<{WIDTH - INPUTS - 2}}{more[1]}".rstrip())
    return "\n".join(lines)


def _exact(value: Number) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e5 else f"{value:,.5g}"
