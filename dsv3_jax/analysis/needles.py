"""Needle in a haystack [§4.3, Fig. 8 of the report]: the share of needles that a model finds, by depth and context length.

A needle counts as found when every token of its value is the likeliest one after those before it, which is what greedy
decoding would write.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32
from matplotlib.figure import Figure
from tqdm import tqdm

from dsv3_jax.analysis import figures
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.retrieval import Haystack, haystack
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.model.transformer import forward, logits, make_context

NEEDED = 0.95  # found at the training length before the extension; below, there was nothing to extend
TOKENS_AT_A_TIME = 8192  # of haystacks in one forward pass


class Grid(NamedTuple):
    """What is measured: `samples` needles at each depth of each length."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int


class Rows(NamedTuple):
    """Haystacks with their answers behind them, as the model reads them."""

    tokens_NT: Int32[np.ndarray, "N T"]
    before_NA: Int32[np.ndarray, "N A"]  # the position before each token of the answer
    answer_NA: Int32[np.ndarray, "N A"]  # -1 beyond a shorter answer's end


def rows_of(haystacks: Sequence[Haystack], length: int, pad: int) -> Rows:
    """Padding stands behind the answer, where no position that counts sees it."""
    longest = max(len(h.answer) for h in haystacks)
    tokens = np.full((len(haystacks), length), pad, np.int32)
    before, answer = (np.full((len(haystacks), longest), fill, np.int32) for fill in (0, -1))
    for row, h in enumerate(haystacks):
        start, size = len(h.prompt), len(h.answer)
        tokens[row, : start + size] = (*h.prompt, *h.answer)
        before[row, :size] = range(start - 1, start - 1 + size)
        answer[row, :size] = h.answer
    return Rows(tokens, before, answer)


def found(likeliest_NA: Int[np.ndarray, "N A"], answer_NA: Int[np.ndarray, "N A"]) -> Bool[np.ndarray, "N"]:
    """Whether every token of the answer is the likeliest."""
    return np.all((likeliest_NA == answer_NA) | (answer_NA < 0), axis=1)


@partial(jax.jit, static_argnames="model")
def likeliest(
    params: Any, bias_LE: Float[Array, "L E"], tokens_NT: Int[Array, "N T"], before_NA: Int[Array, "N A"], *, model: ModelConfig
) -> Int[Array, "N A"]:
    """The token that the model would write after each of these positions."""
    context = make_context(jnp.ones_like(tokens_NT), model, cross_document=True)
    hidden = forward(params, bias_LE, tokens_NT, context, model, summary=lambda routing, extra: None)
    states_NAD = jnp.take_along_axis(hidden.normed_BTD, before_NA[:, :, None], axis=1)
    return logits(params, states_NAD, model).argmax(axis=-1)


def measure(
    params: Any, bias: Any, model: ModelConfig, tokenizer: Tokenizer, grid: Grid, seed: int, name: str, show: bool = True
) -> list[list[float]]:
    """Share of needles found, a row for each length, a column for each depth; the same haystacks whatever the model."""
    shares = []
    total = len(grid.lengths) * len(grid.depths) * grid.samples
    with tqdm(total=total, desc=f"needles, {name}", unit="needle", disable=not show, dynamic_ncols=True) as bar:
        for length in grid.lengths:
            haystacks = [
                haystack(length, depth, tokenizer.encode, seed + sample, begin=tokenizer.bos)
                for depth in grid.depths
                for sample in range(grid.samples)
            ]
            rows = rows_of(haystacks, length, tokenizer.pad)
            size, hits = min(len(haystacks), max(1, TOKENS_AT_A_TIME // length)), list[bool]()
            for start in range(0, len(haystacks), size):
                # the last rows once more where they do not fill a batch, so that one program serves all
                part = [np.take(a, range(start, start + size), axis=0, mode="clip") for a in rows]
                hits += found(np.asarray(likeliest(params, bias, part[0], part[1], model=model)), part[2]).tolist()
                bar.update(min(size, len(haystacks) - start))
            by_depth = np.reshape(hits[: len(haystacks)], (len(grid.depths), grid.samples))
            shares.append(by_depth.mean(axis=1).tolist())
    return shares


def summarise(maps: Mapping[str, Sequence[Sequence[int | float]]], grid: Grid, trained: int) -> dict[str, Any]:
    """JSON-able: the maps with their means, and whether the first one found enough at the length `trained`."""
    first = next(iter(maps.values()))
    before = float(np.mean(first[grid.lengths.index(trained)]))
    return {
        **grid._asdict(),
        "maps": {name: {"found": found, "mean": float(np.mean(found))} for name, found in maps.items()},
        "found_before_extension": before,
        "needed_before_extension": NEEDED,
        "void": before < NEEDED,
    }


def verdict(result: Mapping[str, Any], trained: int) -> str:
    """One line on whether the figure counts."""
    share = f"{100 * result['found_before_extension']:.1f} % of needles found at {trained:,} before extension"
    return f"void: {share}, {100 * NEEDED:.0f} % needed" if result["void"] else share


def table(result: Mapping[str, Any]) -> str:
    """Means over depth, for a terminal of 100 columns."""
    width = max(len(name) for name in result["maps"])
    lines = ["needles found, %".ljust(width) + "".join(f"{length:>9,}" for length in result["lengths"]) + "     mean"]
    for name, of_map in result["maps"].items():
        means = [100 * float(np.mean(row)) for row in of_map["found"]]
        lines.append(name.ljust(width) + "".join(f"{mean:>9.1f}" for mean in [*means, 100 * of_map["mean"]]))
    return "\n".join(lines)


def draw(result: Mapping[str, Any], title: str) -> Figure:
    """A map for each model, all on the same scale: length of the context to the right, depth of the needle downwards."""
    columns = 2
    rows = -(-len(result["maps"]) // columns)
    figure, axes = figures.new_figure(rows, columns, 5.2 * columns, 0.6 + 3.6 * rows)
    for ax in axes[len(result["maps"]) :]:
        ax.set_axis_off()
    for ax, (name, of_map) in zip(axes, result["maps"].items(), strict=False):
        found_DL = np.array(of_map["found"]).T
        image = ax.imshow(found_DL, cmap=figures.MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (row, column), share in np.ndenumerate(found_DL):
            colour = "white" if share < 0.5 else "black"
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_xticks(range(len(result["lengths"])), [f"{length:,}" for length in result["lengths"]])
        ax.set_yticks(range(len(result["depths"])), [f"{100 * depth:.0f} %" for depth in result["depths"]])
        ax.tick_params(length=0, labelsize=8)
        ax.set(title=f"{name}: mean {100 * of_map['mean']:.1f} %", xlabel="tokens of context", ylabel="depth of the needle")
        figure.colorbar(image, ax=ax, pad=0.01, label="share found")
    figure.suptitle(title)
    return figure
