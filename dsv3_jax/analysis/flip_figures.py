"""Figures of routing flips between formats [§2.1.2, §3.3]: by layer, margin, rank, domain and depth, and what they do to gates.

Readable without colour: lines differ in dash and marker, bars in hatching. Names are those of the traces; bars over points are
95 % intervals of a binomial share (`flips.Rate.interval`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv3_jax.analysis import figures
from dsv3_jax.analysis.flips import EDGES, Depth, Rate, ties_by_rounding
from dsv3_jax.analysis.routing_figures import GREYS, HATCHES, MARKERS

FORMATS = {"E4M3": 2.0**-4, "BF16": 2.0**-8, "FP16": 2.0**-11}  # step from 0.5 to 1, where half the scores of a sigmoid lie
STEPS = 2.0 ** np.arange(-14, -2.9, 0.25)
MOVED = 10.0 ** np.linspace(-4, 0, 81)
LEAST = 30  # tokens in a bin whose rate is drawn


def look(i: int) -> dict[str, Any]:
    """Of trace i."""
    return figures.style(i) | {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.3}


def _points(ax: Axes, at: np.ndarray, rate: Rate, label: str, **style: Any) -> None:
    """Shares in percent with their intervals."""
    (low, high), share = rate.interval(), rate.share
    ax.errorbar(at, 100 * share, yerr=100 * np.array([share - low, high - share]), label=label, capsize=2.5, **style)


def _name_layers(ax: Axes, layers: Sequence[str]) -> None:
    every = -(-len(layers) // 32)
    ax.set_xticks(range(0, len(layers), every), layers[::every], rotation=90 if len(layers) > 12 else 0)
    ax.set(xlabel="layer", xlim=(-0.5, len(layers) - 0.5))


def by_layer(rates: Mapping[str, Rate], kept: Mapping[str, Float[np.ndarray, " L"]], layers: Sequence[str]) -> Figure:
    """Left: tokens with other experts than the reference's. Right: how many of its experts they have on average."""
    figure, (left, right) = figures.new_figure(1, 2, 12, 3.9)
    shift = 0.16 / max(1, len(rates))
    for i, (name, rate) in enumerate(rates.items()):
        at = np.arange(len(layers)) + (i - (len(rates) - 1) / 2) * shift
        _points(left, at, rate, name, **look(i))
        right.plot(at, 100 * kept[name], label=name, **look(i))
    left.set(ylabel="tokens with other experts, %", title="Flips by layer", ylim=(0, None))
    right.set(ylabel="the reference's experts kept, %", title="Experts kept")
    for ax in (left, right):
        _name_layers(ax, layers)
    figures.legend_beside(right)
    return figure


def _ends(edges: np.ndarray) -> np.ndarray:
    """Of the bins on a logarithmic axis: the first, from 0, and the last, without an end, are as wide as the others."""
    ratio = edges[2] / edges[1]
    return np.array([edges[1] / ratio, *edges[1:], edges[-1] * ratio])


def by_margin(
    rates: Mapping[str, Rate],
    same_groups: Mapping[str, Rate],
    predicted: Mapping[str, Float[np.ndarray, " B"]],
    edges: Float[np.ndarray, " B"] = EDGES,
) -> Figure:
    """Left: flips over the reference's margin (solid), those within the same groups (hollow; where groups are limited), and
    what the noise of margins foretells (`predicted`, shares; grey line). Right: how often a margin occurs."""
    figure, (left, right) = figures.new_figure(1, 2, 13, 4.4)
    ends = _ends(edges)
    centres = np.sqrt(ends[1:] * ends[:-1])
    for i, (name, rate) in enumerate(rates.items()):
        drawn = rate.of >= LEAST
        if name in predicted:
            left.plot(centres[drawn], 100 * predicted[name][drawn], color="#8c8c8c", linestyle=figures.DASHES[i], linewidth=3)
        shift = 1.06 ** (i - (len(rates) - 1) / 2)
        _points(left, centres[drawn] * shift, Rate(rate.hits[drawn], rate.of[drawn]), name, **look(i))
        if name in same_groups:
            own = same_groups[name]
            bare = look(i) | {"markerfacecolor": "white", "linewidth": 0.9, "markersize": 6}
            _points(left, centres[drawn] * shift, Rate(own.hits[drawn], own.of[drawn]), f"{name}, same groups", **bare)
    if predicted:
        left.plot([], [], color="#8c8c8c", linewidth=3, label="foretold by noise")
    of = next(iter(rates.values())).of
    right.bar(ends[:-1], of, width=np.diff(ends), align="edge", color="#b0b0b0", edgecolor="black")
    left.set(xscale="log", xlabel="reference's margin, in units of the biased score", ylabel="tokens with other experts, %")
    left.set(title="Flips by margin", ylim=(0, None))
    right.set(xscale="log", xlabel="reference's margin, in units of the biased score", ylabel="tokens x layers")
    right.set(title="How often a margin occurs")
    figures.legend_beside(left)
    return figure


def by_rounding(margins_NL: Float[np.ndarray, "N L"], layers: Sequence[str]) -> Figure:
    """What rounding the scores themselves would flip, over the step to which they are rounded; a line a layer."""
    figure, (ax,) = figures.new_figure(1, 1, 8, 4.2)
    least = 1e-3
    for i, name in enumerate(layers):
        shares = 100 * ties_by_rounding(margins_NL[:, i], STEPS.tolist())
        ax.plot(STEPS, np.maximum(shares, least / 10), label=f"layer {name}", **look(i) | {"markevery": (i, 8)})
    for name, step in FORMATS.items():
        ax.axvline(step, color="#8c8c8c", linewidth=0.9)
        ax.annotate(name, (step, 0.02), (3, 0), xycoords=ax.get_xaxis_transform(), textcoords="offset points",
                    fontsize=8, rotation=90, va="bottom")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(STEPS[0], STEPS[-1]), ylim=(least, 60))
    ax.set_xscale("log", base=2)
    ax.set(xlabel="step to which scores are rounded, in units of the score", ylabel="tokens with another last expert, %")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title("If scores were rounded before the choice")
    figures.legend_beside(ax)
    return figure


def by_rank(lost: Mapping[str, Integer[np.ndarray, "L K"]]) -> Figure:
    """Of all experts lost, the share that the reference had in rank k, 1 for its first; a bar a trace."""
    figure, (ax,) = figures.new_figure(1, 1, 7.5, 3.8)
    width = 0.8 / max(1, len(lost))
    for i, (name, lost_LK) in enumerate(lost.items()):
        count_K = lost_LK.sum(axis=0)
        at = np.arange(1, len(count_K) + 1) + (i - (len(lost) - 1) / 2) * width
        style: dict[str, Any] = {"color": GREYS[i % len(GREYS)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "black"}
        ax.bar(at, 100 * count_K / max(1, count_K.sum()), width, label=name, **style)
    ax.set(xlabel="rank among the reference's experts, by biased score", ylabel="of all experts lost, %")
    ax.set(title="Which experts flip", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figures.legend_beside(ax)
    return figure


def gate_moves(kept: Mapping[str, Float[np.ndarray, " kept"]], flipped: Mapping[str, Float[np.ndarray, " flipped"]]) -> Figure:
    """Share of tokens whose gates moved by more than x, of the weight of all: those with the same experts (thin), and the
    others (thick)."""
    figure, (ax,) = figures.new_figure(1, 1, 8.5, 4.2)
    for i, name in enumerate(kept):
        for values, label, width in ((kept[name], "same experts", 1.0), (flipped[name], "other experts", 2.2)):
            if len(values):
                ordered = np.sort(values.astype(np.float64))
                above = 1 - np.searchsorted(ordered, MOVED, side="right") / len(ordered)
                bare = {"markerfacecolor": "white"} if label == "same experts" else {}
                style = look(i) | {"linewidth": width, "markevery": (3 * i, 10)} | bare
                ax.plot(MOVED, 100 * above, label=f"{name}, {label}", **style)
    ax.set(xscale="log", xlim=(MOVED[0], MOVED[-1]), ylim=(0, 102))
    ax.set(xlabel="share of a token's gate weight on other experts than in the reference", ylabel="tokens with more, %")
    ax.set_title("What becomes of the gates")
    figures.legend_beside(ax)
    return figure


def by_domain(rates: Mapping[str, Rate], domains: Sequence[str]) -> Figure:
    """Flips of all layers together; domains in the order of the first trace's rates."""
    order = np.argsort(next(iter(rates.values())).share)
    figure, (ax,) = figures.new_figure(1, 1, 8, 1.6 + 0.42 * len(domains))
    for i, (name, rate) in enumerate(rates.items()):
        (low, high), share = rate.interval(), rate.share
        at = np.arange(len(domains)) + 0.1 * (i - (len(rates) - 1) / 2)
        style = look(i) | {"linestyle": "none"}
        reach = 100 * np.array([share - low, high - share])[:, order]
        ax.errorbar(100 * share[order], at, xerr=reach, label=name, capsize=2.5, **style)
    ax.set_yticks(range(len(domains)), [domains[m] for m in order])
    ax.set(xlabel="tokens with other experts, %, mean of all layers", ylabel="domain", title="Flips by domain", xlim=(0, None))
    ax.set_ylim(-0.6, len(domains) - 0.4)
    figures.legend_beside(ax)
    return figure


def with_depth(found: Mapping[str, Depth], layers: Sequence[str]) -> Figure:
    """Left: tokens that have flipped in this layer or before, beside what independent flips would give (thin, hollow).
    Right: flips of tokens that flipped before, beside those of tokens that did not (thin, hollow)."""
    figure, (left, right) = figures.new_figure(1, 2, 13, 4.2)
    at = np.arange(len(layers))
    for i, (name, depth) in enumerate(found.items()):
        bare = look(i) | {"markerfacecolor": "white", "linewidth": 0.8}
        left.plot(at, 100 * depth.any_L, label=name, **look(i))
        left.plot(at, 100 * depth.independent_L, label=f"{name}, if independent", **bare)
        for rate, label, style in ((depth.after, "flipped before", look(i)), (depth.before, "not before", bare)):
            drawn = rate.of >= LEAST
            if drawn.any():
                _points(right, at[drawn], Rate(rate.hits[drawn], rate.of[drawn]), f"{name}, {label}", **style)
    left.set(ylabel="tokens, %", title="A flip in this layer or an earlier one", ylim=(0, None))
    right.set(ylabel="tokens with other experts, %", title="Flips of tokens by whether they flipped before", ylim=(0, None))
    for ax in (left, right):
        _name_layers(ax, layers)
        figures.legend_beside(ax)
    return figure
