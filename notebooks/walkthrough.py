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
# # DeepSeek-V3's report, with the code that implements it
#
# The sections of the report (arXiv 2412.19437) up to pre-training, in order. Each has the function that implements it, running
# on small shapes, and beside it the equation in a few lines of NumPy, in float64. `check` prints how far the two are apart, and
# stops where that is more than rounding. Post-training (§5) is not here.
#
# Axes go by one capital letter each (`dsv3_jax/shapes.py`): B sequences, T positions, D hidden channels, H heads, E experts, K
# of them for a token.

# %%
# %matplotlib inline
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv3_jax.analysis import (
    accumulation,
    load_figure,
    plan_figure,
    routing,
    routing_figures,
    schedule_figure,
    walkthrough_figures,
)
from dsv3_jax.config import Fp8Recipe
from dsv3_jax.data.fim import fill_in_middle
from dsv3_jax.data.packing import TokenDocument, WindowIterator
from dsv3_jax.fp8.accumulate import Accumulation
from dsv3_jax.fp8.formats import E4M3
from dsv3_jax.fp8.linear import linear
from dsv3_jax.fp8.precision import products
from dsv3_jax.fp8.quantize import WHOLE, Quantiser, quantise
from dsv3_jax.inference.attention import cache_width, cached_attention
from dsv3_jax.inference.placement import device_loads, fullest_over_mean, place_experts
from dsv3_jax.inference.serving import attention_laid_out
from dsv3_jax.model.count import count_parameters
from dsv3_jax.model.flops import training_flops_per_token
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import attention, mla_heads
from dsv3_jax.model.module import init_variables
from dsv3_jax.model.mtp import module_input, shifted
from dsv3_jax.model.rope import apply_rope, rope_frequencies, rope_tables, softmax_scale
from dsv3_jax.model.transformer import embed
from dsv3_jax.moe.balance import Scope, controller_of, count_load, sequence_loss, sign_step
from dsv3_jax.moe.layer import moe
from dsv3_jax.moe.router import route
from dsv3_jax.parallel.schedules import SCHEDULES
from dsv3_jax.parallel.simulate import compare, simulate
from dsv3_jax.planner import memory
from dsv3_jax.planner.chips import CHIPS
from dsv3_jax.planner.plan import make_plan
from dsv3_jax.planner.question import Question
from dsv3_jax.planner.receipts import mfu
from dsv3_jax.planner.serving import decode_bound, experts_reached
from dsv3_jax.planner.share import make_share
from dsv3_jax.planner.timing import hours_per_trillion
from dsv3_jax.presets import preset
from dsv3_jax.settings import override, parse_settings
from dsv3_jax.training.objective import depth_losses, run_model
from dsv3_jax.training.schedules import learning_rate

RELEASED = preset("deepseek_v3_671b")  # the real shape, for whatever is arithmetic
SMALL = preset("tiny")  # every mechanism, small: what runs
config = SMALL.model
variables = init_variables(config)
params = variables.params
layer = jax.tree.map(lambda stack: stack[0], params["moe_layers"])  # the first with experts
rng = np.random.default_rng(0)


def check(what, found, expected, tolerance=1e-5):
    """How far apart the package and the line of NumPy are, over the largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    apart = np.abs(found - expected).max() / np.abs(expected).max()
    assert found.shape == expected.shape and apart < tolerance, f"{what}: {apart}"
    print(f"{what}: {'equal' if apart == 0 else f'{apart:.0e} apart'}")


def call(function, *arguments, config=config, **constants):
    """A function of the package, compiled as one program; its configuration is a constant."""
    return jax.jit(functools.partial(function, config=config, **constants))(*arguments)


def wide(tree):
    """Parameters in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


# %% [markdown]
# ## 1 Introduction: what it cost (table 1)
#
# Parameters are counted from the tree that the model declares (`model/count.py`): 671 B, of which a token meets 37 B. NumPy
# says the same from the released configuration's sizes.

# %%
m, count = RELEASED.model, count_parameters(RELEASED.model)
heads, d, d_n, d_r, d_v = m.num_attention_heads, m.hidden_size, m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim
query = d * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * heads * (d_n + d_r)
keys_and_values = d * (m.kv_lora_rank + d_r) + m.kv_lora_rank + m.kv_lora_rank * heads * (d_n + d_v)
attention_size, expert = query + keys_and_values + heads * d_v * d, 3 * d * m.moe_intermediate_size
dense_layer = attention_size + 2 * d + 3 * d * m.intermediate_size
moe_layer = attention_size + 2 * d + (d + 1) * m.n_routed_experts + (m.n_shared_experts + m.n_routed_experts) * expert
total = 2 * m.vocab_size * d + d + m.n_dense_layers * dense_layer + m.n_main_moe_layers * moe_layer
idle = m.n_main_moe_layers * (m.n_routed_experts - m.num_experts_per_tok) * expert

print(f"parameters {count.total:,}; of a token, with the head, {count.active_with_head:,}; MTP module {count.mtp:,}")
check("total", count.total, total, 1e-15)
check("active", count.active_with_head, total - m.vocab_size * d - idle, 1e-15)

# %% [markdown]
# A token of training takes 250 GFLOP (`model/flops.py`): 6 for each number that it is multiplied by, and attention, causal.
# The hours follow from a step's measured time, 19.926 s for 15,360 sequences of 4,096 tokens on 2,048 H800 (table 4 of the
# ISCA'25 paper on the same system); the two later phases' hours are given. At the report's 2 dollars an hour that is table
# 1, which has 2,664 K for pre-training, at 180 K for 10^12 tokens.

# %%
flops, rate = training_flops_per_token(m, 4096, mtp=False), 15360 * 4096 / 19.926
per_trillion = hours_per_trillion(rate, 2048)
print(f"{flops / 1e9:.2f} GFLOP a token; {rate * 86400 / 1e9:.1f} B tokens a day; MFU {mfu(flops, rate, 2048, 989):.1%}")
gains = 61 * (2 * d + m.q_lora_rank + m.kv_lora_rank) + d  # and biases: of no matrix
matrices = count.active_with_head - gains - m.n_main_moe_layers * m.n_routed_experts
check("FLOPs of a token", flops, 6 * matrices + 3 * 61 * heads * (d_n + d_r + d_v) * 4096, 1e-15)
check("hours of 10^12 tokens", per_trillion, 2048 * 1e12 / rate / 3600, 1e-12)
hours = {"pre-training": 14.8 * per_trillion, "context extension": 119e3, "post-training": 5e3}
hours["total"] = sum(hours.values())
rows = [(name, f"{h / 1e3:,.0f} K", f"{2 * h / 1e6:.3f} M") for name, h in hours.items()]
print(routing_figures.table(("phase", "GPU hours", "dollars"), rows))

# %% [markdown]
# ## 2.1.1 Multi-head latent attention
#
# `model/mla.py`. Keys and values of all heads come from one latent of a token (eqs. 1, 2, 5), beside one rotary key that all
# heads share (eq. 3); queries from a latent of their own (eqs. 6-9). `W` holds the weights under the released names; in NumPy
# a rotation (§4.3 says by how much) is the product of complex numbers.


# %%
def rotated_heads(attn, x_BTD, rope, config):
    heads = mla_heads(attn, x_BTD, config)
    q_rope, k_rope = apply_rope(heads.q_rope_BHTR, *rope), apply_rope(heads.k_rope_BGTR, *rope)
    return heads._replace(q_rope_BHTR=q_rope, k_rope_BGTR=k_rope)


tokens = rng.integers(0, config.vocab_size, (2, 12)).astype(np.int32)
residual_BTD = call(embed, params, tokens)
norm = jax.jit(rms_norm, static_argnums=2)
x_BTD = norm(residual_BTD, layer["input_layernorm"], config.rms_norm_eps)
rope = call(rope_tables, np.tile(np.arange(12, dtype=np.int32), (2, 1)))
found = call(rotated_heads, layer["self_attn"], x_BTD, rope)
for name, array in found._asdict().items():
    print(f"{name:14} {array.shape}")

W, x, latent, nope = wide(layer["self_attn"]), np.asarray(x_BTD, np.float64), config.kv_lora_rank, config.qk_nope_head_dim


def rms(a, gain):
    return a / np.sqrt((a**2).mean(axis=-1, keepdims=True) + 1e-6) * gain


def rotate(a_BHTR):
    turned = (a_BHTR[..., ::2] + 1j * a_BHTR[..., 1::2]) * np.exp(1j * np.outer(np.arange(12), rope_frequencies(config)))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(a_BHTR.shape)


c_kv, k_rope = np.split(x @ W["kv_a_proj_with_mqa"], [latent], axis=-1)  # eq. 1, and eq. 3 before its rotation
k, v = np.split(np.einsum("btc,chd->bhtd", rms(c_kv, W["kv_a_layernorm"]), W["kv_b_proj"]), [nope], axis=-1)  # eqs. 2, 5
c_q = rms(x @ W["q_a_proj"], W["q_a_layernorm"])  # eq. 6
q, q_rope = np.split(np.einsum("btc,chd->bhtd", c_q, W["q_b_proj"]), [nope], axis=-1)  # eqs. 7, 8
check("content keys, eq. 2", found.k_content_BGTC, k)
check("values, eq. 5", found.v_BGTW, v)
check("rotary key, eq. 3", found.k_rope_BGTR, rotate(k_rope[:, None]))
check("rotary queries, eq. 8", found.q_rope_BHTR, rotate(q_rope))

# %% [markdown]
# Attention itself (eqs. 10 and 11) sums a content product and a rotary one, over the root of the channels of both.

# %%
scores = np.einsum("bhtc,bhsc->bhts", q, k) + np.einsum("bhtr,bsr->bhts", rotate(q_rope), rotate(k_rope[:, None])[:, 0])
scores = np.where(np.tri(12, dtype=bool), scores / np.sqrt(nope + config.qk_rope_head_dim), -np.inf)
weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
u = np.einsum("bhts,bhsw,hwd->btd", weights, v, W["o_proj"])
attended_BTD = call(attention, layer["self_attn"], x_BTD, rope, None)
check("eqs. 10, 11", attended_BTD, u)

# %% [markdown]
# Decoding caches the latent, normed, and the rotated key: 16 + 8 numbers here, 512 + 64 in V3. It never makes keys: queries are
# multiplied into the latent's space instead (`inference/attention.py`, absorbed).

# %%
empty, start = jnp.zeros((2, 12, cache_width(config))), jnp.zeros(2, jnp.int32)
laid_out = call(attention_laid_out, layer["self_attn"])  # kv_b_proj as W^UK and W^UV of each head
absorbed, rows = call(cached_attention, laid_out, x_BTD, empty, start, rope, absorbed=True)
check("the cache", rows, np.concatenate([rms(c_kv, W["kv_a_layernorm"]), rotate(k_rope[:, None])[:, 0]], axis=-1))
check("absorbed, eqs. 10, 11", absorbed, u)

# %% [markdown]
# ## 2.1.2 DeepSeekMoE
#
# `moe/router.py`: a token's affinity to each expert is a sigmoid (eq. 15); a bias is added for the choice alone (eq. 16); of
# the experts' groups, a node each, those with the largest sums of their two best stay; among them the K best are chosen.
# Gates are the affinities without bias, over their sum (eqs. 13, 14), times a factor.

# %%
u_BTD = norm(residual_BTD + attended_BTD, layer["post_attention_layernorm"], config.rms_norm_eps)
some_bias = rng.normal(0, 0.02, config.n_routed_experts).astype(np.float32)
decided = call(route, u_BTD, layer["mlp"]["gate"], some_bias)

mlp, u = wide(layer["mlp"]), np.asarray(u_BTD, np.float64)
s = 1 / (1 + np.exp(-u @ mlp["gate"]))  # eq. 15
grouped = (s + some_bias.astype(np.float64)).reshape(2, 12, config.n_group, -1)
group_score = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
kept = group_score >= np.sort(group_score, axis=-1)[..., [-config.topk_group]]
eligible = np.where(kept[..., None], grouped, -np.inf).reshape(s.shape)
chosen = np.argsort(-eligible, axis=-1)[..., : config.num_experts_per_tok]  # eq. 16
g = np.take_along_axis(s, chosen, axis=-1)
g = config.routed_scaling_factor * g / g.sum(axis=-1, keepdims=True)  # eqs. 13, 14
check("experts, eq. 16", decided.indices, chosen)
check("gates, eqs. 13-15", decided.gates, g)

# %% [markdown]
# The layer (`moe/layer.py`): the chosen experts' outputs by their gates, and the shared expert's (eq. 12). No token is dropped.


# %%
def swiglu(a, w):
    gate = a @ w["gate_proj"]
    return (gate / (1 + np.exp(-gate)) * (a @ w["up_proj"])) @ w["down_proj"]


def one_token(b, t):
    experts = ({name: w[e] for name, w in mlp["experts"].items()} for e in chosen[b, t])
    return sum(gate * swiglu(u[b, t], expert) for gate, expert in zip(g[b, t], experts, strict=True))


y_BTD, _ = call(moe, layer["mlp"], some_bias, u_BTD)
y = np.array([[one_token(b, t) for t in range(12)] for b in range(2)]) + swiglu(u, mlp["shared_experts"])
check("eq. 12", y_BTD, y)

# %% [markdown]
# ### Balance without an auxiliary loss
#
# After every step the bias of overloaded experts falls by gamma and that of the others rises (`moe/balance.py`). Tokens here
# have a direction in common, so that a few experts have most of the load at first. Only the bias moves; gates stay the
# router's own.

# %%
crowd_BTD = rng.normal(0, 1, (4, 128, config.hidden_size)) + rng.normal(0, 0.6, config.hidden_size)
crowd_BTD = jnp.asarray(crowd_BTD, jnp.float32)
gate_DE = jnp.asarray(rng.normal(0, 0.12, (config.hidden_size, config.n_routed_experts)), jnp.float32)
everything, speed = jnp.ones((4, 128), bool), 0.002


@jax.jit
def update(bias):
    load = count_load(route(crowd_BTD, gate_DE, bias, config).indices, everything, config.n_routed_experts)
    return load, sign_step(bias, load, jnp.float32(speed))


loads, moved_bias = [], np.zeros(config.n_routed_experts, np.float32)
for _ in range(301):
    before = np.asarray(moved_bias, np.float64)
    load, moved_bias = update(moved_bias)
    loads.append(np.asarray(load))
check("the last update", moved_bias, before + speed * np.sign(loads[-1].mean() - loads[-1]))
walkthrough_figures.balancing(np.stack(loads), speed)

# %% [markdown]
# ### The sequence-wise loss (eqs. 17-20)
#
# A small one beside it, against single sequences that are uneven: f counts the choices (eq. 18), P is the mean of normalised
# affinities (eqs. 19, 20). In balance it is 1, and is weighted by alpha, 0.0001.

# %%
crowded = call(route, crowd_BTD, gate_DE, np.zeros(config.n_routed_experts, np.float32))
scope = Scope(everything, np.float32(4), np.float32(4 * 128), None)
s, chosen = np.asarray(crowded.scores, np.float64), np.asarray(crowded.indices)
counted = (chosen[..., None] == np.arange(config.n_routed_experts)).sum(axis=(1, 2))
f = config.n_routed_experts / (config.num_experts_per_tok * 128) * counted  # eq. 18
P = (s / s.sum(axis=-1, keepdims=True)).mean(axis=1)  # eqs. 19, 20
balance = call(sequence_loss, crowded, scope)
print(f"sum of f P: {float(balance):.4f}; weighted {controller_of(SMALL).alpha * float(balance):.2e}")
check("eq. 17", balance, (f * P).sum(axis=1).mean())

# %% [markdown]
# ## 2.2 Multi-token prediction
#
# `model/mtp.py`. The module of depth k joins the state at position i with the embedding of token i + k (eq. 21) and predicts
# token i + k + 1. Of the tokens a b c d e, at depth 1:

# %%
letters = np.array(list("abcde"))
ahead = [letters[np.asarray(shifted(jnp.arange(5, dtype=jnp.int32)[None], k))[0]] for k in (1, 2)]
rows = list(zip(letters[:3], ahead[0], ahead[1], strict=False))
print(routing_figures.table(("state of", "embedding of", "predicts"), rows))

window = np.concatenate([tokens, rng.integers(0, config.vocab_size, (2, 1), np.int32)], axis=1)  # with the last target
batch = {"tokens": window, "segment_ids": np.ones((2, 13), np.int32), "domain_ids": np.zeros((2, 13), np.int32)}


@jax.jit
def whole_model(params, bias_LE, batch):
    """Every depth's states, the main model's first, and its sum of nats and nats of each position."""
    main, depths, _ = run_model(params, bias_LE, batch, SMALL, lambda routing, _: None, None)
    states = [main.normed_BTD, *(depth.normed_BTD for depth in depths)]
    return states, depth_losses(params, batch, states, SMALL)


(main_BTD, depth_BTD), losses = whole_model(params, variables.bias_LE, batch)
mtp = jax.tree.map(lambda stack: stack[0], params["mtp"])
next_BTD = call(embed, params, window[:, 1:])
h, e, M = np.asarray(main_BTD, np.float64), np.asarray(next_BTD, np.float64), wide(mtp)
pair = np.concatenate([rms(e, M["enorm"]), rms(h, M["hnorm"])], axis=-1)  # the embedding first, as in released weights
check("eq. 21", call(module_input, mtp, main_BTD, next_BTD), pair @ M["eh_proj"])

# %% [markdown]
# The losses (`training/objective.py`): the cross entropy of the main model, and of the module, with the same head (eqs. 23,
# 24). The objective is the first, lambda times the mean of the others (eq. 25), and the balance losses of all layers.


# %%
def cross_entropy(normed_BTD, targets_BT):
    z = (np.asarray(normed_BTD, np.float64) @ np.asarray(params["lm_head"], np.float64).T)[:, : targets_BT.shape[1]]
    return np.log(np.exp(z).sum(axis=-1)) - np.take_along_axis(z, targets_BT[..., None], axis=-1)[..., 0]


(main_sum, _), (depth_sum, _) = losses
main_nll, depth_nll = cross_entropy(main_BTD, window[:, 1:]), cross_entropy(depth_BTD, window[:, 2:])
check("main model", main_sum, main_nll.sum())
check("depth 1, eq. 24", depth_sum, depth_nll.sum())
weight = SMALL.train.mtp_loss_weight
main, ahead = main_nll.mean(), depth_nll.mean()
print(f"main {main:.4f}, MTP {ahead:.4f} nats; eq. 25: {weight} MTP = {weight * ahead:.4f}; sum {main + weight * ahead:.4f}")

# %% [markdown]
# ## 3.1-3.2 Infrastructure: layout, cost, pipeline
#
# The planner (`planner/`) says what a step of the run needs of a device: memory by cause, and bounds on its time by compute,
# memory and links. The report's 2,048 H800 are 128 pipelines of 16 stages, a stage's experts on 64 devices. Here pipelines are
# simulated and not run, so the layout is another: 64 expert ranks, everything else in pieces over all devices. Its network
# bound is above the report's measured step of 19.9 s: parameters are gathered for each micro-batch, and a token's row is sent
# to each expert, where the report's kernels send it to each node (below).

# %%
layout = ["layout=fully_sharded", "mesh_expert=64", "batch_size=16384", "micro_batch_size=2048"]
run, chip = override(RELEASED, parse_settings(layout)), CHIPS["h800"]
plan = make_plan(run, chip, Question(chips=2048, compute="fp8"))
print(f"peak memory {plan.value('memory', 'peak') / 2**30:.1f} GiB; compute bound {plan.value('time', 'compute'):.1f} s a step")
causes = memory.causes(make_share(run, 2048, chip.platform))
plan_figure.draw(plan, causes, chip.hbm_gib, "DeepSeek-V3 on 2,048 H800, fully sharded")

# %% [markdown]
# DualPipe (§3.2.1, figure 5): micro-batches enter at both ends, and the forward pass of one hides the exchange of the other's
# backward pass. `parallel/schedules.py` writes it down, `parallel/simulate.py` runs it in time; table 2's formulas for its idle
# time, and its competitors', come out of the simulation.

# %%
rows = [(r.name, f"{r.idle:g}", f"{r.published_idle:g}", str(r.peak), str(r.published_peak)) for r in compare(8, 20)]
print(routing_figures.table(("8 stages, 20 micro-batches", "idle", "by formula", "activations", "by formula"), rows))
schedule_figure.draw(simulate(SCHEDULES["dualpipe"].build(8, 20)))

# %% [markdown]
# Node-limited routing (§3.2.2): with 256 experts on 8 nodes a token goes to at most 4 of them, and crosses to each node once.
# Random tokens through a router of V3's shape, with the limit and without it:

# %%
small_router = dataclasses.replace(m, hidden_size=64)
crowd_ND, gate_DE = rng.normal(size=(2000, 64)).astype(np.float32), rng.normal(0, 0.2, (64, 256)).astype(np.float32)
configs = (dataclasses.replace(small_router, topk_group=groups) for groups in (4, 8))
both = [np.asarray(call(route, crowd_ND, gate_DE, np.zeros(256, np.float32), config=c).indices) for c in configs]
traffic = routing.group_limit_traffic(*both, routing.Cluster(256, 4, 8), m.hidden_size)
check("nodes of a token, limited", traffic["limited"]["nodes_mean"], np.mean([len(set(row // 32)) for row in both[0]]))
print(routing_figures.traffic_table({name: traffic[name] for name in ("limited", "free")}))

# %% [markdown]
# ## 3.3 Training in FP8
#
# `fp8/quantize.py`: 128 channels of a token, or a block of 128 x 128 weights, share a scale, their largest magnitude over
# E4M3's largest number, 448 (§3.3.2). NumPy rounds by a cast.

# %%
activations = rng.normal(size=(256, 512)).astype(np.float32)
rounding = jax.jit(quantise, static_argnames="how")
tiles = rounding(activations, how=Quantiser(E4M3, (1, 128)))
scale = np.abs(activations).reshape(256, 4, 128).max(axis=-1) / np.float32(448)
spread = np.repeat(scale, 128, axis=1)
check("scales", tiles.scale, scale)
check("values", tiles.astype(jnp.float32), (activations / spread).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread)

# %% [markdown]
# Why tiles are small: one channel that is much larger than the others sets the scale of all that share it, and takes the small
# ones among them below E4M3's smallest steps: from a factor of some thousands on, as the format is wide. The error is that of
# the channels which are not large.

# %%
TILINGS = {"1 x 128": (1, 128), "128 x 128": (128, 128), "whole tensor": (WHOLE, WHOLE)}
outliers = [2.0**i for i in range(0, 17, 2)]
ordinary = np.arange(512) != 77
errors = {name: [] for name in TILINGS}
for factor in outliers:
    inputs = activations * np.where(ordinary, 1, np.float32(factor))
    for name, tile in TILINGS.items():
        rounded = np.asarray(rounding(inputs, how=Quantiser(E4M3, tile)).astype(jnp.float32))
        difference = (rounded - inputs)[:, ordinary]
        errors[name].append(float(np.sqrt((difference**2).mean() / (activations[:, ordinary] ** 2).mean())))
walkthrough_figures.tile_errors(errors, outliers)

# %% [markdown]
# A linear layer is three such products (§3.3.1, figure 6; `fp8/linear.py`): forward, and for both gradients. Each is off by the
# few percent of two roundings of 3 bits. Within the tensor core sums have 14 bits; that they move to FP32 every 128 products
# (figure 7b; `fp8/accumulate.py`) is what keeps long ones right; without it the report found errors of nearly 2 %.

# %%
how = products(dataclasses.replace(config, fp8=Fp8Recipe()), "q_a_proj")
weight, gradient = rng.normal(0, 0.05, (512, 128)).astype(np.float32), rng.normal(size=(256, 128)).astype(np.float32)


@jax.jit
def three_products(x, weight, gradient):
    y, back = jax.vjp(functools.partial(linear, how=how), x, weight)
    return y, *back(gradient)


y, dx, dw = three_products(activations, weight, gradient)
exact = {
    "y = x W": (y, activations @ weight),
    "dx = dy W^T": (dx, gradient @ weight.T),
    "dW = x^T dy": (dw, activations.T @ gradient),
}
for name, (rounded, true) in exact.items():
    print(f"{name:12} relative error {np.linalg.norm(np.asarray(rounded) - true) / np.linalg.norm(true):.2%}")

for drawn in accumulation.INPUTS:
    a, b = accumulation.operands(drawn, 16, 4096, seed=0)
    for fidelity in ("tensor_core", "promoted", "float32"):
        off = accumulation.error(a, b, Accumulation(fidelity))
        print(f"4,096 {drawn:8} products, sum in {str(Accumulation(fidelity)):24}: error {off:.1e} of the largest")

# %% [markdown]
# ## 3.4 Serving: where experts lie
#
# Devices wait for the fullest one, so experts of high load get copies, and all of them are laid out anew by measured load
# (`inference/placement.py`). Here 58 layers of uneven loads, on the 32 devices of 4 nodes that prefill in the report (§3.4.1):
# 256 experts and 32 copies, 9 a device, and a group of experts stays on its node.

# %%
load_LE = np.round(1000 * rng.lognormal(0, 0.7, (58, 256)))
placed = place_experts(load_LE, num_replicas=256 + 32, num_gpus=32, num_groups=8, num_nodes=4)
found = device_loads(load_LE, placed, 32)
check(
    "in order, fullest over mean",
    fullest_over_mean(found.before),
    load_LE.reshape(58, 32, 8).sum(2).max(1) / load_LE.mean(1) / 8,
)
load_figure.draw({"in order": found.before, "32 copies, placed by load": found.after}, "58 layers on 32 devices")

# %% [markdown]
# What the exchange alone leaves of decoding's speed, at 32 tokens a device over 50 GB/s, each to 8 experts and the shared one
# (the ISCA'25 paper's bound):

# %%
bound = decode_bound(32, experts_reached(m), 7000, m.num_hidden_layers, 50e9)
print(f"{1e3 * bound.seconds:.2f} ms a token, {bound.tokens_per_second:.0f} tokens/s")
check("bound", bound.seconds, 61 * 2 * (1 + 2) * 32 * 9 * 7000 / 50e9, 1e-12)

# %% [markdown]
# ## 4.1 Data: fill in the middle, packing
#
# A tenth of the documents is cut twice, and its middle moved to the end (`data/fim.py`). Tokens here are characters, and the
# three marks are numbers beyond them.

# %%
MARKS = {256: "<begin>", 257: "<hole>", 258: "<end>", 259: "<BOS>", 260: "<EOS>", 261: "."}


def readable(ids):
    return "".join(MARKS.get(i) or chr(i) for i in np.asarray(ids).tolist())


source = np.frombuffer(b"def add(a, b): return a + b", np.uint8).astype(np.int32)
moved = fill_in_middle(source, (256, 257, 258), np.random.default_rng(3))
print(readable(moved))
hole, end = (int(np.flatnonzero(moved == mark)[0]) for mark in (257, 258))
check("prefix, middle, suffix", np.concatenate([moved[1:hole], moved[end + 1 :], moved[hole + 1 : end]]), source)

# %% [markdown]
# Documents are packed end to end into windows of T + 1 tokens, the last of which is the first of the next (`data/packing.py`):
# every token is the target of one window. Nothing is cut off; attention does see across documents, as in the report, and the
# numbers below the tokens say which document they are of.

# %%
documents = [
    TokenDocument(np.array([259, *text, 260], np.int32), 0)
    for text in (b"one fish", b"two", bytes(source.tolist()), b"blue fish")
]
windows = list(WindowIterator(documents, 15, pad=261))
for window in windows:
    cells = [(readable([token]), str(segment)) for token, segment in zip(window.tokens, window.segment_ids, strict=True)]
    widths = [max(map(len, cell)) for cell in cells]
    for line in zip(*cells, strict=True):
        print(" ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
stream = np.concatenate([windows[0].tokens[:1], *(window.tokens[1:] for window in windows)])
check("the windows' targets", stream[stream != 261], np.concatenate([document.tokens for document in documents]))

# %% [markdown]
# ## 4.2 Hyper-parameters over the run
#
# `training/schedules.py`, of tokens: the rate rises in 2,000 steps, stays to 10 T tokens, falls along a cosine to 14.3 T and
# has two constant ends; the batch grows over the first 469 B; the bias stops at 14.3 T, and MTP weighs less from 10 T on. In
# a shorter run all points move with its length.

# %%
middle = learning_rate(RELEASED.train, 12.15e12, 14.8e12, 200_000)
low, high = 2.2e-5, 2.2e-4
check("half way down the cosine", middle, low + (high - low) * (1 + np.cos(np.pi * 0.5)) / 2, 1e-12)
walkthrough_figures.schedules(RELEASED)

# %% [markdown]
# ## 4.3 Long context: YaRN
#
# For 128K tokens the rotary frequencies change (`model/rope.py`): pairs that turn more than 32 times within the 4K of
# pre-training keep theirs, those that turn less than once are slowed by 40, between them it is a ramp; and logits are scaled by
# the square of 0.1 ln 40 + 1. Two phases of 1,000 steps follow, at 32K and 128K.

# %%
plain = rope_frequencies(dataclasses.replace(m, rope_scaling=None))
pair, dim = np.arange(32), 64
check("as trained", plain, 10_000.0 ** (-2 * pair / dim), 1e-12)
turning = [dim * np.log(4096 / (2 * np.pi * turns)) / (2 * np.log(10_000)) for turns in (32, 1)]
ramp = np.clip((pair - np.floor(turning[0])) / (np.ceil(turning[1]) - np.floor(turning[0])), 0, 1)
check("YaRN", rope_frequencies(m), plain * (1 - ramp + ramp / 40), 1e-12)
check("scale of the logits", softmax_scale(m), 192**-0.5 * (0.1 * np.log(40) + 1) ** 2, 1e-12)
for name in ("deepseek_v3_671b_32k", "deepseek_v3_671b_128k"):
    phase = preset(name)
    train = phase.train
    print(f"{phase.data.seq_len:,} tokens, {train.batch_size:,} sequences, {train.steps:,} steps at {train.learning_rate:g}")
walkthrough_figures.frequencies(plain, rope_frequencies(m), 4096, 40 * 4096)
