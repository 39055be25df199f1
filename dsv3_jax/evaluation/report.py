"""An evaluation for people: a table that fits a terminal, and a figure of bars with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from dsv3_jax.analysis import figures

HATCHES = ("", "///", "...", "xxx", "\\\\\\")
LABELS = {
    "accuracy": "sum of log-probabilities", "accuracy_per_byte": "per byte", "accuracy_unconditional": "less unconditional",
    "exact_match": "exact match",
}  # fmt: skip
WIDTH = 92


class Row(NamedTuple):
    """One number of a task."""

    task: str
    part: str  # a domain, a category, or `all`
    what: str
    n: str
    estimate: Mapping[str, float]


def rows_of(task: str, summary: Mapping[str, Any]) -> list[Row]:
    """A summary's numbers in the order of reading."""
    if "domains" in summary:
        parts = [*summary["domains"].items(), ("all", summary["all"])]
        return [Row(task, part, "bits per byte", f"{own['bytes']:,} bytes", own["bits_per_byte"]) for part, own in parts]
    found = []
    for part, own in [*summary.get("categories", {}).items(), ("all", summary)]:
        n = f"{own['records']:,} record{'s' * (own['records'] != 1)}"
        found += [Row(task, part, LABELS.get(name, name), n, value) for name, value in own.items() if _is_estimate(value)]
    return found


def _is_estimate(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"value", "low", "high"}


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Of all finished tasks."""
    lines: list[str] = []
    for task, summary in summaries.items():
        if lines:
            lines.append("")
        lines.append(task[:WIDTH])
        for row in rows_of(task, summary):
            e = row.estimate
            interval = f"{e['value']:.4f}  [{e['low']:.4f}, {e['high']:.4f}]"
            lines.append(f"  {row.part[:18]:<18}  {row.what[:24]:<24}  {interval:<26}  {row.n:>16}")
        lines += [f"  {note}" for note in notes(summary)]
    return "\n".join(lines)


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the numbers."""
    found = []
    if "chance" in summary:
        found.append(f"guessing: {summary['chance']:.4f}")
    if summary.get("cut_records"):
        tokens = f" ({summary['cut_tokens']:,} tokens)" if "cut_tokens" in summary else ""
        found.append(f"cut from the left to fit the window: {summary['cut_records']:,} records{tokens}")
    if summary.get("timed_out"):
        found.append(f"timed out: {summary['timed_out']:,} of {summary['samples']:,} programs")
    if "own_namespaces" in summary:
        found.append(f"programs ran in namespaces of their own: {', '.join(summary['own_namespaces'])}")
    return found


def draw(summaries: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A panel a task: a bar for each domain, category or k, with its 95 % interval; what guessing gives, dashed."""
    heights = [1.0 + 0.3 * len(rows_of(task, summary)) for task, summary in summaries.items()]
    figure, axes = figures.new_figure(len(summaries), 1, 9, sum(heights))
    grid = axes[0].get_gridspec()
    assert grid is not None
    grid.set_height_ratios(heights)
    for ax, (task, summary) in zip(axes, summaries.items(), strict=True):
        rows = rows_of(task, summary)
        readings = list(dict.fromkeys(row.what for row in rows))
        for i, row in enumerate(rows):
            which, e = readings.index(row.what), row.estimate
            ax.barh(i, e["value"], color="#d9d9d9", edgecolor="black", hatch=HATCHES[which % len(HATCHES)], height=0.7)
            ax.errorbar(
                e["value"], i, xerr=[[max(0.0, e["value"] - e["low"])], [max(0.0, e["high"] - e["value"])]], color="black",
                capsize=3, linewidth=1.2,
            )  # fmt: skip
        ax.set_yticks(range(len(rows)), [_label(row, readings) for row in rows], fontsize=8)
        ax.invert_yaxis()
        if "chance" in summary:
            ax.axvline(summary["chance"], color="black", linestyle=(0, (4, 2)), linewidth=1)
        unit = "bits per byte, less is better" if "domains" in summary else "share of records, more is better"
        ax.set(title=task, xlabel=f"{unit}; 95 % interval")
        ax.set_xlim(0, None if "domains" in summary else 1)
    return figure


def _label(row: Row, readings: Sequence[str]) -> str:
    return row.part if len(readings) == 1 else f"{row.part}, {row.what}"
