"""Figures of the report's mechanisms: balancing by bias [§2.1.2], tiles' errors [§3.3.2], schedules [§4.2], YaRN [§4.3].

Readable without colour: lines differ in dash and marker, bars in hatching.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv3_jax.analysis import figures
from dsv3_jax.analysis.metrics import max_violation, relative_load
from dsv3_jax.analysis.routing_figures import GREYS, HATCHES, MARKERS, RELATIVE
from dsv3_jax.config import Config
from dsv3_jax.training.schedules import (
    batch_sequences,
    bias_update_speed,
    learning_rate,
    mtp_loss_weight,
    total_tokens,
)

POINTS = 600  # of a schedule's curve


def balancing(load_SE: Integer[np.ndarray, "S E"], speed: float) -> Figure:
    """Left: every expert's relative load in the first and in the last step. Right: MaxVio over the steps between."""
    figure, (left, right) = figures.new_figure(1, 2, 13, 3.8)
    shown = {"first step": load_SE[0], f"after {len(load_SE) - 1} updates": load_SE[-1]}
    for i, (label, load_E) in enumerate(shown.items()):
        at = np.arange(len(load_E)) + (i - 0.5) * 0.4
        left.bar(at, relative_load(load_E), 0.4, label=label, color=GREYS[i], hatch=HATCHES[i], edgecolor="black")
    left.axhline(1, color="#8c8c8c", linewidth=0.8)
    left.set(xlabel="expert", ylabel=RELATIVE)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    right.plot(np.arange(len(load_SE)), max_violation(load_SE), **figures.style(0))
    right.set(xlabel=f"updates of the bias by {speed:g}", ylabel="MaxVio: largest load / mean - 1", ylim=(0, None))
    figure.suptitle("Loads under the router's bias")
    return figure


def tile_errors(error_by: Mapping[str, Sequence[float]], outliers: Sequence[float]) -> Figure:
    """Relative error of the other values, a line a way of tiling, against how much larger one channel is."""
    figure, (ax,) = figures.new_figure(1, 1, 8, 4.2)
    for i, (label, errors) in enumerate(error_by.items()):
        ax.plot(outliers, 100 * np.asarray(errors), label=label, marker=MARKERS[i], markersize=5, **figures.style(i))
    ax.set_xscale("log", base=2)
    ax.set_xticks(outliers, [f"{x:g}" for x in outliers])
    ax.set(xlabel="one channel's values, over the others'", ylabel="RMS error of the others / their RMS [%]", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(axis="y", which="minor", labelsize=7)
    ax.set_title("E4M3: what one large channel does to its neighbours")
    figures.legend_beside(ax)
    return figure


def warm_up_starts(config: Config) -> list[int]:
    """Tokens seen before each step of the warm-up, and before the one after it."""
    train, total, starts = config.train, total_tokens(config), [0]
    for _ in range(train.warmup_steps):
        starts.append(starts[-1] + batch_sequences(train, starts[-1], total) * config.data.seq_len)
    return starts


def schedules(config: Config) -> Figure:
    """Learning rate, batch size, speed of the bias and weight of MTP over a run's tokens, in trillions."""
    figure, axes = figures.new_figure(2, 2, 12, 5.6)
    train, total, starts = config.train, total_tokens(config), warm_up_starts(config)
    every = starts[:: max(1, len(starts) // 50)] + np.linspace(0, total * (1 - 1e-9), POINTS).tolist()
    tokens = sorted(t for t in set(every) if t < total)
    steps = [int(np.searchsorted(starts, t, side="right")) for t in tokens]  # counted from 1; enough beyond the warm-up
    curves: dict[str, Sequence[float]] = {
        "learning rate": [1e4 * learning_rate(train, t, total, s) for t, s in zip(tokens, steps, strict=True)],
        "batch [sequences]": [batch_sequences(train, t, total) for t in tokens],
        "bias update speed": [bias_update_speed(train, t, total) for t in tokens],
        "MTP loss weight": [mtp_loss_weight(train, t, total) for t in tokens],
    }
    for ax, (label, values) in zip(axes, curves.items(), strict=True):
        ax.plot(np.array(tokens) / 1e12, values, **figures.style(0))
        ax.set(ylabel=label, xlabel="tokens seen [10^12]", ylim=(0, None))
    axes[0].set_ylabel("learning rate [1e-4]")
    figure.suptitle("Schedules of the run")
    return figure


def frequencies(plain_J: Float[np.ndarray, " J"], yarn_J: Float[np.ndarray, " J"], window: int, extended: int) -> Figure:
    """Left: positions that a pair of rotary channels takes for a turn, as trained and under YaRN. Right: by how much slower."""
    figure, (left, right) = figures.new_figure(1, 2, 13, 4)
    pairs = np.arange(len(plain_J))
    for i, (label, omega_J) in enumerate({"as trained": plain_J, "YaRN": yarn_J}.items()):
        look: dict[str, Any] = {"marker": MARKERS[i], "markersize": 4, **figures.style(i)}
        left.plot(pairs, 2 * np.pi / omega_J, label=label, **look)
    for positions, label in ((window, "trained window"), (extended, "extended window")):
        left.axhline(positions, color="#8c8c8c", linewidth=0.8)
        left.annotate(f"{label}, {positions:,}", (0, positions), (4, 3), textcoords="offset points", fontsize=8)
    left.set(yscale="log", xlabel="pair of rotary channels", ylabel="positions for one turn")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.plot(pairs, plain_J / yarn_J, marker="o", markersize=4, **figures.style(0))
    right.set(xlabel="pair of rotary channels", ylabel="slower by a factor of", ylim=(0, None))
    figure.suptitle("Fast pairs keep their frequency, slow ones are stretched")
    return figure
