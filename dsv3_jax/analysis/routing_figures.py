"""Figures and tables of a routing trace [§4.5.3, figure 9, appendix C]: load, specialisation, margins, pairs, nodes, tokens.

Readable without colour: small maps carry their numbers, lines differ in dash and marker, bars in hatching, and a token carries
its expert's number. Arrays may be memory maps; layers go by the names that a trace has for them.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dsv3_jax.analysis import figures, routing
from dsv3_jax.analysis.metrics import max_violation, relative_load
from dsv3_jax.analysis.specialisation import Information, Specialist
from dsv3_jax.parallel.traffic import Visits

RELATIVE = "load / mean load of the experts"
THRESHOLDS = 10.0 ** np.linspace(-5, 0, 101)
BF16_STEP = 2.0**-8  # from a number to the next, from 0.5 to 1: scores that are nearer may become equal
MARKERS = "osD^vx+*"
GREYS, HATCHES = ("#404040", "#ffffff", "#a0a0a0", "#ffffff"), ("", "//", "", "..")
FONT, FONT_SIZE = "DejaVu Sans Mono", 8  # comes with Matplotlib
CHARACTER, LINE = 0.072, 0.16  # inches
LONGEST = 24  # characters of a token
MISSING, NONE = "\u25a1", "-"
VISIBLE = str.maketrans({" ": "\u00b7", "\n": "\u21b5", "\r": "\u240d", "\t": "\u2192"})


def spread(n: int, most: int) -> list[int]:
    """At most `most` of 0, ..., n - 1, evenly, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})


# --- load ---


def load_by_layer(load_LE: Integer[np.ndarray, "L E"], layers: Sequence[str]) -> Figure:
    """Relative load of every expert (columns) in every layer (rows)."""
    return _with_units(figures.load_map(relative_load(load_LE), layers, "Relative expert load by layer"), "layer")


def load_by_domain(load_LME: Integer[np.ndarray, "L M E"], domains: Sequence[str], layers: Sequence[str]) -> Figure:
    """As the report's figure 9: a panel a layer, a row a domain; the mean of each row is 1."""
    titles = [f"layer {name}" for name in layers]
    return _with_units(
        figures.domain_maps(relative_load(load_LME), domains, titles, "Relative expert load by domain"), "domain"
    )


def _with_units(figure: Figure, rows: str) -> Figure:
    for ax in figure.axes:
        if ax.images:
            ax.set_ylabel(rows)
        elif ax.get_label() == "<colorbar>":
            ax.set_ylabel(RELATIVE, fontsize=7)
    return figure


def balance_table(load_LE: Integer[np.ndarray, "L E"], gate_bits_L: Float[np.ndarray, " L"], layers: Sequence[str]) -> str:
    """A row a layer. `gate_bits_L`: of `routing.gate_entropy`, which says nothing of balance."""
    entropy, gini_L, dead_L = routing.load_entropy(load_LE), routing.gini(load_LE), routing.dead_experts(load_LE).sum(axis=-1)
    variation_L = routing.coefficient_of_variation(load_LE)
    vio_L = np.where(load_LE.any(axis=-1), max_violation(load_LE), np.nan)
    heads = ("layer", "MaxVio", "std/mean", "Gini", "load entropy", "of even", "gate entropy", "dead")
    rows = [
        (name, *(f"{x:.3f}" for x in (vio, variation, gini)), f"{bits:.2f} bits", f"{100 * share:.1f} %", f"{gate:.2f} bits",
         str(dead))
        for name, vio, variation, gini, bits, share, gate, dead in zip(
            layers, vio_L, variation_L, gini_L, entropy.bits, entropy.share, gate_bits_L, dead_L, strict=True
        )
    ]  # fmt: skip
    return table(heads, rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first is ranged left, the others right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join(map(line, (heads, *rows)))


# --- specialisation ---


def information(found: Sequence[Information], layers: Sequence[str]) -> Figure:
    """A layer's mutual information (dot) beside what chance gives (bar: from the first to the last of its quantiles)."""
    figure, (ax,) = figures.new_figure(1, 1, max(6.5, min(14, 3 + 0.3 * len(layers))), 3.8)
    at, bits = np.arange(len(layers)), [test.bits for test in found]
    mean = np.array([test.null_mean for test in found])
    low, high = (np.array([test.null_quantiles[i] for test in found]) for i in (0, -1))
    reach = np.maximum(0.0, [mean - low, high - mean])  # a skewed distribution's mean may lie beyond a quantile
    ax.errorbar(at, mean, yerr=reach, fmt="_", color="#7f7f7f", capsize=6, markersize=12, label="chance: mean and quantiles")
    ax.plot(at, bits, "o", color="black", label="measured")
    ax.set(xlabel="layer", ylabel="mutual information, bits per choice", xlim=(-0.5, len(layers) - 0.5), ylim=(0, None))
    ax.set_title("What an expert says of the domain")
    ax.set_xticks(at, layers, rotation=90 if len(layers) > 12 else 0)
    figures.legend_beside(ax)
    return figure


def specialist_table(found: Sequence[Specialist], names: Mapping[int, str], layer: str, most: int = 12) -> str:
    """The surest ones of a layer; `names`: of the labels."""
    if not found:
        return f"layer {layer}: no preference that chance would not explain"
    heads = ("label", "expert", "tokens", "lift", "p", "adjusted p")
    rows = [
        (names[s.label], str(s.expert), f"{s.tokens:,}", f"{s.lift:.2f}", f"{s.p_value:.1e}", f"{s.adjusted:.1e}")
        for s in found[:most]
    ]
    more = f" (the first {most} of {len(found)})" if len(found) > most else ""
    return f"layer {layer}{more}\n{table(heads, rows)}"


# --- margins ---


def margin_curves(margins_NL: Float[np.ndarray, "N L"], layers: Sequence[str]) -> Figure:
    """Share of tokens whose margin is smaller, over the margin; a line a layer."""
    figure, (ax,) = figures.new_figure(1, 1, 8, 4.2)
    for i, name in enumerate(layers):
        found = routing.margins(margins_NL[:, i], (0.5,), THRESHOLDS.tolist())
        look = figures.style(i) | {"marker": MARKERS[i % len(MARKERS)], "markevery": (i, 20), "markersize": 5}
        ax.plot(THRESHOLDS, 100 * found.near_ties, label=f"layer {name}", **look)
    ax.axvline(BF16_STEP, color="#8c8c8c", linewidth=0.8)
    ax.annotate(
        "BF16's step\nbelow 1, $2^{-8}$", (BF16_STEP, 97), (-4, 0), textcoords="offset points", fontsize=8,
        ha="right", va="top",
    )  # fmt: skip
    ax.set(xscale="log", xlim=(THRESHOLDS[0], THRESHOLDS[-1]), ylim=(0, 100))
    ax.set(xlabel="margin, in units of the biased score", ylabel="tokens with a smaller margin, %")
    ax.set_title("From the last expert chosen to the first one left out")
    figures.legend_beside(ax)
    return figure


# --- pairs of experts ---


def lift_maps(
    lift_REE: Float[np.ndarray, "R E E"], titles: Sequence[str], rows: str, columns: str, title: str, most: float = 4.0
) -> Figure:
    """Lift of pairs, a panel for each of R: 1 is chance, and as bright as the middle of the scale, which ends at 1 / most and
    most; "-" where chance gives nothing. `rows`, `columns`: what the axes are."""
    n, n_experts, _ = lift_REE.shape
    wide = min(3, n)
    side = max(3.4, min(7, 1.2 + 0.3 * n_experts))
    figure, axes = figures.new_figure(-(-n // wide), wide, (side + 0.9) * wide, (side + 0.5) * -(-n // wide))
    for i, ax in enumerate(axes):
        if i >= n:
            ax.set_axis_off()
            continue
        _lift_map(figure, ax, lift_REE[i], np.log2(most))
        ax.set(title=titles[i], xlabel=columns, ylabel=rows)
    figure.suptitle(title)
    return figure


def _lift_map(figure: Figure, ax: Axes, lift_EE: np.ndarray, limit: float) -> None:
    log2_EE = np.log2(np.maximum(lift_EE, 2.0**-64))  # NaN stays NaN
    shown = colormaps[figures.MAP].with_extremes(bad="white")
    image = ax.imshow(log2_EE, cmap=shown, vmin=-limit, vmax=limit, interpolation="nearest")
    n_experts = len(lift_EE)
    if n_experts <= figures.NUMBERS_UP_TO:
        ax.set_xticks(range(n_experts))
        ax.set_yticks(range(n_experts))
        for (row, column), lift in np.ndenumerate(lift_EE):
            colour = "white" if log2_EE[row, column] < 0 else "black"
            text = NONE if np.isnan(lift) else f"{lift:.1f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    ax.tick_params(length=0, labelsize=8)
    bar = figure.colorbar(image, ax=ax, pad=0.01, shrink=0.8, extend="both")
    ticks = np.linspace(-limit, limit, 5)
    bar.set_ticks(ticks.tolist(), labels=[f"{2.0**x:.2g}" for x in ticks])
    bar.set_label("lift: count / count by chance", fontsize=7)


# --- nodes ---


def visit_shares(visited: Mapping[str, Visits]) -> Figure:
    """How many nodes, and how many ranks, a token's experts lie on: share of tokens, a bar a layer."""
    figure, axes = figures.new_figure(1, 2, 11, 3.8)
    width = 0.8 / max(1, len(visited))
    for ax, what in zip(axes, ("nodes", "ranks"), strict=True):
        for i, (name, found) in enumerate(visited.items()):
            counts = np.bincount(getattr(found, what), minlength=2)[1:]  # a token that has experts is somewhere
            at = np.arange(1, len(counts) + 1) + (i - (len(visited) - 1) / 2) * width
            look: dict[str, Any] = {"color": GREYS[i % len(GREYS)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "black"}
            ax.bar(at, 100 * counts / max(1, counts.sum()), width, label=f"layer {name}", **look)
        ax.set(xlabel=f"{what} per token", ylabel="tokens, %", ylim=(0, 105))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figures.legend_beside(axes[1])
    figure.suptitle("Where a token's experts lie")
    return figure


def traffic_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a layer, of `routing.trace_traffic`: bytes of dispatch or combine across nodes, each way that the copies may go."""
    heads = ("layer", "nodes mean", "max", "ranks mean", "max", "BF16, a copy an expert", "a copy a node", "FP8, a copy a node")
    rows = []
    for name, row in found.items():
        by_row, by_node = row["bytes_per_token_rows"], row["bytes_per_token_deduplicated"]
        sizes = by_row["across_bf16"], by_node["across_bf16"], by_node["across_fp8"]
        visited = (f"{row[f'{what}_{which}']:.3g}" for what in ("nodes", "ranks") for which in ("mean", "max"))
        rows.append((name, *visited, *(f"{size:,.0f} B/token" for size in sizes)))
    return table(heads, rows)


# --- tokens ---


def token_labels(tokens_T: Integer[np.ndarray, " T"], token_bytes: Sequence[bytes] | None) -> list[str]:
    """What each token stands for; its number in brackets where that is nothing, or not known (None)."""
    texts = [b"" if token_bytes is None or i >= len(token_bytes) else token_bytes[i] for i in tokens_T.tolist()]
    return [text.decode(errors="replace") or f"[{i}]" for text, i in zip(texts, tokens_T.tolist(), strict=True)]


def token_view(
    labels: Sequence[str], experts_T: Integer[np.ndarray, " T"], n_experts: int, title: str, width: int = 110
) -> Figure:
    """A text in rows of `width` characters: a box a token, as bright as its expert's number is high, and the number below it.

    White space is made visible; characters that the font lacks are empty squares; "-" below a token without an expert.
    """
    numbers = [str(e) if e < n_experts else NONE for e in experts_T.tolist()]
    boxes, row, column = [], 0, 0
    for label, number in zip(map(_visible, labels), numbers, strict=True):
        size = max(len(label), len(number)) + 1
        if column + size > width and column:
            row, column = row + 1, 0
        boxes.append((row, column, size, label, number))
        column += size
    figure, (ax,) = figures.new_figure(1, 1, CHARACTER * max(width, LONGEST + 1) + 0.2, 2.6 * LINE * (row + 1) + 0.7)
    for row, column, size, label, number in boxes:
        level = int(number) / max(1, n_experts - 1) if number != NONE else None
        face, edge = ("white", "black") if level is None else (colormaps[figures.MAP](level), "white")
        ink = "white" if level is not None and level < 0.5 else "black"
        ax.add_patch(Rectangle((column, row), size, 0.9, facecolor=face, edgecolor=edge))
        look: dict[str, Any] = {
            "family": FONT,
            "fontsize": FONT_SIZE,
            "color": ink,
            "ha": "center",
            "va": "center",
            "parse_math": False,
        }
        ax.text(column + size / 2, row + 0.26, label, **look)
        ax.text(column + size / 2, row + 0.66, number, weight="bold", **look)
    ax.set(xlim=(0, max(width, LONGEST + 1)), ylim=(boxes[-1][0] + 1 if boxes else 1, 0), xticks=[], yticks=[])
    ax.set(title=title, xlabel="tokens in reading order; below each, and as its brightness, the number of its expert")
    ax.spines[:].set_visible(False)
    return figure


def _visible(label: str) -> str:
    text = "".join(c if c in _characters() else MISSING for c in label.translate(VISIBLE))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "\u2026"


@cache
def _characters() -> frozenset[str]:
    """That can be drawn; Matplotlib warns of others."""
    faces = [font_manager.FontProperties(family=FONT, weight=weight) for weight in ("normal", "bold")]
    codes = [set(font_manager.get_font(font_manager.findfont(face)).get_charmap()) for face in faces]
    return frozenset(map(chr, codes[0] & codes[1])) - {chr(i) for i in range(32)}
