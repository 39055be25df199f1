"""Figures of balance over training [§2.1.2, §4.5.2, §4.5.3]: MaxVio, load and router bias of several runs side by side.

Readable without colour: lines differ in dash and marker, maps run from dark to bright. Runs go by the names that they were
given, layers by those of a routing trace; `step_T` are optimiser steps from 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.analysis import figures
from dsv3_jax.analysis.balance import Balanced, LoadMap
from dsv3_jax.analysis.metrics import smooth
from dsv3_jax.analysis.routing_figures import MARKERS, RELATIVE

Steps = Mapping[str, Integer[np.ndarray, " T"]]
POINTS = 1000  # of a line; more than pixels would only cost time
BIAS = "router bias, in units of the score"
BESIDE = "router bias - layer's mean, in units of the score"  # only differences choose


def look(i: int, points: int = 0) -> dict[str, Any]:
    """Line i of several, with its marker in a few places of `points`, shifted so that they do not hide each other."""
    every = max(1, points // 8)
    marks: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.3}
    return figures.style(i) | marks | ({"markevery": (i * every // 5 % every, every)} if points else {})


def thin(step_T: np.ndarray) -> slice:
    """Of a long run, as many steps as a line can show."""
    return slice(None, None, -(-len(step_T) // POINTS) or 1)


def smoothed(values_T: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Exponential average over a fiftieth of the run; what is not finite changes nothing."""
    return smooth([v if np.isfinite(v) else None for v in values_T.tolist()], max(1.0, len(values_T) / 50))


def _panels(n: int, width: float, height: float, most: int = 3) -> tuple[Figure, list[Axes], int]:
    """As many axes as there are panels; columns of them."""
    columns = min(most, n)
    rows = -(-n // columns)
    figure, axes = figures.new_figure(rows, columns, max(width, min(6.5, 13 / columns)) * columns, height * rows)
    for ax in axes[n:]:
        ax.set_axis_off()
    return figure, axes[:n], columns


def violation(
    steps: Steps, batch: Mapping[str, Float[np.ndarray, " T"]], window: Mapping[str, Float[np.ndarray, " T"]], size: str
) -> Figure:
    """MaxVio, mean of layers, a line a run: of each step's batch (smoothed), and of the load of windows of `size`."""
    figure, axes = figures.new_figure(1, 2, 13, 4.2)
    for ax, values, title in zip(
        axes, (batch, window), ("Of one batch, smoothed", f"Of the last {size} together"), strict=True
    ):
        for i, (name, step_T) in enumerate(steps.items()):
            at = thin(step_T)
            shown = smoothed(values[name]) if values is batch else values[name]
            ax.plot(step_T[at], shown[at], label=name, **look(i, len(step_T[at])))
        ax.set(xlabel="optimiser step", ylabel="MaxVio: fullest expert / mean - 1", title=title)
    top = max((ax.get_ylim()[1] for ax in axes), default=1)
    for ax in axes:
        ax.set_ylim(0, top)  # the same for both: how much of a batch's violation is chance shows beside the window's
    figures.legend_beside(axes[1])
    return figure


def violation_by_layer(
    steps: Steps, window: Mapping[str, Float[np.ndarray, "T L"]], layers: Sequence[str], size: str
) -> Figure:
    """MaxVio of windows, a panel a run, a line a layer of `layers`."""
    figure, axes, columns = _panels(len(steps), 4.2, 3.2)
    top = max((float(np.nanmax(v, initial=0.0)) for v in window.values()), default=0.0) or 1.0
    for j, (ax, (name, step_T)) in enumerate(zip(axes, steps.items(), strict=True)):
        at = thin(step_T)
        for i, layer in enumerate(layers):
            ax.plot(step_T[at], window[name][at, i], label=f"layer {layer}", **look(i, len(step_T[at])))
        ax.set(title=name, xlabel="optimiser step", ylim=(0, 1.05 * top))
        if j % columns == 0:
            ax.set_ylabel(f"MaxVio of {size}")
    figures.legend_beside(axes[-1])
    return figure


def load_maps(steps: Steps, maps: Mapping[str, LoadMap], layer: str, brightest: float | None = None) -> Figure:
    """Relative load of every expert (rows) over training (columns, of several steps each) in one layer; a panel a run.
    `brightest`: where the scale ends, by default at the largest load, but between 2 and 4."""
    figure, axes, columns = _panels(len(steps), 4.6, 3.4)
    largest = max((float(found.load.max(initial=0)) for found in maps.values()), default=0.0)
    top = min(4.0, max(2.0, largest)) if brightest is None else brightest
    image = None
    for j, (ax, (name, step_T)) in enumerate(zip(axes, steps.items(), strict=True)):
        found, n_experts = maps[name], len(maps[name].load)
        image = ax.pcolormesh(
            _bounds(step_T, found.first), np.arange(n_experts + 1) - 0.5, found.load, cmap=figures.MAP, vmin=0, vmax=top
        )
        ax.set(title=name, xlabel="optimiser step", ylim=(n_experts - 0.5, -0.5))
        if j % columns == 0:
            ax.set_ylabel("expert")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, pad=0.01, extend="max" if largest > top else "neither")
        bar.set_label(RELATIVE, fontsize=8)
    figure.suptitle(f"Load of layer {layer} over training")
    return figure


def _bounds(step_T: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Steps at which spans begin, and where the last one ends."""
    return np.append(step_T[first[:-1]], step_T[-1] + 1) - 0.5


def bias_paths(
    steps: Steps,
    bias: Mapping[str, Float[np.ndarray, "T L E"]],
    turned: Mapping[str, Float[np.ndarray, "T L"]],
    layers: Sequence[str],
) -> Figure:
    """A row a run: the bias of every expert of the first of `layers`, beside the layer's mean; mean and spread of every
    layer's; and how many of a layer's biases turn (`balance.turned`, smoothed)."""
    figure, axes = figures.new_figure(len(steps), 3, 15.5, 0.3 + 3.7 * len(steps))
    for j, (name, step_T) in enumerate(steps.items()):
        left, middle, right = axes[3 * j : 3 * j + 3]
        at = thin(step_T)
        step, bias_TLE = step_T[at], bias[name][at].astype(np.float64)
        beside_TE = bias_TLE[:, 0] - bias_TLE[:, 0].mean(axis=-1, keepdims=True)
        for e in range(beside_TE.shape[1]):
            left.plot(step, beside_TE[:, e], **{**figures.style(e), "linewidth": 0.9})
        _name_ends(left, beside_TE[-1])
        for i, layer in enumerate(layers):
            mean_T, spread_T = bias_TLE[:, i].mean(axis=-1), bias_TLE[:, i].std(axis=-1)
            middle.plot(step, spread_T, label=f"layer {layer}, spread", **look(i, len(step)))
            bare = look(i, len(step)) | {"markerfacecolor": "white", "linewidth": 0.8}
            middle.plot(step, mean_T, label=f"layer {layer}, mean", **bare)
            right.plot(step, 100 * smoothed(turned[name][:, i])[at], label=f"layer {layer}", **look(i, len(step)))
        left.set(ylabel=BESIDE, title=f"{name}: experts of layer {layers[0]}")
        middle.set(ylabel=BIAS, title=f"{name}: mean and spread over experts")
        right.set(ylabel="experts whose bias turns, %", title=f"{name}: sign flips of the update", ylim=(0, 100))
        for ax in (left, middle, right):
            ax.set_xlabel("optimiser step")
            ax.yaxis.label.set_fontsize(9)
        figures.legend_beside(middle)
        figures.legend_beside(right)
    return figure


def _name_ends(ax: Axes, last_E: np.ndarray, most: int = 3) -> None:
    """Numbers of the experts whose bias ends highest and lowest, one below the other where they would overlap."""
    order = np.argsort(last_E, kind="stable")
    low, high = ax.get_ylim()
    gap, place = 0.055 * (high - low), -np.inf
    ends = order if len(order) <= 2 * most else np.concatenate([order[:most], order[-most:]])
    for e in ends:
        place = max(float(last_E[e]), place + gap)
        ax.annotate(
            str(e), (1, place), (3, 0), xycoords=ax.get_yaxis_transform(), textcoords="offset points", fontsize=7, va="center"
        )


class Experts(NamedTuple):
    """What one run says of its experts."""

    bias_LE: Float[np.ndarray, "L E"]  # the last
    early_LE: Float[np.ndarray, "L E"]  # relative load at the start of training
    late_LE: Float[np.ndarray, "L E"]  # and at its end
    turns_LE: Float[np.ndarray, "L E"]  # share of the bias's updates that turned


def bias_against_load(found: Mapping[str, Experts], layers: Sequence[str]) -> Figure:
    """A row a run, an expert a point, a marker a layer: its last bias beside the layer's mean, against its load at the start
    and at the end of training; and how often its bias turned, against how far it went. r: Pearson's."""
    figure, axes = figures.new_figure(len(found), 3, 16, 0.3 + 3.7 * len(found))
    for j, (name, (bias_LE, early_LE, late_LE, turns_LE)) in enumerate(found.items()):
        left, middle, right = axes[3 * j : 3 * j + 3]
        beside_LE = bias_LE - bias_LE.mean(axis=-1, keepdims=True)
        for i, layer in enumerate(layers):
            style = look(i) | {"linestyle": "none", "markerfacecolor": "none"}
            early, late = (_correlation(load_LE[i], beside_LE[i]) for load_LE in (early_LE, late_LE))
            left.plot(early_LE[i], beside_LE[i], **style)
            middle.plot(late_LE[i], beside_LE[i], **style)
            label = f"layer {layer}\nr early {early}, late {late}"
            right.plot(np.abs(beside_LE[i]), 100 * turns_LE[i], label=label, **style)
        right.set(xlabel=f"|{BESIDE}|", ylabel="updates that turned, %", ylim=(0, 105))
        right.set_title(f"{name}: turns against distance")
        shared = max(2.0, float(max(early_LE.max(initial=0), late_LE.max(initial=0)))) * 1.05
        for ax, when in ((left, "early"), (middle, "late")):
            ax.axvline(1, color="#b0b0b0", linewidth=0.8)
            ax.axhline(0, color="#b0b0b0", linewidth=0.8)
            ax.set(xlabel=RELATIVE, title=f"{name}: last bias against {when} load", xlim=(0, shared))
        left.set_ylabel(BESIDE, fontsize=9)
        figures.legend_beside(right)
    return figure


def _correlation(a: np.ndarray, b: np.ndarray) -> str:
    """ "-" where one of the two does not vary."""
    return f"{np.corrcoef(a, b)[0, 1]:.2f}" if len(a) > 1 and a.std() > 0 and b.std() > 0 else "-"


def speeds(found: Mapping[str, Balanced], goal: float) -> Figure:
    """Of several bias speeds on scores that do not change: MaxVio of all tokens, and the bias's spread over experts beside that
    of the experts' mean scores (`goal`), over steps."""
    figure, (left, right) = figures.new_figure(1, 2, 13, 4.2)
    for i, (name, each) in enumerate(found.items()):
        style = look(i, len(each.step_S))
        left.plot(each.step_S, each.violation_S, label=name, **style)
        right.plot(each.step_S, each.bias_SE.std(axis=-1, dtype=np.float64), label=name, **style)
    right.axhline(goal, color="#8c8c8c", linewidth=0.9, label="spread of mean scores")
    left.set(ylabel="MaxVio of all tokens", title="How soon a speed balances")
    right.set(ylabel=f"spread of the {BIAS}", title="How far its bias has come")
    for ax in (left, right):
        ax.set(xlabel="step of the controller", ylim=(0, None))
    figures.legend_beside(right)
    return figure


def saturation(
    steps: Mapping[str, Sequence[int]], shares: Mapping[str, Float[np.ndarray, " checkpoints"]], chance: float
) -> Figure:
    """Share of the last checkpoint's choices that each checkpoint makes too, mean of layers, a line a run. `chance`: of experts
    that are drawn, K / E."""
    figure, (ax,) = figures.new_figure(1, 1, 8, 4)
    for i, (name, share) in enumerate(shares.items()):
        ax.plot(steps[name], 100 * share, label=name, **look(i))
    ax.axhline(100 * chance, color="#8c8c8c", linewidth=0.9)
    ax.annotate("chance", (1, 100 * chance), (-3, 3), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                fontsize=8, ha="right", va="bottom")  # fmt: skip
    ax.set(xlabel="optimiser step of the checkpoint", ylabel="last choices already made, %", ylim=(0, 103))
    ax.set_title("When routing settles")
    figures.legend_beside(ax)
    return figure
