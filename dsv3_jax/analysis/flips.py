"""How often, where and to what effect a text's routing differs between two ways of computing one model [§2.1.2, §3.3].

`ours` and `reference` are of the same tokens, as a trace has them: `experts_NLK` by descending biased score, E for none. A flip
is a token that has other experts in a layer than the reference gives it, in whatever order. Arrays may be memory maps; they are
walked in pieces. What nothing was counted for is NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from dsv3_jax.analysis.metrics import wilson
from dsv3_jax.analysis.routing import expert_ids, over, pieces

EDGES = np.concatenate([[0.0], 10.0 ** np.arange(-5, 0.25, 0.5)])  # of the margins' bins, whose last has no end


class Rate(NamedTuple):
    """How many of how many, by whatever the axes are."""

    hits: Integer[np.ndarray, "*any"]
    of: Integer[np.ndarray, "*any"]

    @property
    def share(self) -> Float[np.ndarray, "*any"]:
        return over(self.hits, self.of)

    def interval(self, confidence: float = 0.95) -> tuple[Float[np.ndarray, "*any"], Float[np.ndarray, "*any"]]:
        """Wilson's for a binomial share, (low, high): as if tokens were independent, which those of one text are not quite."""
        return wilson(self.hits, self.of, confidence)


class Differences(NamedTuple):
    """Of every token in every layer. Only what is counted means something: where both have experts."""

    counted_NL: Bool[np.ndarray, "N L"]
    exchanged_NL: Integer[np.ndarray, "N L"]  # how many of the reference's K experts ours has not; 0 where not counted
    moved_NL: Float[np.ndarray, "N L"]  # share of the gates' sum that lies on other experts than in the reference, 0 to 1
    lost_LK: Integer[np.ndarray, "L K"]  # how often the reference's k-th expert is not among ours

    @property
    def flipped_NL(self) -> Bool[np.ndarray, "N L"]:
        return self.exchanged_NL > 0


def differences(
    experts_NLK: Integer[np.ndarray, "N L K"],
    gates_NLK: Float[np.ndarray, "N L K"],
    reference_NLK: Integer[np.ndarray, "tokens layers chosen"],
    reference_gates_NLK: Float[np.ndarray, "tokens layers chosen"],
    n_experts: int,
) -> Differences:
    """The share that moved is 1 - sum_i min(g_i, g'_i) over experts i, gates divided by their sum: 0 for equal gates, 1 where
    no expert is common. Raises ValueError for arrays of different shapes."""
    if experts_NLK.shape != reference_NLK.shape:
        raise ValueError(
            f"experts: expected the reference's {reference_NLK.shape}, got {experts_NLK.shape}; trace the same text"
        )
    n, n_layers, top_k = reference_NLK.shape
    counted, lost = np.zeros((n, n_layers), bool), np.zeros((n_layers, top_k), np.int64)
    exchanged, moved = np.zeros((n, n_layers), np.uint8), np.zeros((n, n_layers), np.float16)
    for piece in pieces(n, n_layers * top_k * top_k):
        a, b = (expert_ids(x[piece], n_experts) for x in (experts_NLK, reference_NLK))
        known: Any = ((a < n_experts) & (b < n_experts)).all(axis=-1)
        counted[piece] = known
        same = b[..., :, None] == a[..., None, :]
        gone = ~same.any(axis=-1) & known[..., None]
        lost += gone.sum(axis=0)
        exchanged[piece] = gone.sum(axis=-1)
        g, h = (_shares(x[piece]) for x in (gates_NLK, reference_gates_NLK))
        common = np.where(same, np.minimum(h[..., :, None], g[..., None, :]), 0.0).sum(axis=(-1, -2))
        moved[piece] = np.where(known, np.clip(1 - common, 0, 1), 0)
    return Differences(counted, exchanged, moved, lost)


def _shares(gates: np.ndarray) -> np.ndarray:
    values = gates.astype(np.float64)
    total = values.sum(axis=-1, keepdims=True)
    return np.divide(values, total, out=np.zeros_like(values), where=total > 0)


# --- where ---


def by_layer(found: Differences) -> Rate:
    """Flips [L] of the tokens counted."""
    return Rate(found.flipped_NL.sum(axis=0), found.counted_NL.sum(axis=0))


def kept_experts(found: Differences) -> Float[np.ndarray, " L"]:
    """Share of the reference's experts that ours has too."""
    top_k = found.lost_LK.shape[1]
    return 1 - over(found.lost_LK.sum(axis=1), found.counted_NL.sum(axis=0) * top_k)


def by_margin(
    flipped_NL: Bool[np.ndarray, "N L"],
    counted_NL: Bool[np.ndarray, "N L"],
    margins_NL: Float[np.ndarray, "N L"],
    edges: Float[np.ndarray, " B"] = EDGES,
) -> Rate:
    """Flips [B] by the reference's margin: bin i reaches from edge i to the next, the last has no end."""
    hits, of = (np.zeros(len(edges), np.int64) for _ in range(2))
    for piece in pieces(len(margins_NL), margins_NL.shape[1]):
        margin = margins_NL[piece].astype(np.float32)
        known = counted_NL[piece] & (margin >= edges[0])
        bins = np.digitize(margin[known], edges) - 1
        of += np.bincount(bins, minlength=len(edges))
        hits += np.bincount(bins[flipped_NL[piece][known]], minlength=len(edges))
    return Rate(hits, of)


def by_domain(found: Differences, domain_N: Integer[np.ndarray, " N"], n_domains: int) -> Rate:
    """Flips [M] of all layers together."""
    flips_N, counted_N = found.flipped_NL.sum(axis=1), found.counted_NL.sum(axis=1)
    hits, of = (np.bincount(domain_N, weights=x, minlength=n_domains).astype(np.int64) for x in (flips_N, counted_N))
    return Rate(hits, of)


class Depth(NamedTuple):
    """How flips go on from layer to layer. The first layer has none before it."""

    any_L: Float[np.ndarray, " L"]  # share of tokens with a flip in this layer or an earlier one
    independent_L: Float[np.ndarray, " L"]  # the same if a flip in one layer said nothing of another: 1 - prod (1 - rate)
    after: Rate  # [L], flips of tokens that had one in an earlier layer
    before: Rate  # [L], of those that had none


def with_depth(found: Differences) -> Depth:
    flipped_NL, counted_NL = found.flipped_NL, found.counted_NL
    n, n_layers = flipped_NL.shape
    seen_N, any_L = np.zeros(n, bool), np.zeros(n_layers)
    after, before = (Rate(np.zeros(n_layers, np.int64), np.zeros(n_layers, np.int64)) for _ in range(2))
    for i in range(n_layers):
        flipped_N, counted_N = flipped_NL[:, i], counted_NL[:, i]
        for rate, own_N in ((after, seen_N), (before, ~seen_N)):
            rate.hits[i], rate.of[i] = (flipped_N & own_N).sum(), (counted_N & own_N).sum()
        seen_N = seen_N | flipped_N
        any_L[i] = seen_N.mean() if n else np.nan
    return Depth(any_L, 1 - np.cumprod(1 - np.nan_to_num(by_layer(found).share)), after, before)


# --- why ---


def margin_noise(
    margins_N: Float[np.ndarray, " N"], reference_N: Float[np.ndarray, " N"], same_N: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, " W"]:
    """|difference| of one layer's margins, sorted, of tokens with the same experts and a margin above the reference's median:
    at small margins noise that flips would be missing. Empty where there is none."""
    reference = reference_N.astype(np.float64)
    usable = same_N & np.isfinite(reference) & np.isfinite(margins_N.astype(np.float64))
    if not usable.any():
        return np.zeros(0)
    usable &= reference >= np.median(reference[usable])
    return np.sort(np.abs(margins_N[usable].astype(np.float64) - reference[usable]))


def chance_of_flip(margins: Float[np.ndarray, "*any"], noise: Float[np.ndarray, " W"]) -> Float[np.ndarray, "*any"]:
    """That noise as likely up as down exceeds the margin: half the share of `noise` (sorted) above it; NaN without noise."""
    if not len(noise):
        return np.full(margins.shape, np.nan)
    above = len(noise) - np.searchsorted(noise, margins.astype(np.float64), side="right")
    return np.asarray(0.5 * above / len(noise))


class Foretold(NamedTuple):
    """Share of flips that margins and their noise alone let expect; of flips between single experts, not between groups."""

    share_L: Float[np.ndarray, " L"]
    share_B: Float[np.ndarray, " B"]  # by the reference's margin, of all layers
    noise_L: Float[np.ndarray, " L"]  # median of `margin_noise`


def foretold(
    margins_NL: Float[np.ndarray, "N L"],
    reference_NL: Float[np.ndarray, "N L"],
    found: Differences,
    edges: Float[np.ndarray, " B"] = EDGES,
) -> Foretold:
    """Each layer by its own noise. `found`: `differences` of the same two traces."""
    n_layers = reference_NL.shape[1]
    share, median, sums, of = np.full(n_layers, np.nan), np.full(n_layers, np.nan), np.zeros(len(edges)), np.zeros(len(edges))
    for i in range(n_layers):
        margin, counted = reference_NL[:, i].astype(np.float32), found.counted_NL[:, i]
        noise = margin_noise(margins_NL[:, i], reference_NL[:, i], counted & (found.exchanged_NL[:, i] == 0))
        known = counted & (margin >= edges[0])
        if len(noise) and known.any():
            chance = chance_of_flip(margin[known], noise)
            share[i], median[i] = chance.mean(), np.median(noise)
            bins = np.digitize(margin[known], edges) - 1
            sums += np.bincount(bins, weights=chance, minlength=len(edges))
            of += np.bincount(bins, minlength=len(edges))
    return Foretold(share, over(sums, of), median)


def ties_by_rounding(margins_N: Float[np.ndarray, " N"], steps: Sequence[float]) -> Float[np.ndarray, " S"]:
    """Share of tokens whose last expert would be another if all scores were rounded to multiples of a step.

    Rounding keeps order, so it can only make the two equal, which happens to a share 1 - margin / step of pairs that lie
    anywhere on the grid; then the lower id wins, every second time the wrong one. Of two experts: with a step so large that
    three fall together, a lower bound.
    """
    margins = margins_N.astype(np.float64)
    margins = margins[np.isfinite(margins)]
    if not len(margins):
        return np.full(len(steps), np.nan)
    return np.array([0.5 * np.maximum(0.0, 1 - margins / step).mean() for step in steps])
