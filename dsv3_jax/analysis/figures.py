"""Figures of a run [Figs. 9-11 of the report's appendix C]: losses, MaxVio, router bias, expert load. Readable without colour:
lines differ in dash and brightness, maps run from dark to bright and carry their numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsv3_jax.analysis.metrics import smooth

DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1))]
COLOURS = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f", "#e69f00", "#56b4e9"]
MAP = "cividis"  # its brightness rises evenly
NUMBERS_UP_TO = 20  # columns; beyond, numbers in a map's cells would not be legible


def style(i: int) -> dict[str, Any]:
    """Line i's look: neighbours differ in colour and in dash."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}


def new_figure(rows: int, columns: int, width: int | float, height: int | float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def save(figure: Figure, path: str | Path) -> None:
    """Whole or not at all."""
    beside = Path(path).with_suffix(".tmp.png")
    figure.savefig(beside, dpi=140)
    beside.replace(path)


def legend_beside(ax: Axes) -> None:
    """Legend right of the axes, where no line can run through it."""
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, handlelength=3)


def losses(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Main and MTP loss, every domain's loss, gradient norm and learning rate, over steps."""
    figure, (left, middle, right) = new_figure(1, 3, 14, 4)
    steps, span = [r["step"] for r in records], max(1.0, len(records) / 50)
    for i, (name, label) in enumerate((("main_loss", "main"), ("mtp_loss", "MTP"))):
        values = [r[name] for r in records]
        if any(values):
            left.plot(steps, [np.nan if v is None else v for v in values], color="#c8c8c8", linewidth=0.7, zorder=1)
            left.plot(steps, smooth(values, span), label=label, **style(i))
    left.set(xlabel="step", ylabel="nats per token", title="Training loss")
    left.legend(frameon=False)

    for i, domain in enumerate(records[0]["domain_loss"]):
        middle.plot(steps, smooth([r["domain_loss"][domain] for r in records], span), label=domain, **style(i))
    middle.set(xlabel="step", ylabel="nats per token", title="Training loss by domain")
    tail = [v for line in middle.lines for v in np.asarray(line.get_ydata())[len(records) // 10 :] if np.isfinite(v)]
    if tail:
        middle.set_ylim(min(tail) - 0.2, max(tail) + 0.2)
    legend_beside(middle)

    norms = [r["grad_norm"] for r in records]
    right.plot(steps, [np.nan if v is None else v for v in norms], color="#8c8c8c", linewidth=0.8, label="gradient norm (left)")
    for r in records:
        if r["nonfinite"]:
            right.axvline(r["step"], color="#d55e00", linewidth=1)
    right.set(xlabel="step", yscale="log", title="Gradient norm and learning rate")
    twin = right.twinx()
    twin.plot(steps, [r["learning_rate"] for r in records], label="learning rate (right)", **style(1))
    twin.spines[["top"]].set_visible(False)
    handles = right.get_lines()[:1] + twin.get_lines()
    right.legend(handles, [str(h.get_label()) for h in handles], frameon=False, fontsize=8, loc="lower center")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.tick_params(axis="y", which="minor", labelsize=7)
    return figure


def violation(records: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Figure:
    """MaxVio (busiest expert over the mean, minus 1) of each MoE layer and their mean, over steps."""
    figure, (ax,) = new_figure(1, 1, 8, 4.2)
    steps, span = [r["step"] for r in records], max(1.0, len(records) / 50)
    ax.plot(steps, smooth([r["max_vio_mean"] for r in records], span), color="black", linewidth=2.8, label="mean of layers")
    for i, name in enumerate(layers):
        label = name if len(layers) <= 16 else None  # more could not be told apart
        ax.plot(steps, smooth([r["max_vio"][i] for r in records], span), label=label, **{**style(i + 1), "linewidth": 1.2})
    ax.set(xlabel="step", ylabel="MaxVio of a step's batch", title="Load violation (0: every expert has the same load)")
    ax.set_ylim(bottom=0)
    legend_beside(ax)
    return figure


def bias_paths(steps: np.ndarray, bias_SLE: Float[np.ndarray, "S L E"], layers: Sequence[str]) -> Figure:
    """Router bias of every expert over steps, one panel a MoE layer."""
    columns = min(4, len(layers))
    figure, axes = new_figure(-(-len(layers) // columns), columns, 3.4 * columns, 2.8 * -(-len(layers) // columns))
    limit = max(1e-6, float(np.abs(bias_SLE).max())) * 1.05
    for i, ax in enumerate(axes):
        if i >= len(layers):
            ax.set_axis_off()
            continue
        for expert in range(bias_SLE.shape[2]):
            ax.plot(steps, bias_SLE[:, i, expert], **{**style(expert), "linewidth": 0.9})
        ax.set(title=layers[i], ylim=(-limit, limit), xlabel="step")
    axes[0].set_ylabel("router bias of each expert")
    return figure


def load_map(load_LE: Float[np.ndarray, "L E"], layers: Sequence[str], title: str) -> Figure:
    """Relative load of every expert (columns) in every layer (rows)."""
    rows, experts = load_LE.shape
    figure, (ax,) = new_figure(1, 1, max(6, min(14, 1.8 + 0.52 * experts)), 1.6 + 0.42 * rows)
    _draw_map(figure, ax, load_LE, layers, max(2.0, float(load_LE.max())))
    ax.set(title=title, xlabel="expert")
    return figure


def domain_maps(load_LME: Float[np.ndarray, "L M E"], domains: Sequence[str], layers: Sequence[str], title: str) -> Figure:
    """Relative load of every expert (columns) by domain (rows), one panel a MoE layer."""
    n_layers, n_domains, experts = load_LME.shape
    columns = min(2, n_layers)
    rows = -(-n_layers // columns)
    width = max(4.5, min(9, 1.4 + 0.42 * experts)) * columns
    figure, axes = new_figure(rows, columns, width, (1.3 + 0.36 * n_domains) * rows)
    top = max(2.0, float(load_LME.max()))
    for i, ax in enumerate(axes):
        if i >= n_layers:
            ax.set_axis_off()
            continue
        _draw_map(figure, ax, load_LME[i], domains, top)
        ax.set(title=layers[i], xlabel="expert")
    figure.suptitle(title)
    return figure


def _draw_map(figure: Figure, ax: Axes, values: Float[np.ndarray, "R E"], names: Sequence[str], top: float) -> None:
    image = ax.imshow(values, cmap=MAP, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    if values.shape[1] <= NUMBERS_UP_TO:
        ax.set_xticks(range(values.shape[1]))
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < 0.5 * top else "black"
            ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    ax.tick_params(length=0, labelsize=8)
    figure.colorbar(image, ax=ax, pad=0.01)
