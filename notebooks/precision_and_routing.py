# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does a number format do to routing?
#
# The same weights read the same text in FP32, BF16 and FP8. Where the last expert chosen is hardly better than the first one
# left out, rounding makes the other one win: a flip. The cells count flips by layer, margin, rank and domain, say which of
# them margins explain, and what they do to gates and to later layers. Sections are those of the report (arXiv 2412.19437); it
# keeps the gate in its original precision (§3.3.1), so what is rounded here is what the gate sees, not its scores.
#
# Without traces the cells make three small ones, of random weights: they show what the figures look like. For a model of
# yours, the reference first:
#
#     python -m experiments.trace --checkpoint=DIR --data=embedded --out=F32
#     python -m experiments.trace --checkpoint=DIR --data=embedded --out=BF16 --dtype=bfloat16
#     python -m experiments.trace --checkpoint=DIR --data=embedded --out=FP8 --fp8
#     DSV3_TRACES=FP32=F32,BF16=BF16,FP8=FP8 jupyter lab notebooks/precision_and_routing.ipynb

# %%
# %matplotlib inline
import os
from dataclasses import replace

import numpy as np

from dsv3_jax.analysis import flip_figures, flips, routing, routing_figures
from dsv3_jax.analysis.inputs import named_folders
from dsv3_jax.fp8.precision import SERVING
from dsv3_jax.presets import preset
from dsv3_jax.tracing.diff import check_comparable
from dsv3_jax.tracing.example import random_traces
from dsv3_jax.tracing.store import open_trace

TRACES = os.environ.get("DSV3_TRACES")  # name=TRACE,name=TRACE,...: folders that `experiments.trace` wrote; the reference first
LAYERS = None  # names of the layers that get a line of their own; None: first, middle and last
DOCUMENTS = 12  # of each domain, of the small traces


# %%
def small_traces():
    """Of the `tiny` preset, made deeper, with random weights."""
    fp32 = replace(preset("tiny").model, num_hidden_layers=7)
    bf16 = replace(fp32, compute_dtype="bfloat16", param_dtype="bfloat16")
    traces, _ = random_traces({"FP32": fp32, "BF16": bf16, "FP8": replace(fp32, fp8=SERVING)}, DOCUMENTS)
    return traces


if TRACES:
    traces = {name: open_trace(folder) for name, folder in named_folders("DSV3_TRACES", TRACES, least=2).items()}
else:
    traces = small_traces()
(reference_name, reference), *others = traces.items()
for name, trace in others:
    try:
        check_comparable(reference, trace)
    except ValueError as error:
        raise ValueError(f"DSV3_TRACES: {name} beside {reference_name}: {error}") from None

# %% [markdown]
# ## What is compared
#
# "Other routers" says that a trace is of other weights: then all that follows is the difference of two models, not of formats.

# %%
about, text, choices = reference.about, reference.text, reference.choices
layers, n_experts, domains = about.layers, about.n_experts, text.domains
domain_N = reference.of_tokens(text.domain_of)
shown = [layers.index(name) for name in LAYERS] if LAYERS else routing_figures.spread(len(layers), 3)

print(f"{reference.n_tokens:,} tokens of {about.source}; {len(layers)} layers, {about.top_k} of {n_experts} experts a token")
for name, trace in traces.items():
    routers = "" if trace.about.model == about.model else "; OTHER ROUTERS than the reference's"
    print(f"{name}: {', '.join(f'{k} {v}' for k, v in trace.about.how.items())}{routers}")

found = {
    name: flips.differences(
        trace.choices.experts_NLK, trace.choices.gates_NLK, choices.experts_NLK, choices.gates_NLK, n_experts
    )
    for name, trace in others
}
rates = {name: flips.by_layer(each) for name, each in found.items()}
kept = {name: flips.kept_experts(each) for name, each in found.items()}

# %% [markdown]
# ## Flips by layer (§2.1.2)
#
# A token has flipped in a layer if the set of its experts there is not the reference's. Most flips exchange one expert, so
# more experts are kept than tokens are without a flip. Bars are 95 % intervals, as if tokens were independent; those of one
# text are not quite, so take them for the least. Look for a rise with depth: later layers see what earlier rounding, and
# earlier flips, have left.

# %%
rows = [
    (name, layers[i], f"{rate.of[i]:,}", f"{100 * rate.share[i]:.3f} %", f"{100 * low:.3f} to {100 * high:.3f} %",
     f"{100 * kept[name][i]:.3f} %")
    for name, rate in rates.items()
    for i, (low, high) in enumerate(zip(*rate.interval(), strict=True))
    if i in shown
]  # fmt: skip
print(routing_figures.table(("trace", "layer", "tokens", "flipped", "95 % interval", "experts kept"), rows))

# %%
flip_figures.by_layer(rates, kept, layers)

# %% [markdown]
# ## Margins explain most flips (§2.1.2)
#
# The margin is the biased score of the last expert chosen minus that of the first one left out. Noise of a format moves the
# margin; where it moves it by more than the margin, and down, the choice flips. How far it moves is measured on tokens that
# have not flipped; the grey line is what that foretells at each margin (no fit: half the tokens whose margin moved further
# than that). Where groups of experts are limited, a whole group may be exchanged at any margin between single experts: hollow
# points leave such flips out. Look whether hollow points lie on the line, and what full ones leave at large margins. At
# margins far below the noise more than two experts compete, and the line, which knows of two, ends at one half.

# %%
same_groups, regrouped = {}, {}
if choices.groups_NL is not None:
    for name, trace in others:
        changed_NL = np.asarray(trace.choices.groups_NL != choices.groups_NL)
        flipped_NL, counted_NL = found[name].flipped_NL, found[name].counted_NL
        same_groups[name] = flips.by_margin(flipped_NL & ~changed_NL, counted_NL & ~changed_NL, choices.margins_NL)
        regrouped[name] = (flipped_NL & changed_NL).sum(axis=0)
by_margin = {name: flips.by_margin(each.flipped_NL, each.counted_NL, choices.margins_NL) for name, each in found.items()}

foretold = {name: flips.foretold(trace.choices.margins_NL, choices.margins_NL, found[name]) for name, trace in others}
flip_figures.by_margin(by_margin, same_groups, {name: each.share_B for name, each in foretold.items()})

# %% [markdown]
# The same in numbers, by layer. "Noise" is the median distance that the margin moved; "below it" the share of tokens whose
# margin is smaller than that, which is what the distribution of margins has to do with it: a layer with the same noise and
# fewer near ties flips less. "Same groups" are the flips that exchange no group; compare them with what was foretold.

# %%
rows = []
for name, rate in rates.items():
    for i in shown:
        moved = float(foretold[name].noise_L[i])
        near = routing.margins(choices.margins_NL[:, i], (0.5,), (moved,))
        within = rate.hits[i] - (regrouped[name][i] if regrouped else 0)
        rows.append(
            (name, layers[i], f"{near.quantiles[0]:.1e}", f"{moved:.1e}", f"{100 * near.near_ties[0]:.2f} %",
             *(f"{100 * x:.2f} %" for x in (foretold[name].share_L[i], within / max(1, rate.of[i]), rate.share[i])))
        )  # fmt: skip
heads = ("trace", "layer", "median margin", "noise", "below it", "foretold", "same groups", "all flips")
print(routing_figures.table(heads, rows))

# %% [markdown]
# ## If the router itself were rounded (§3.3.1)
#
# The report keeps the gate in BF16 or FP32 when the rest is FP8; our routers compute in FP32. This is what rounding the scores
# would do by itself, from the reference's margins alone: from 0.5 to 1, BF16 has steps of 2^-8, FP8's E4M3 of 2^-4 (scores
# below 0.5 have smaller ones). Rounding keeps order, so it flips only by making two scores equal; ties go to the lower number,
# every second time the wrong expert. With 256 experts scores lie closer than with 16, and the same step flips more. Beyond a
# step that makes three scores equal, the curve is a lower bound.

# %%
steps = list(flip_figures.FORMATS.values())
rows = [
    (layers[i], *(f"{100 * share:.3f} %" for share in flips.ties_by_rounding(choices.margins_NL[:, i], steps))) for i in shown
]
print(routing_figures.table(("layer", *flip_figures.FORMATS), rows))
flip_figures.by_rounding(choices.margins_NL[:, shown], [layers[i] for i in shown])

# %% [markdown]
# ## Which experts flip (§2.1.2)
#
# The last of the chosen is nearest to being left out, and mostly has the smallest gate. Look how steeply the bars rise to the
# right: what is lost in the first ranks is lost with whole groups, or with a hidden state that has become another.

# %%
flip_figures.by_rank({name: each.lost_LK for name, each in found.items()})

# %% [markdown]
# ## What becomes of the gates (§2.1.2)
#
# The share of a token's gate weight that lies on other experts than in the reference: 0.25 says that a quarter of what the
# routed experts contribute is computed by others. Tokens with the same experts move a little too, as gates are scores. Compare
# the mean with the share of experts exchanged: where gates are about equal, as random weights make them, both are; where the
# last expert has a small gate, less weight moves than experts do. Traces keep gates in FP16: below 0.0005 look for no more.

# %%
moved_kept = {name: each.moved_NL[each.counted_NL & ~each.flipped_NL] for name, each in found.items()}
moved_flipped = {name: each.moved_NL[each.flipped_NL] for name, each in found.items()}
rows = [
    (
        name,
        *(f"{100 * np.median(x.astype(np.float32)):.2f} %" if len(x) else "-" for x in (moved_kept[name], moved_flipped[name])),
        f"{100 * each.moved_NL[each.counted_NL].mean(dtype=np.float64):.3f} %",
        f"{100 * each.lost_LK.sum() / (each.counted_NL.sum() * about.top_k):.3f} %",
    )
    for name, each in found.items()
]
heads = ("trace", "moved, same experts", "moved, other experts", "mean of all", "experts exchanged")
print(routing_figures.table(heads, rows))
flip_figures.gate_moves(moved_kept, moved_flipped)

# %% [markdown]
# ## Flips by domain (§4.5.3)
#
# All layers together. Where experts specialise on a domain, margins may be larger there and flips fewer; look whether the
# order is the same in every format.

# %%
flip_figures.by_domain({name: flips.by_domain(each, domain_N, len(domains)) for name, each in found.items()}, domains)

# %% [markdown]
# ## How flips accumulate with depth (§3.3)
#
# Left: tokens that have flipped at least once up to a layer. With many layers nearly all do, even if one layer flips few;
# hollow is what it would be if layers flipped independently. Right: a token that has flipped before flips more often than one
# that has not, as its hidden state differs, or as it is a token with small margins in every layer. Look how far the two lines
# are apart.

# %%
flip_figures.with_depth({name: flips.with_depth(each) for name, each in found.items()}, layers)
