"""Figure of a plan: where a device's memory goes at each moment of a step, and which bounds its time meets [§3.2].

Readable without colour: neighbouring pieces differ in hatch and brightness, and every bar carries its number.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.analysis.figures import COLOURS, legend_beside, new_figure
from dsv3_jax.planner.memory import MOMENTS, Cause, at
from dsv3_jax.planner.rows import Number, Plan

GIB = 2**30
LEAST = 0.01  # of the largest bar: smaller causes are drawn as one
WHOLE, PART = COLOURS[1], "#a6cbe3"


def draw(plan: Plan, found: tuple[Cause, ...], limit_gib: Number, title: str) -> Figure:
    """Memory by cause against what the chip has, and the step's bounds in seconds, with what they consist of."""
    figure, (left, right) = new_figure(1, 2, 16, 5)
    _memory(left, found, limit_gib)
    _time(right, times(plan))
    figure.suptitle(title, fontsize=10)
    return figure


def times(plan: Plan) -> list[tuple[str, Number, bool]]:
    """(label, seconds, whether it is a part of the bound above it) of every bound."""
    sent = {row.key: (row.label, row.values[1]) for row in plan.section("communication").rows}
    found = []
    for row in plan.section("time").rows:
        kind, _, part = row.key.partition(".")
        if kind in ("compute", "memory", "link"):
            found.append((row.label.strip(), float(row.values[0] or 0), kind == "memory" and bool(part)))
        if kind == "link":
            on_link = [pair for key, pair in sent.items() if key.endswith(f".{part}")]
            found += [(label, float(seconds or 0), True) for label, seconds in on_link]
    return found


def _memory(ax: Axes, found: tuple[Cause, ...], limit_gib: Number) -> None:
    totals = [at(moment, found) / GIB for moment in MOMENTS]
    shown = [c for c in found if c.bytes / GIB >= LEAST * max(totals)]
    pieces: list[tuple[str, tuple[Cause, ...]]] = [(c.label, (c,)) for c in shown]
    if rest := tuple(c for c in found if c.bytes and c not in shown):
        pieces.append(("all smaller ones", rest))
    base = [0.0] * len(MOMENTS)
    for i, (label, causes) in enumerate(pieces):
        sizes = [at(moment, causes) / GIB for moment in MOMENTS]
        colour, hatch = COLOURS[1 + i % (len(COLOURS) - 1)], ("", "////", "....")[i % 3]
        ax.barh(MOMENTS, sizes, left=base, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
        base = [b + s for b, s in zip(base, sizes, strict=True)]
    _numbers(ax, [f"{total:,.1f}" for total in totals], totals)
    ax.axvline(limit_gib, color="black", linestyle=(0, (5, 2)), label=f"the chip's {limit_gib:,.4g} GiB")
    ax.set(xlabel="GiB of a device", title="Memory, by moment of the step", xlim=(0, 1.12 * max(*totals, limit_gib)))
    legend_beside(ax)


def _time(ax: Axes, found: list[tuple[str, Number, bool]]) -> None:
    labels, sizes = [f"  {label}" if part else label for label, _, part in found], [seconds for _, seconds, _ in found]
    ax.barh(range(len(found)), sizes, color=[PART if part else WHOLE for *_, part in found])
    ax.set_yticks(range(len(found)), labels, fontsize=8)
    _numbers(ax, [f"{size:,.3g} s" for size in sizes], sizes)
    ax.set(xlabel="seconds", title="Time of a step, each bound alone (dark)", xlim=(0, 1.15 * max(sizes)))


def _numbers(ax: Axes, texts: list[str], ends: list[Number]) -> None:
    for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
        ax.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.invert_yaxis()
