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
# # Which experts does a model choose, and for what?
#
# Figures of a routing trace: load by layer and by domain, specialisation beside chance, margins, pairs of experts, nodes, and a
# text with each token's expert. Sections and figures are those of the report (arXiv 2412.19437).
#
# Without a trace the cells make a small one, of random weights: it shows what the figures look like, and what a router does
# that has learnt nothing. For a model of yours:
#
#     python -m experiments.trace --checkpoint=DIR --data=embedded --out=TRACE
#     DSV3_TRACE=TRACE DSV3_TOKENIZER=DIR jupyter lab notebooks/routing_analysis.ipynb

# %%
# %matplotlib inline
import hashlib
import math
import os
from pathlib import Path

import numpy as np

from dsv3_jax.analysis import routing, routing_figures, specialisation
from dsv3_jax.inference.text import folder_tokenizer
from dsv3_jax.presets import preset
from dsv3_jax.tracing.example import random_traces
from dsv3_jax.tracing.store import open_trace

TRACE = os.environ.get("DSV3_TRACE")  # a folder that `experiments.trace` wrote
TOKENIZER = os.environ.get("DSV3_TOKENIZER")  # the checkpoint's folder: shows tokens as text, not as numbers
LAYERS = None  # names of the layers that get a panel of their own; None: first, middle and last
SEQUENCE, TOKENS = 0, 120  # the text that is shown token by token
PERMUTATIONS = 199
DOCUMENTS = 12  # of each domain, of the small trace

# %%
if TRACE:
    trace, tokenizer = open_trace(TRACE), None
    if TOKENIZER:
        digest = hashlib.sha256((Path(TOKENIZER) / "tokenizer.json").read_bytes()).hexdigest()
        if digest != trace.about.tokenizer:
            raise ValueError(
                f"DSV3_TOKENIZER: {TOKENIZER} has not the tokenizer that {TRACE} was made with; name its checkpoint"
            )
        tokenizer = folder_tokenizer(TOKENIZER, trace.about.config["vocab_size"])
else:
    traces, tokenizer = random_traces({"float32": preset("tiny").model}, DOCUMENTS)
    trace = traces["float32"]

# %% [markdown]
# ## What the trace is
#
# For every token and every MoE layer (MTP's too, if it was traced): the experts in order, their gates, and the margin.

# %%
about, text, choices = trace.about, trace.text, trace.choices
n_experts, layers, domains = about.n_experts, about.layers, text.domains
domain_N, document_N = trace.of_tokens(text.domain_of), trace.of_tokens(text.document_of)
shown = [layers.index(name) for name in LAYERS] if LAYERS else routing_figures.spread(len(layers), 3)
shown_names = [layers[i] for i in shown]

print(f"text: {about.source}; model: {about.model[:16]}; {', '.join(f'{k} {v}' for k, v in about.how.items())}")
print(f"{len(layers)} layers with {n_experts} experts, {about.top_k} a token; group limit: {choices.groups_NL is not None}\n")
rows = [
    (name, f"{len(set(text.document_of[text.domain_of == m])):,}", f"{(domain_N == m).sum():,}")
    for m, name in enumerate(domains)
]
print(routing_figures.table(("domain", "documents", "tokens"), rows))

# %% [markdown]
# ## Load by layer (appendix C)
#
# Each cell is an expert's load over the mean load of its layer: 1.0 is balance. Look for columns of large numbers in one row
# (experts that get several times their share), and for 0.0 (dead ones). The table says the same in a number each: MaxVio is the
# fullest expert's relative load minus 1; load entropy is of the text's load ("of even": as a share of log2 of the number of
# experts), gate entropy is of one token's gates and says nothing of balance.

# %%
load_LE = routing.expert_load(choices.experts_NLK, n_experts)
gate_bits_L = routing.gate_entropy(choices.gates_NLK, choices.experts_NLK, n_experts)
print(routing_figures.balance_table(load_LE, gate_bits_L, layers))

# %%
routing_figures.load_by_layer(load_LE, layers)

# %% [markdown]
# ## Load by domain (§4.5.3, figure 9; appendix C)
#
# A panel a layer, a row a domain. The report compares two models so: trained with an auxiliary loss all rows look alike;
# without it domains have experts of their own. Look for cells far above 1 in one row only. Small texts give such cells by
# chance: the next section says which are more.

# %%
label_loads = [
    specialisation.label_load(choices.experts_NLK[:, i], domain_N, n_experts, len(domains)) for i in range(len(layers))
]
routing_figures.load_by_domain(np.stack([label_loads[i].load_ME for i in shown]), domains, shown_names)

# %% [markdown]
# ## Specialisation, beside chance (§4.5.3)
#
# How many bits an expert says of its token's domain, and how many it would say if domains were dealt out to the documents at
# random. Documents are the units, as tokens of one document choose alike. A dot inside its bar is no specialisation, however
# uneven the map above looks. Random weights specialise too, as far as domains have words of their own.

# %%
rng, tests = np.random.default_rng(0), []
if len(domains) > 1:
    how = {"permutations": PERMUTATIONS, "rng": rng, "documents_N": document_N}
    tests = [specialisation.information_test(choices.experts_NLK[:, i], domain_N, n_experts, **how) for i in range(len(layers))]
    rows = [(name, f"{t.bits:.4f}", f"{t.null_mean:.4f}", f"{t.p_value:.3f}") for name, t in zip(layers, tests, strict=True)]
    print(routing_figures.table(("layer", "bits", "chance", "p"), rows))
else:
    print("one domain: nothing to compare with")

# %%
routing_figures.information(tests, layers) if tests else None

# %% [markdown]
# The experts that survive, surest first, at a false discovery rate of 5 % over the pairs of a layer. Lift is the domain's share
# of the expert's load over its share of the text.

# %%
for i in shown:
    found = specialisation.specialists(choices.experts_NLK[:, i], domain_N, n_experts, documents_N=document_N, rng=rng)
    print(routing_figures.specialist_table(found, dict(enumerate(domains)), layers[i]), end="\n\n")

# %% [markdown]
# The same of single tokens: experts that prefer a token, at least twice as much as chance would. A router sees little but the
# token in the first layers, so look at how the lists shrink with depth.

# %%
token_bytes = tokenizer.token_bytes if tokenizer else None
for i in shown:
    found = specialisation.specialists(choices.experts_NLK[:, i], text.tokens_N, n_experts, least_lift=2.0)
    ids = np.array(sorted({s.label for s in found}), int)
    names = {int(k): repr(label) for k, label in zip(ids, routing_figures.token_labels(ids, token_bytes), strict=True)}
    print(routing_figures.specialist_table(found, names, layers[i], most=6), end="\n\n")

# %% [markdown]
# ## Margins (§2.1.2)
#
# The biased score of the last expert chosen minus that of the first one left out. Left of the line are tokens whose choice may
# become another when scores are rounded to BF16. A step of the balance bias by 0.001 (§4.2) brings two experts nearer by at
# most 0.002: tokens with a smaller margin may move by it. Look at how much of a layer lies left of the two.

# %%
found = [routing.margins(choices.margins_NL[:, i], (0.5,), (2e-3, routing_figures.BF16_STEP)) for i in range(len(layers))]
rows = [
    (name, f"{m.quantiles[0]:.2e}", *(f"{100 * share:.1f} %" for share in m.near_ties))
    for name, m in zip(layers, found, strict=True)
]
print(routing_figures.table(("layer", "median margin", "below 0.002", "below 2^-8"), rows))

# %%
routing_figures.margin_curves(choices.margins_NL[:, shown], shown_names)

# %% [markdown]
# ## Experts that go together (§2.1.2)
#
# Lift of two experts being chosen by one token: 1.0 is what their loads alone would give. With the group limit, blocks of
# experts along the diagonal (a group each) go together, as a token keeps only some groups; look for bright cells elsewhere.

# %%
pairs = [specialisation.coactivation(choices.experts_NLK[:, i], n_experts) for i in shown]
routing_figures.lift_maps(
    np.stack([p.lift for p in pairs]), [f"layer {name}" for name in shown_names], "expert", "expert", "Chosen by one token"
)

# %% [markdown]
# From a layer to the next: a bright cell is a path that tokens take more often than the two experts' loads would give. Look for
# rows with one bright cell: a token's expert there says where it goes next.

# %%
steps = sorted({min(i, len(layers) - 2) for i in shown if len(layers) > 1})
lifts = [specialisation.transitions(choices.experts_NLK[:, i : i + 2], n_experts).lift[0] for i in steps]
titles = [f"layer {layers[i]} to {layers[i + 1]}" for i in steps]
routing_figures.lift_maps(
    np.stack(lifts), titles, "expert", "expert in the next layer", "Chosen one after the other"
) if lifts else None

# %% [markdown]
# ## Nodes a token visits, and bytes (§2.1.2, §3.2.2)
#
# The report lays 32 experts on a node, 4 on each of its 8 GPUs, and sends a token to at most 4 nodes: no point right of 4. The
# bytes are those of a token's dispatch across nodes, with a copy for each expert or, as the report's kernels do, for each node.

# %%
nodes = about.config["n_group"] if about.config["n_group"] > 1 else math.gcd(8, n_experts)
experts_per_node = n_experts // nodes
experts_per_rank = math.gcd(4, experts_per_node) if experts_per_node > 4 else 1
cluster = routing.Cluster(n_experts, experts_per_rank, experts_per_node // experts_per_rank)
visited = {layers[i]: routing.trace_visits(choices.experts_NLK[:, i], cluster) for i in shown}
traffic = {layers[i]: routing.trace_traffic(choices.experts_NLK[:, i], cluster, about.config["hidden_size"]) for i in shown}
print(f"{nodes} nodes of {cluster.ranks_per_node} ranks of {experts_per_rank} experts")
print(routing_figures.traffic_table(traffic))
routing_figures.visit_shares(visited)

# %% [markdown]
# ## A text, token by token (§4.5.3)
#
# Below each token the number of its first expert, the brighter the higher. Look for words or punctuation that always have the
# same expert (in early layers most have), and for runs of a number that follow the text's meaning instead.

# %%
place = text.sequence(SEQUENCE)
place = slice(place.start, min(place.stop, place.start + TOKENS))
labels = routing_figures.token_labels(text.tokens_N[place], token_bytes)
routing_figures.token_view(
    labels, choices.experts_NLK[place, shown[0], 0], n_experts, f"Layer {shown_names[0]}, {domains[text.domain_of[SEQUENCE]]}"
)

# %%
routing_figures.token_view(
    labels, choices.experts_NLK[place, shown[-1], 0], n_experts, f"Layer {shown_names[-1]}, {domains[text.domain_of[SEQUENCE]]}"
)
