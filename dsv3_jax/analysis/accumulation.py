"""How far the tensor core's accumulation is off over K products, with promotion and without [§3.3.2, figure 7b].

Operands are rounded to E4M3 with one scale a tensor, and what is measured begins after that: the error of adding up, relative
to the largest entry of the exact product. The core sees FP8 values, and a tensor's one scale multiplies error and product
alike, so it is left out; products of two such values are then exact in float32, and float64 adds them without an error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from dsv3_jax.analysis.figures import new_figure, style
from dsv3_jax.fp8.accumulate import GROUP, Accumulation, product
from dsv3_jax.fp8.quantize import WHOLE, Quantised, Quantiser, quantise

METHODS = {
    "tensor core, aligned": Accumulation("tensor_core", "aligned"),
    "tensor core, apart": Accumulation("tensor_core", "apart"),
    "promoted, aligned": Accumulation("promoted", "aligned"),
    "promoted, apart": Accumulation("promoted", "apart"),
    "float32": Accumulation("float32"),
}
INPUTS = ("normal", "uniform")
READINGS = ("aligned", "apart")
PUBLISHED_K, PUBLISHED = 4096, 0.02  # "nearly 2 %" of two random matrices, whose distribution is not stated
NEAR = 1.5  # a factor within which an error counts as the published one
MARKERS = "osD^x"

Errors = dict[str, dict[str, list[list[float]]]]  # input, method, K, seed

_quantised = jax.jit(partial(quantise, how=Quantiser(tile=(WHOLE, WHOLE))))
_product = jax.jit(product, static_argnames="how")


def lengths(longest: int) -> list[int]:
    """32, 64, ..., longest. Raises ValueError if that is no power of two."""
    if longest < GROUP or longest & (longest - 1):
        raise ValueError(f"--longest: expected a power of two from {GROUP} on, got {longest}")
    return [2**i for i in range(GROUP.bit_length() - 1, longest.bit_length())]


def operands(name: str, size: int, k: int, seed: int) -> tuple[Quantised, Quantised]:
    """[size, k] and [k, size] as the tensor core sees them: values of E4M3, whose scale is 1."""
    rng = np.random.default_rng((seed, k, INPUTS.index(name)))
    draw = rng.standard_normal if name == "normal" else rng.random
    rounded = (_quantised(draw(shape, np.float32)) for shape in ((size, k), (k, size)))
    a, b = (replace(matrix, scale=jnp.ones_like(matrix.scale)) for matrix in rounded)
    return a, b


def error(a: Quantised, b: Quantised, how: Accumulation) -> float:
    """max |error| / max |product|, the product in float64."""
    exact = np.asarray(a.values, np.float64) @ np.asarray(b.values, np.float64)
    return float(np.abs(np.asarray(_product(a, b, how=how), np.float64) - exact).max() / np.abs(exact).max())


def measure(size: int, ks: Sequence[int], seeds: int, show: bool = True) -> Errors:
    """Every input's and method's error at every K, a value a seed; all methods add up the same products."""
    errors: Errors = {name: {method: [] for method in METHODS} for name in INPUTS}
    total = len(ks) * len(METHODS) * len(INPUTS) * seeds
    with tqdm(total=total, desc="accumulation", unit="product", disable=not show, dynamic_ncols=True) as bar:
        for k in ks:
            for name in INPUTS:
                pairs = [operands(name, size, k, seed) for seed in range(seeds)]
                for method, how in METHODS.items():
                    errors[name][method].append([])
                    for a, b in pairs:
                        errors[name][method][-1].append(error(a, b, how))
                        bar.update()
    return errors


def summarise(errors: Errors, ks: Sequence[int]) -> dict[str, Any]:
    """JSON-able: mean, lowest and highest of the seeds at every K, and all of them."""

    def over_seeds(rows: list[list[float]]) -> dict[str, Any]:
        mean = [float(np.mean(row)) for row in rows]
        return {"mean": mean, "low": [min(row) for row in rows], "high": [max(row) for row in rows], "seeds": rows}

    return {
        "k": list(ks),
        "errors": {name: {method: over_seeds(rows) for method, rows in found.items()} for name, found in errors.items()},
    }


def table(summary: Mapping[str, Any]) -> str:
    """Means of the seeds, a row a K; at the longest K, and at the published one, also the lowest and the highest."""
    heads = [method.split(", ") for method in METHODS]
    lines = []
    for name, found in summary["errors"].items():
        lines += ["", _row(f"{name}, K", [head[0] for head in heads]), _row("", [", ".join(head[1:]) for head in heads])]
        for i, k in enumerate(summary["k"]):
            wide = k in (PUBLISHED_K, summary["k"][-1])
            for which in ("mean", "low", "high") if wide else ("mean",):
                label = f"{k:,}" if which == "mean" else f"{which}est"
                lines.append(_row(label, [f"{found[method][which][i]:.1e}" for method in METHODS]))
    return "\n".join(lines[1:])


def _row(label: str, cells: Sequence[str]) -> str:
    return (f"{label:>10}" + "".join(f"{cell:>13}" for cell in cells)).rstrip()


def verdict(summary: Mapping[str, Any]) -> str:
    """One sentence: which reading comes near the published error at the published K, and what promotion gains there."""
    if PUBLISHED_K not in summary["k"]:
        return f"K = {PUBLISHED_K:,}, where the report states an error, was not measured."
    i = summary["k"].index(PUBLISHED_K)
    near, far, gains = list[str](), list[str](), list[str]()
    for name, found in summary["errors"].items():
        for reading in READINGS:
            without, promoted = (found[f"{kind}, {reading}"]["mean"][i] for kind in ("tensor core", "promoted"))
            said = f"{reading}, {name} inputs ({100 * without:.2g} %)"
            (near if PUBLISHED / NEAR <= without <= PUBLISHED * NEAR else far).append(said)
            gains.append(f"{_gain(without, promoted)} ({reading}, {name})")
    come = f"within a factor of {NEAR:g} of the report's {100 * PUBLISHED:g} %"
    which = f"{come}: {'; '.join(near)}; not: {'; '.join(far)}" if near else f"nothing comes {come}: {'; '.join(far)}"
    return f"At K = {PUBLISHED_K:,}, {which}; promotion divides the error by {', '.join(gains)}."


def _gain(without: float, promoted: float) -> str:
    return f"{without / promoted:.3g}" if promoted else ("infinity" if without else "1")


def draw(summary: Mapping[str, Any], title: str) -> Figure:
    """Error over K on logarithmic axes, a panel an input; bands are the range of the seeds. Errors of zero are not drawn."""
    figure, axes = new_figure(1, len(INPUTS), 12, 4.8)
    for ax, (name, found) in zip(axes, summary["errors"].items(), strict=True):
        _panel(ax, summary["k"], found)
        ax.set(title=f"{name} inputs" + (" on [0, 1)" if name == "uniform" else ""))
    bottom, top = (choose(ax.get_ylim()[i] for ax in axes) for i, choose in enumerate((min, max)))
    for ax in axes:
        ax.set_ylim(bottom, top)
    axes[0].set_ylabel("largest error / largest entry of the product")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8, handlelength=4)
    figure.suptitle(title, fontsize=10)
    return figure


def _panel(ax: Axes, ks: Sequence[int], found: Mapping[str, Any]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for i, method in enumerate(METHODS):
        mean, low, high = ([value or math.nan for value in found[method][which]] for which in ("mean", "low", "high"))
        look = style(i)
        ax.plot(ks, mean, label=method, marker=MARKERS[i], markersize=5, markerfacecolor="none", **look)
        ax.fill_between(ks, low, high, color=look["color"], alpha=0.2, linewidth=0)
    ax.axhline(PUBLISHED, color="#8c8c8c", linewidth=0.8)
    ax.plot([PUBLISHED_K], [PUBLISHED], marker="_", markersize=22, markeredgewidth=3, color="black", linestyle="none")
    ax.annotate(
        f"report: {100 * PUBLISHED:g} % at K = {PUBLISHED_K:,}",
        (ks[0], PUBLISHED),
        (0, 3),
        textcoords="offset points",
        fontsize=8,
    )
    ax.set_xlabel("K, products added up")
    ax.set_xticks(ks, [f"{k:,}" for k in ks], fontsize=8)
    ax.set_xlim(ks[0] / 1.2, max(ks[-1], PUBLISHED_K) * 1.2)
    ax.minorticks_off()
