"""Paired comparison of arms over seeds: an arm and the first arm see the same initialisation and data order under a seed, so
their difference is free of both [the way of the report's ablations, §4.5]."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.analysis import figures
from dsv3_jax.analysis.metrics import paired_interval, smooth
from dsv3_jax.training.journal import finite

MEASURES = {
    "bits_per_byte": "validation bits per byte",
    "loss": "validation loss, nats per token",
    "max_vio": "mean MaxVio, second half of training",
}
Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # arm -> per seed {"validation": ..., "metrics": [...]}


def scores(run: Mapping[str, Any]) -> dict[str, float]:
    """The measures of one run, NaN where its validation was not finite."""
    raw, records = run["validation"]["raw"], run["metrics"]
    late = records[len(records) // 2 :]
    found = {name: raw[name]["all"] for name in ("bits_per_byte", "loss")}
    return {
        **{name: math.nan if value is None else value for name, value in found.items()},
        "max_vio": float(np.mean([r["max_vio_mean"] for r in late])),
    }


def compare(runs: Runs) -> dict[str, Any]:
    """JSON-able: every run's measures, and each later arm's paired differences from the first with their 95 % interval.

    Raises ValueError if a run's validation was not finite.
    """
    by_arm = {arm: [scores(run) for run in of_arm] for arm, of_arm in runs.items()}
    for arm, of_arm in by_arm.items():
        for seed, score in enumerate(of_arm):
            if not all(map(math.isfinite, score.values())):
                raise ValueError(f"{arm}, seed {seed}: the run's validation is not finite: {score}; take a lower learning rate")
    return differences(by_arm)


def differences(by_arm: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """What `compare` gives, from measures of any names: arm -> per seed {measure: value}, the same measures everywhere.

    None is what is not finite, and what such a number enters.
    """
    base, *others = by_arm
    found: dict[str, dict[str, Any]] = {}
    for arm in others:
        found[arm] = {}
        for measure in by_arm[base][0]:
            pairs = [a[measure] - b[measure] for a, b in zip(by_arm[arm], by_arm[base], strict=True)]
            mean, half_width = paired_interval(pairs)[:2] if all(map(math.isfinite, pairs)) else (None, None)
            found[arm][measure] = {"pairs": [finite(pair) for pair in pairs], "mean": mean, "half_width_95": half_width}
    known = {arm: [{name: finite(value) for name, value in s.items()} for s in of_arm] for arm, of_arm in by_arm.items()}
    return {"baseline": base, "scores": known, "differences": found}


def table(result: Mapping[str, Any], measures: Mapping[str, str] = MEASURES) -> str:
    """For a terminal of 100 columns; `measures`: name -> title."""
    base, seeds = result["baseline"], len(next(iter(result["scores"].values())))
    interval = "95 % interval" if seeds > 1 else "interval not available with 1 seed"
    lines = [f"{seeds} seed{'s' * (seeds > 1)}; difference: arm - {base}, paired by seed, mean +- {interval}"]
    for measure, title in measures.items():
        lines += ["", title]
        for arm, values in result["scores"].items():
            own = [v[measure] for v in values]
            line = f"  {arm[:44]:<44}" + ("not finite" if None in own else f"{np.mean(own):>10.4f}")
            d = result["differences"][arm][measure] if arm != base else None
            if d is not None and d["mean"] is not None:
                line += f"   {d['mean']:+.4f}" + (f" +- {d['half_width_95']:.4f}" if d["half_width_95"] is not None else "")
            lines.append(line)
    return "\n".join(lines)


def draw(runs: Runs, result: Mapping[str, Any], measures: Mapping[str, str] | None = None) -> Figure:
    """First: curves, mean over seeds with the seeds' range. Then: paired differences, one dot a seed, bar: 95 % interval.

    `measures`: name -> title of the differences that are drawn; default: bits per byte and MaxVio.
    """
    shown = {name: MEASURES[name] for name in ("bits_per_byte", "max_vio")} if measures is None else measures
    panels = 2 + len(shown)
    columns = 2 if panels <= 4 else 3
    rows = -(-panels // columns)
    figure, axes = figures.new_figure(rows, columns, 6 * columns, 3.75 * rows)
    for ax, key, title in (
        (axes[0], "main_loss", "Training loss, nats per token"),
        (axes[1], "max_vio_mean", "Mean MaxVio of a step's batch"),
    ):
        for i, (arm, of_arm) in enumerate(runs.items()):
            steps, span = [r["step"] for r in of_arm[0]["metrics"]], max(1.0, len(of_arm[0]["metrics"]) / 50)
            lines = np.array([smooth([r[key] for r in run["metrics"]], span) for run in of_arm])
            look = figures.style(i)
            ax.fill_between(steps, lines.min(axis=0), lines.max(axis=0), color=look["color"], alpha=0.15, linewidth=0)
            ax.plot(steps, lines.mean(axis=0), label=arm, **look)
        ax.set(title=title, xlabel="step")
        ax.legend(frameon=False, fontsize=8)
    for ax in axes[panels:]:
        ax.axis("off")
    for ax, (measure, title) in zip(axes[2:], shown.items(), strict=False):
        arms = list(result["differences"])
        for i, arm in enumerate(arms):
            d = result["differences"][arm][measure]
            colour = figures.style(i + 1)["color"]
            ax.plot(
                np.array(d["pairs"], float),
                np.full(len(d["pairs"]), i) + 0.12,
                "o",
                color=colour,
                markerfacecolor="none",
                markersize=6,
            )
            if d["mean"] is not None:
                ax.errorbar(d["mean"], i - 0.12, xerr=d["half_width_95"], fmt="s", color=colour, capsize=5, markersize=6)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(range(len(arms)), arms)
        ax.set(ylim=(-0.6, len(arms) - 0.4), xlabel=f"arm - {result['baseline']}", title=f"Difference in {title}")
        ax.invert_yaxis()
    return figure
