"""Two traces of one text, of checkpoints, precisions, meshes or seeds: how often do they choose other experts, and where?"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.analysis.figures import new_figure
from dsv3_jax.tracing.store import RoutingTrace

CHUNK = 4096  # tokens at a time
# Of the margin between the last expert chosen and the first one left out: two bins a decade, of affinities in 0..1.
MARGINS = np.concatenate([[0.0], 10.0 ** np.arange(-5, 0.25, 0.5)])


def check_comparable(a: RoutingTrace, b: RoutingTrace) -> None:
    """Raises ValueError, one line, unless both are of the same tokens and of layers and experts alike."""
    for what in ("layers", "n_experts", "top_k"):
        ours, theirs = getattr(a.about, what), getattr(b.about, what)
        if ours != theirs:
            raise ValueError(f"traces: expected the same {what}, got {ours} and {theirs}")
    same = np.array_equal(a.text.starts, b.text.starts) and np.array_equal(a.text.tokens_N, b.text.tokens_N)
    if not same:
        raise ValueError(f"traces: expected the same text, got other tokens ({a.n_tokens:,} and {b.n_tokens:,})")


def compare(a: RoutingTrace, b: RoutingTrace) -> dict[str, Any]:
    """JSON-able. Of each layer, domain and bin of a's margin: `tokens` counted, `flipped`, the share of them of which the set
    of experts differs, and by layer `agreement`, the mean share of experts in common, and `first`, the share whose first
    expert differs. What is none in either is not counted; a share of nothing is None. Raises ValueError as `check_comparable`,
    and for damaged experts or margins.
    """
    check_comparable(a, b)
    n_layers, n_domains = len(a.about.layers), len(a.text.domains)
    domain_N = a.of_tokens(a.text.domain_of)
    tokens_L, common_L, first_L = (np.zeros(n_layers) for _ in range(3))
    flipped_LM, counted_LM = (np.zeros((n_layers, n_domains), np.int64) for _ in range(2))
    flipped_B, counted_B = (np.zeros(len(MARGINS), np.int64) for _ in range(2))
    for start in range(0, a.n_tokens, CHUNK):
        at = slice(start, start + CHUNK)
        ours, theirs = (t.experts_of(at) for t in (a, b))
        counted: Any = ((ours < a.about.n_experts) & (theirs < a.about.n_experts)).all(axis=-1)
        common = (ours[..., :, None] == theirs[..., None, :]).any(axis=-1).sum(axis=-1)
        flipped = counted & (common < a.about.top_k)
        tokens_L += counted.sum(axis=0)
        common_L += np.where(counted, common, 0).sum(axis=0)
        first_L += (counted & (ours[..., 0] != theirs[..., 0])).sum(axis=0)
        for m in range(n_domains):
            own = domain_N[at] == m
            flipped_LM[:, m] += flipped[own].sum(axis=0)
            counted_LM[:, m] += counted[own].sum(axis=0)
        margin = np.asarray(a.choices.margins_NL[at], np.float32)
        if (margin < 0).any():
            raise ValueError(f"margins: expected none below 0, got {np.nanmin(margin)}; the trace is damaged, make it again")
        known = counted & ~np.isnan(margin)
        bins = np.digitize(margin[known], MARGINS) - 1
        counted_B += np.bincount(bins, minlength=len(MARGINS))
        flipped_B += np.bincount(bins[flipped[known]], minlength=len(MARGINS))
    rows = {"tokens": tokens_L.astype(int).tolist(), "flipped": _shares(flipped_LM.sum(axis=1), tokens_L)}
    rows |= {"agreement": _shares(common_L, tokens_L * a.about.top_k), "first": _shares(first_L, tokens_L)}
    return {
        "layers": list(a.about.layers),
        "by_layer": rows,
        "by_domain": {
            name: {
                "tokens": int(counted_LM[:, m].sum()),
                "flipped": _shares([flipped_LM[:, m].sum()], [counted_LM[:, m].sum()])[0],
            }
            for m, name in enumerate(a.text.domains)
        },
        "by_margin": {
            "edges": [*MARGINS.tolist(), None],
            "tokens": counted_B.tolist(),
            "flipped": _shares(flipped_B, counted_B),
        },
        "flipped": _shares([flipped_LM.sum()], [tokens_L.sum()])[0],
        "agreement": _shares([common_L.sum()], [tokens_L.sum() * a.about.top_k])[0],
        "same_model": a.about.model == b.about.model,
    }


def _shares(parts: Any, wholes: Any) -> list[float | None]:
    return [None if whole == 0 else float(part / whole) for part, whole in zip(parts, wholes, strict=True)]


def table(found: Mapping[str, Any]) -> str:
    """For a terminal: a layer a row, then domains, then margins."""
    rows = [f"{'layer':<16}{'tokens':>12}{'flipped':>10}{'first':>10}{'agreement':>12}"]
    by = found["by_layer"]
    for i, name in enumerate(found["layers"]):
        rows.append(
            f"{name:<16}{by['tokens'][i]:>12,}{_percent(by['flipped'][i]):>10}{_percent(by['first'][i]):>10}{_percent(by['agreement'][i]):>12}"
        )
    rows += ["", f"{'domain':<16}{'choices':>12}{'flipped':>10}"]
    rows += [f"{name[:15]:<16}{row['tokens']:>12,}{_percent(row['flipped']):>10}" for name, row in found["by_domain"].items()]
    rows += ["", f"{'margin':<16}{'choices':>12}{'flipped':>10}"]
    by, edges = found["by_margin"], found["by_margin"]["edges"]
    for low, n, share in zip(edges[:-1], by["tokens"], by["flipped"], strict=True):
        if n:
            rows.append(f"{f'from {low:.1e}':<16}{n:>12,}{_percent(share):>10}")
    return "\n".join(
        [*rows, "", f"in all: {_percent(found['flipped'])} of choices differ, {_percent(found['agreement'])} of experts agree"]
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3f} %"


def draw(found: Mapping[str, Any]) -> Figure:
    """Flips by layer, and by margin beside how often a margin occurs."""
    figure, (left, right) = new_figure(1, 2, 11, 4)
    layers, shares = range(len(found["layers"])), [100 * (share or 0) for share in found["by_layer"]["flipped"]]
    left.bar(layers, shares, color="#b0b0b0", edgecolor="black")
    left.set(xlabel="layer", ylabel="tokens with other experts, %", title="Flips by layer")
    left.set_xticks(list(layers), found["layers"], rotation=90 if len(layers) > 12 else 0)
    by = found["by_margin"]
    lows = np.maximum(np.array(by["edges"][:-1], float), 10**-5.5)
    right.plot(lows, [np.nan if share is None else 100 * share for share in by["flipped"]], "k-o", label="flipped, %")
    right.set(
        xscale="log",
        xlabel="margin of the first trace, lower end of the bin",
        ylabel="choices that differ, %",
        title="Flips by margin",
    )
    other = right.twinx()
    other.bar(lows, by["tokens"], width=lows * 0.8, color="none", edgecolor="#808080", hatch="//", label="choices")
    other.set(ylabel="choices in the bin", yscale="log")
    return figure
