"""Figure of experts' load on a mesh that serves [§3.4]: the fullest device of each layer, under several placements."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv3_jax.analysis.figures import legend_beside, new_figure, style
from dsv3_jax.inference.placement import fullest_over_mean

MARKERS = "osD^v"


def draw(by_placement: Mapping[str, Shaped[np.ndarray, "L P"]], title: str) -> Figure:
    """A line a placement, of its rows [layers, devices]."""
    n_layers = len(next(iter(by_placement.values())))
    figure, (ax,) = new_figure(1, 1, max(6.5, 3.5 + 0.12 * n_layers), 3.8)
    for i, (name, rows_LP) in enumerate(by_placement.items()):
        ax.plot(range(n_layers), fullest_over_mean(rows_LP), label=name, marker=MARKERS[i], markersize=4, **style(i))
    ax.axhline(1, color="#b0b0b0", linewidth=0.8)
    ax.set(xlabel="MoE layer", ylabel="rows of the fullest device / mean", title=title, ylim=(0.9, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_beside(ax)
    return figure
