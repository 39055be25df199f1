"""Table and figures of a precision ablation [§3.3, Fig. 10 of the report's appendix B]: `experiments.ablate_fp8`'s result.

Readable without colour: lines differ in marker and dash.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.analysis import figures
from dsv3_jax.analysis.precision import CLAIM, COEFFICIENT

MARKERS = "osD^vP*X<>"
LEAST_TOKENS = 30  # in a bin whose rate is drawn; it says nothing of fewer
Result = Mapping[str, Any]


def look(i: int) -> dict[str, Any]:
    """Line i of several in one panel."""
    return {**figures.style(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.2}


def table(result: Result) -> str:
    """For a terminal of 100 columns."""
    seeds, widths = result["seeds"], (8, 17, 17, 8, 7, 7, 7)

    def line(arm: str, cells: Sequence[str], end: str) -> str:
        return f" {arm:<12}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)) + f"  {end}"

    lines = [
        f"{seeds} seed{'s' * (seeds > 1)}, {result['steps']} steps; all but the loss in percent",
        line("arm", ("loss", "gap to bf16", "gap to fp32", "largest", "act.", "grad.", "flips"), "verdict"),
    ]
    for arm, found in result["arms"].items():
        layers, flips = found["layers"], found["flips"]
        cells = [
            _number(found["loss"], ".4f"),
            *(_gap(found["gaps"].get(base)) for base in ("bf16", "fp32")),
            _largest(found["gaps"].get("bf16")),
            _number(layers and 100 * layers["activations"][-1], ".2f"),
            _number(layers and 100 * layers["gradients"][0], ".2f"),
            _number(flips and 100 * flips["rate"], ".2f"),
        ]
        lines.append(line(arm, cells, found["gaps"]["bf16"]["verdict"] if found["fp8"] else "").rstrip())
    lines += [
        f"gap: in training loss, mean of the last quarter{' +- 95 % interval over seeds' * (seeds > 1)}",
        f"largest: of the gap to bf16, after the first tenth; verdict: on |gap to bf16| < {CLAIM}",
        "act.: error of the last layer's output; grad.: of the first one's gradient; flips: other experts;",
        "all three against fp32 with the same weights",
    ]
    return "\n".join([*lines, *_limited(result), *_chaos(result)])


def _limited(result: Result) -> list[str]:
    return [f"{arm}: gaps of the first {steps} steps" for arm, steps in result["limits"].items() if steps < result["steps"]]


def _chaos(result: Result) -> list[str]:
    if "ulp" not in result["arms"]:
        return []
    gap = result["arms"]["ulp"]["gaps"]["fp32"]
    return [f"chaos alone, ulp against fp32: {_gap(gap)}, largest {_largest(gap)}"]


def _gap(gap: Mapping[str, Any] | None) -> str:
    if gap is None or gap["verdict"] == "diverged":
        return "-"
    return f"{gap['mean']:+.3f}" + ("" if gap["half_width_95"] is None else f" +-{gap['half_width_95']:.3f}")


def _largest(gap: Mapping[str, Any] | None) -> str:
    return "-" if gap is None or gap["verdict"] == "diverged" else f"{gap['largest']:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def draw_gaps(result: Result) -> Figure:
    """One panel an FP8 arm: its gap to bf16, mean and 95 % interval over seeds, and grey, for comparison, chaos alone."""
    arms = {arm: found["gaps"]["bf16"] for arm, found in result["arms"].items() if arm != "bf16" and arm != "ulp"}
    chaos = result["arms"]["ulp"]["gaps"]["fp32"]["curve"] if "ulp" in result["arms"] else None
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = figures.new_figure(rows, columns, 4.6 * columns, 0.8 + 2.9 * rows)
    limit = _limit([gap["curve"] for gap in arms.values()])
    for ax in axes[len(arms) :]:
        ax.set_axis_off()
    for i, (ax, (arm, gap)) in enumerate(zip(axes, arms.items(), strict=False)):
        if chaos is not None:
            ax.plot(chaos["step"], _floats(chaos["mean"]), color="#9a9a9a", linewidth=1, label="ulp - fp32")
        curve = gap["curve"]
        mean, half = _floats(curve["mean"]), np.nan_to_num(_floats(curve["half_width_95"]))
        ax.fill_between(curve["step"], mean - half, mean + half, color=figures.COLOURS[1], alpha=0.2, linewidth=0)
        ax.plot(curve["step"], mean, color="black", linewidth=1.5, label="arm - bf16")
        for side in (-CLAIM, CLAIM):
            ax.axhline(side, color=figures.COLOURS[2], linestyle=(0, (4, 2)), linewidth=1)
        verdict = f": {gap['verdict']}" if result["arms"][arm]["fp8"] else ""
        ax.set_title(f"{arm}, {_gap(gap)} %{verdict}", fontsize=10)
        ax.set(ylim=(-limit, limit), xlabel="step", ylabel="gap in training loss, %" if i % columns == 0 else None)
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    band = f"; band: 95 % over {result['seeds']} seeds" * (result["seeds"] > 1)
    figure.suptitle(f"Loss smoothed with {COEFFICIENT}, against bf16; dashed: +-{CLAIM} %{band}")
    return figure


def _limit(curves: Sequence[Mapping[str, Any]]) -> float:
    """Of the axes: twice the typical arm's largest mean after the first tenth, so that a diverging one leaves the panel."""
    largest = [np.nanmax(np.abs(_floats(c["mean"]))[len(c["mean"]) // 10 :], initial=0.0) for c in curves]
    return max(2 * CLAIM, 2.0 * float(np.median(largest)))


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, np.float64)


def draw_layers(result: Result) -> Figure:
    """Relative errors against fp32 by layer, one line an arm."""
    titles = {
        "activations": "Residual stream after the layer",
        "gradients": "Gradient of the loss with respect to it",
        "parameters": "Gradient of the layer's parameters",
    }
    figure, axes = figures.new_figure(1, 3, 15, 4.4)
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for i, (arm, found) in enumerate(_measured(result, "layers").items()):
            errors = 100 * np.array(found[name])
            ax.plot(range(1, len(errors) + 1), errors, label=arm, **look(i))
        ax.set(title=title, xlabel="layer", yscale="log", ylabel="relative error, %" if ax is axes[0] else None)
        ax.set_xticks(range(1, len(errors) + 1))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="y", which="minor", labelsize=7)
    figures.legend_beside(axes[-1])
    return figure


def draw_flips(result: Result) -> Figure:
    """Share of tokens whose experts are others than in fp32: by fp32's margin, beside how many tokens have it, and by layer."""
    figure, (left, middle, right) = figures.new_figure(1, 3, 15, 4.4)
    arms = _measured(result, "flips")
    for i, (arm, found) in enumerate(arms.items()):
        margin = found["margin"]
        rates = np.where(np.array(margin["tokens"]) < LEAST_TOKENS, np.nan, 100 * _floats(margin["rate"]))
        left.plot(_centres(margin["edges"]), rates, label=arm, **look(i))
        layers = 100 * np.array(found["rate_by_layer"])
        right.plot(result["moe_layers"], layers, label=arm, **look(i))
    margin = next(iter(arms.values()))["margin"]
    ends = _ends(margin["edges"])
    middle.bar(ends[:-1], margin["tokens"], width=np.diff(ends), align="edge", color="#b0b0b0", edgecolor="black")
    left.set(xscale="log", xlabel="fp32's margin", ylabel="other experts chosen, %", title="Flips by margin")
    middle.set(xscale="log", yscale="log", xlabel="fp32's margin", ylabel="tokens x layers", title="How often a margin occurs")
    right.set(xlabel="layer", ylabel="other experts chosen, %", title="Flips by layer", ylim=(0, None))
    right.set_xticks(result["moe_layers"])
    figures.legend_beside(right)
    return figure


def _measured(result: Result, what: str) -> dict[str, Any]:
    return {arm: found[what] for arm, found in result["arms"].items() if found[what]}


def _centres(edges: Sequence[float]) -> np.ndarray:
    """Of the bins, on a logarithmic axis; the outer ones, which have no end, are as wide as the others."""
    ends = _ends(edges)
    return np.sqrt(ends[1:] * ends[:-1])


def _ends(edges: Sequence[float]) -> np.ndarray:
    ratio = edges[1] / edges[0]
    return np.array([edges[0] / ratio, *edges, edges[-1] * ratio])
