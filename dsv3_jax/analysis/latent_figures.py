"""Figures and tables of MLA's latent and its cache [§2.1.1]: bytes, spectra, logits' parts, what fewer directions cost.

Readable without colour: lines differ in dash and marker, bars in hatching and carry their numbers, as small maps do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dsv3_jax.analysis import figures
from dsv3_jax.analysis.latent import Study, WeightSpectra, directions_for, effective_rank
from dsv3_jax.analysis.routing_figures import GREYS, HATCHES, MARKERS, table
from dsv3_jax.planner.rows import Number

SHARES = (0.9, 0.99)  # of the energy
GIB = 2**30


def _look(i: int, *, dense: bool = False) -> dict[str, Any]:
    """Line i's dash, colour and marker: at every point or, of a dense line, evenly along it, neighbours' apart."""
    every = {"markevery": (0.03 * (i % 4), 0.12)} if dense else {}
    return figures.style(i) | {"marker": MARKERS[i % len(MARKERS)], "markersize": 5} | every


def _counts(ax: Axes, largest: int) -> None:
    """A logarithmic axis of numbers from 1 on, with 1, 2, 4, ... written out."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(2**-0.1, largest * 2**0.1)


# --- bytes ---


def _short(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def cache_bars(bytes_by: Mapping[str, Mapping[str, Number]], title: str) -> Figure:
    """Bytes of a token by scheme (groups of bars) and format (bars), logarithmic, with its number in kB above each."""
    figure, (ax,) = figures.new_figure(1, 1, 9, 4.2)
    forms = list(next(iter(bytes_by.values())))
    width = 0.8 / len(forms)
    for i, form in enumerate(forms):
        at = np.arange(len(bytes_by)) + (i - (len(forms) - 1) / 2) * width
        sizes = [float(row[form]) for row in bytes_by.values()]
        ax.bar(at, sizes, width, label=form, color=GREYS[i % 4], hatch=HATCHES[i % 4], edgecolor="black")
        for x, size in zip(at, sizes, strict=True):
            ax.annotate(_short(size / 1e3), (x, size), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks(range(len(bytes_by)), list(bytes_by))
    ax.set(yscale="log", ylabel="cache of a token, all layers [bytes]", xlabel="attention; above each bar: kB (1,000 bytes)")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 2, high * 2)
    ax.set_title(title)
    figures.legend_beside(ax)
    return figure


def cache_by_context(bytes_by: Mapping[str, Number], contexts: Sequence[int], title: str) -> Figure:
    """GiB of one sequence's cache against its length, a line a scheme; both axes logarithmic."""
    figure, (ax,) = figures.new_figure(1, 1, 8, 4.2)
    lengths = np.asarray(contexts, np.float64)
    for i, (scheme, size) in enumerate(bytes_by.items()):
        ax.plot(lengths, lengths * float(size) / GIB, label=scheme, **_look(i))
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in contexts])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(yscale="log", xlabel="context [tokens, K = 1,024]", ylabel="cache of one sequence [GiB]", title=title)
    ax.yaxis.set_major_locator(LogLocator(numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.grid(axis="y", color="#d8d8d8", linewidth=0.6)
    figures.legend_beside(ax)
    return figure


# --- spectra ---


def weight_spectra(spectra: Sequence[WeightSpectra], layers: Sequence[str]) -> Figure:
    """A panel a layer: singular values over the largest, of kv_b_proj whole and, median and range over heads, W^UK and W^UV."""
    figure, axes = figures.new_figure(1, len(layers), 1.6 + 3.4 * len(layers), 3.8)
    least = 1.0
    for ax, found, layer in zip(axes, spectra, layers, strict=True):
        parts = {
            "$W^{UKV}$, all heads": found.whole_C[None],
            "$W^{UK}$ of a head": found.keys_HC,
            "$W^{UV}$ of a head": found.values_HC,
        }
        for i, (label, values_HC) in enumerate(parts.items()):
            relative = values_HC / values_HC[:, :1]
            at, look = np.arange(1, relative.shape[1] + 1), _look(i, dense=True)
            ax.plot(at, np.median(relative, axis=0), label=label, **look)
            if len(relative) > 1:
                ax.fill_between(at, relative.min(axis=0), relative.max(axis=0), color=look["color"], alpha=0.15, linewidth=0)
            least = min(least, float(np.median(relative, axis=0).min()))
        _counts(ax, len(found.whole_C))
        ax.set(title=f"layer {layer}", xlabel="number of the singular value")
    for ax in axes:
        ax.set(yscale="log", ylim=(max(1e-6, least / 1.5), 1.3))
    axes[0].set_ylabel("singular value / largest")
    figures.legend_beside(axes[-1])
    return figure


def latent_energy(latent_LC: Float[np.ndarray, "L C"], layers: Sequence[str]) -> Figure:
    """Share of the latents' energy in the first r principal directions, a line a layer, beside that of directions all alike."""
    figure, (ax,) = figures.new_figure(1, 1, 8, 4.2)
    width = latent_LC.shape[1]
    at = np.arange(1, width + 1)
    for i, name in enumerate(layers):
        energy = np.cumsum(np.square(latent_LC[i]))
        ax.plot(at, 100 * energy / energy[-1], label=f"layer {name}", **_look(i, dense=True))
    ax.plot(at, 100 * at / width, color="#8c8c8c", linewidth=0.8, label="all alike")
    for share in SHARES:
        ax.axhline(100 * share, color="#b0b0b0", linewidth=0.8)
        ax.annotate(f"{share:.0%}", (0, 100 * share), (3, -3), ("axes fraction", "data"), "offset points", fontsize=8, va="top")
    _counts(ax, width)
    ax.set(xlabel="principal directions, r", ylabel="energy of the latents in them [%]", ylim=(0, 102))
    ax.set_title("Latents over the text")
    figures.legend_beside(ax)
    return figure


def ranks_by_layer(study: Study, layers: Sequence[str]) -> Figure:
    """Directions that latents and weights use, by layer: effective rank, and those with 90 and 99 % of the energy."""
    figure, axes = figures.new_figure(1, 2, 12, 3.8)
    whole = np.stack([found.whole_C for found in study.weights])
    for ax, values_LC, title in zip(axes, (study.latent_LC, whole), ("latents over the text", "kv_b_proj"), strict=True):
        lines = {"effective rank": effective_rank(values_LC)}
        lines |= {f"{share:.0%} of the energy": directions_for(values_LC, share) for share in reversed(SHARES)}
        for i, (label, found) in enumerate(lines.items()):
            ax.plot(np.arange(len(layers)), found, label=label, **_look(i))
        ax.axhline(values_LC.shape[1], color="#8c8c8c", linewidth=0.8, label="all")
        _layer_ticks(ax, layers)
        ax.set(title=title, ylim=(0, 1.06 * values_LC.shape[1]), ylabel="directions")
    figures.legend_beside(axes[1])
    return figure


def _layer_ticks(ax: Axes, layers: Sequence[str]) -> None:
    step = -(-len(layers) // 20)
    ax.set_xticks(range(0, len(layers), step), layers[::step])
    ax.set_xlabel("layer")
    ax.set_xlim(-0.4, len(layers) - 0.6)


def rank_table(study: Study, layers: Sequence[str]) -> str:
    """A row a layer: latents, then weights, then the mean over heads of W^UK and W^UV."""
    heads = (
        "layer",
        "latents: eff. rank",
        *(f"{s:.0%}" for s in SHARES),
        "kv_b_proj: eff. rank",
        *(f"{s:.0%}" for s in SHARES),
    )
    rows = []
    for name, latent_C, weights in zip(layers, study.latent_LC, study.weights, strict=True):
        cells = []
        for values_C in (latent_C, weights.whole_C):
            counts = [int(directions_for(values_C, share)) for share in SHARES]
            cells += [f"{float(effective_rank(values_C)):.1f}", *map(str, counts)]
        per_head = (f"{effective_rank(values_HC).mean():.1f}" for values_HC in (weights.keys_HC, weights.values_HC))
        rows.append((name, *cells, *per_head))
    return table((*heads, "eff. rank: a head's W^UK", "W^UV"), rows)


# --- logits ---


def content_share(study: Study) -> Float[np.ndarray, "L H"]:
    """Content part's variance over the sum of both parts'."""
    content, rotary = (np.stack([getattr(parts, name) for parts in study.logits_L]) for name in ("content_H", "rotary_H"))
    return content / (content + rotary)


def logit_shares(study: Study, layers: Sequence[str]) -> Figure:
    """Content's share of the logits' variance in every head (columns) of every layer (rows), in percent."""
    share_LH = 100 * content_share(study)
    n_layers, heads = share_LH.shape
    figure, (ax,) = figures.new_figure(1, 1, max(6.0, min(14.0, 2.2 + 0.52 * heads)), 1.6 + min(9.0, 0.42 * n_layers))
    image = ax.imshow(share_LH, cmap=figures.MAP, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    step = -(-n_layers // 24)
    ax.set_yticks(range(0, n_layers, step), layers[::step], fontsize=8)
    if heads <= figures.NUMBERS_UP_TO and n_layers <= figures.NUMBERS_UP_TO:
        ax.set_xticks(range(heads))
        for (row, column), value in np.ndenumerate(share_LH):
            colour = "white" if value < 50 else "black"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    ax.tick_params(length=0, labelsize=8)
    figure.colorbar(image, ax=ax, pad=0.01).set_label("content / (content + rotary) [%]", fontsize=7)
    ax.set(title="Content's share of the logits' variance over keys", xlabel="head", ylabel="layer")
    return figure


# --- fewer directions ---


def truncation(study: Study) -> Figure:
    """Left: relative error of keys, values and attention's output against r, median and range over layers. Right: the loss,
    with the standard error of its difference to that of the whole latent."""
    figure, (left, right) = figures.new_figure(1, 2, 13, 4.2)
    width, ranks = study.latent_LC.shape[1], np.array(study.ranks)
    errors = {"content keys": study.keys_LR, "values": study.values_LR, "attention's output": study.outputs_LR}
    for i, (label, error_LR) in enumerate(errors.items()):
        look = _look(i)
        left.plot(ranks, 100 * np.median(error_LR, axis=0), label=label, **look)
        reach = 100 * error_LR.min(axis=0), 100 * error_LR.max(axis=0)
        left.fill_between(ranks, *reach, color=look["color"], alpha=0.12, linewidth=0)
    every = np.arange(1, width + 1)
    left.plot(every, 100 * np.sqrt(1 - every / width), color="#8c8c8c", linewidth=0.8, label="directions all alike")
    left.set(ylabel="relative error, median and range of layers [%]", ylim=(0, None))
    left.set_title("One layer truncated")
    whole = float(study.nll_N.mean())
    right.errorbar(ranks, whole + study.more_R, study.error_R, label="truncated", capsize=3, **_look(0))
    right.axhline(whole, color="#8c8c8c", linewidth=1, linestyle=figures.DASHES[1], label="whole")
    right.set(ylabel="next-token loss [nats per token]", title="Every layer truncated")
    for ax in (left, right):
        _counts(ax, width)
        ax.set_xlabel(f"directions kept of the latent's {width}, r")
        figures.legend_beside(ax)
    return figure


def truncation_table(study: Study) -> str:
    """A row a number of directions; errors are medians over layers."""
    heads = ("directions", "kept", "keys", "values", "output", "loss", "more than whole", "+-")
    rows = []
    for i, r in enumerate(study.ranks):
        errors = (f"{100 * float(np.median(e[:, i])):.1f} %" for e in (study.keys_LR, study.values_LR, study.outputs_LR))
        more, error = study.more_R[i], study.error_R[i]
        losses = f"{study.nll_N.mean() + more:.4f}", f"{more:+.4f}", f"{error:.4f}"
        rows.append((str(r), f"{100 * r / study.latent_LC.shape[1]:.0f} %", *errors, *losses))
    return table(heads, rows)
