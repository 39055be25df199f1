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
# # How does a controller keep experts' load even?
#
# MaxVio, load and router bias over training, of several runs side by side: the report's controller (`sign`: the bias moves
# against the load, beside a small sequence-wise loss), the auxiliary losses that it is compared with (`sequence`, `batch`,
# `classical`), and none. Sections are those of the report (arXiv 2412.19437).
#
# Without runs the cells train very short ones of a very small model: they show what the figures look like, and that a bias
# acts within tens of steps, not what a controller is worth. For runs of yours:
#
#     python -m experiments.compare --preset=tiny --vary=controller=sign,sequence,batch,classical,none --budget=10 --workdir=DIR
#     DSV3_RUNS=sign=DIR/0-controller=sign/seed-0,none=DIR/4-controller=none/seed-0 jupyter lab notebooks/balance_dynamics.ipynb

# %%
# %matplotlib inline
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.analysis import balance, balance_figures, inputs, routing, routing_figures
from dsv3_jax.inference.text import folder_tokenizer
from dsv3_jax.model.module import init_variables
from dsv3_jax.moe.balance import CONTROLLERS, Controller
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.tracing.example import short_text
from dsv3_jax.tracing.text import read_text
from dsv3_jax.training.objective import batch_totals, objective
from dsv3_jax.training.optimizer import apply_optimizer, global_norm, init_optimizer

RUNS = os.environ.get("DSV3_RUNS")  # name=folder,name=folder,...: of experiments.train, or of an arm of experiments.compare
LAYER = None  # name of the layer whose experts are shown one by one; None: the first
WINDOW = None  # steps whose load is taken together; None: a tenth of the shortest run
TOKENS = 2048  # of held-out text, that checkpoints choose experts for
SPEEDS, SIMULATED = (1e-4, 1e-3, 1e-2), 300  # of the bias, a step; steps that are simulated with each
SHORT = ("sign", "sequence", "batch", "classical", "none")  # controllers of the short runs
STEPS, CHECKPOINT_EVERY = 40, 8  # of a short run

# %% [markdown]
# ## Runs
#
# A run is its records: metrics.jsonl, and routing.bin, which has every expert's load and bias after every step. The short runs
# share one compiled step: the losses' weights are its arguments, and the bias is moved outside of it. All of them begin with
# the same weights and see the same text.


# %%
def short_runs():
    """By name: the records of a run, and its weights at some steps."""
    tiny = {"num_hidden_layers": 2, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "hidden_size": 32}
    sizes = {"moe_intermediate_size": 16, "vocab_size": 512, "seq_len": 32, "learning_rate": 2e-3, "steps": STEPS}
    config = override(preset("tiny"), tiny | sizes)
    text, _ = short_text(config.model.vocab_size)
    losses = [CONTROLLERS[name]().loss for name in ("sequence", "batch", "classical")]

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
    def step(variables, optimizer, tokens_BS, weights):
        ones_BS = jnp.ones(tokens_BS.shape, jnp.int32)
        batch = {"tokens": tokens_BS, "segment_ids": ones_BS, "domain_ids": 0 * ones_BS}

        def balance_loss(found, scope, model):
            return sum((w * loss(found, scope, model) for w, loss in zip(weights, losses, strict=True)), jnp.float32(0))

        def total_loss(params):
            controller = Controller(loss=balance_loss, alpha=1.0, needs_load=True)
            totals = batch_totals(batch, config)
            return objective(params, variables.bias_LE, batch, totals, jnp.float32(0), config, controller, n_domains=1)

        gradients, terms = jax.grad(total_loss, has_aux=True)(variables.params)
        rate = jnp.float32(config.train.learning_rate)
        params, optimizer = apply_optimizer(config.train, gradients, optimizer, variables.params, rate, global_norm(gradients))
        return variables._replace(params=params), optimizer, terms.load_LE, terms.depth_loss_Q[0]

    first, kept, runs = init_variables(config.model), {}, {}
    for name in SHORT:
        controller, rng, loads, biases, records = CONTROLLERS[name](), np.random.default_rng(0), [], [], []
        weights = [jnp.float32(controller.alpha if controller.loss is loss else 0) for loss in losses]
        variables, optimizer = first, init_optimizer(config.train, first.params)
        kept[name] = {0: first}
        for i in range(1, STEPS + 1):
            starts = rng.integers(0, len(text.tokens_N) - config.data.seq_len, config.train.batch_size)
            tokens_BS = text.tokens_N[starts[:, None] + np.arange(config.data.seq_len + 1)]
            variables, optimizer, load_LE, loss = step(variables, optimizer, tokens_BS, weights)
            if controller.move_bias is not None:
                move = jax.vmap(controller.move_bias, (0, 0, None))
                moved_LE = move(variables.bias_LE, load_LE, jnp.float32(config.train.bias_update_speed))
                variables = variables._replace(bias_LE=moved_LE)
            loads.append(np.asarray(load_LE))
            biases.append(np.asarray(variables.bias_LE))
            records.append({"step": i, "main_loss": float(loss)})
            if i % CHECKPOINT_EVERY == 0:
                kept[name][i] = variables
        its_config = override(config, {"controller": name})
        runs[name] = inputs.Run(its_config, records, np.arange(1, STEPS + 1), np.array(loads), np.array(biases))
    starts = np.arange(0, len(text.tokens_N) - config.data.seq_len, config.data.seq_len)
    starts = starts[routing_figures.spread(len(starts), TOKENS // config.data.seq_len)]
    tokens_BT = text.tokens_N[starts[:, None] + np.arange(config.data.seq_len)]
    found = {
        name: {i: balance.choices_of(variables, config.model, tokens_BT) for i, variables in of_run.items()}
        for name, of_run in kept.items()
    }
    return runs, found


def given_runs():
    """The same of folders; of the checkpoints that they have."""
    runs, found = inputs.read_runs("DSV3_RUNS", RUNS), {}
    for name, folder in inputs.named_folders("DSV3_RUNS", RUNS).items():
        tokens_BT, found[name] = None, {}
        for i, variables, model in inputs.checkpoints(folder):
            if tokens_BT is None:
                tokens_BT = held_out(runs[name].config, folder)
            found[name][i] = balance.choices_of(variables, model, tokens_BT)
    return runs, found


def held_out(config, folder):
    """Windows of the run's length, TOKENS in all, from all over the first part of its text."""
    tokenizer = folder_tokenizer(folder, config.model.vocab_size)
    text = read_text(config.data, tokenizer, 16 * TOKENS)
    length = min(config.data.seq_len, int(text.lengths.max()))
    whole = np.flatnonzero(text.lengths == length)
    chosen = whole[routing_figures.spread(len(whole), max(1, TOKENS // length))]
    return np.stack([text.tokens_N[text.sequence(i)] for i in chosen])


runs, choices = given_runs() if RUNS else short_runs()
first_name, first = next(iter(runs.items()))
layers, n_experts = first.layers, first.load_TLE.shape[2]
shown = layers.index(LAYER) if LAYER else 0
few = routing_figures.spread(len(layers), 3)
steps = {name: run.step_T for name, run in runs.items()}
size = WINDOW or max(2, min(map(len, steps.values())) // 10)
window = {name: balance.windowed_violation(run.load_TLE, size) for name, run in runs.items()}
batch = {name: balance.windowed_violation(run.load_TLE, 1).mean(axis=1) for name, run in runs.items()}

rows = []
for name, run in runs.items():
    train, moves = run.config.train, bool(np.any(run.bias_TLE[-1]))
    losses = [record["main_loss"] for record in run.records[-size:] if record["main_loss"] is not None]
    rows.append(
        (name, train.controller, f"{train.bias_update_speed:g}" if moves else "-", f"{len(run.step_T):,}",
         f"{run.load_TLE[-1, 0].sum() // run.config.model.num_experts_per_tok:,}", f"{np.mean(losses or [np.nan]):.3f}",
         f"{balance.late_share(batch[name]):.3f}", f"{balance.late_share(window[name].mean(axis=1)):.3f}",
         str(int(routing.dead_experts(run.load_TLE[-size:].sum(axis=0, dtype=np.int64)).sum())))
    )  # fmt: skip
top_k = first.config.model.num_experts_per_tok
print(f"{len(layers)} layers with {n_experts} experts, {top_k} a token; windows of {size} steps")
heads = ("run", "controller", "bias speed", "steps", "tokens a step", "loss", "MaxVio batch", "of windows", "dead experts")
print(routing_figures.table(heads, rows))

# %% [markdown]
# The loss is that of the last window, in nats per token; MaxVio is the mean of the last quarter and of layers; dead experts
# had no token in the last window, of all layers.
#
# ## MaxVio over training (§4.5.2)
#
# The fullest expert's load over the mean, minus 1: 0 is balance. Left of single batches, right of windows of steps, which is
# nearest to the MaxVio_global that the bias method was published with (arXiv 2408.15664). A batch of few tokens is uneven by
# chance, and by its text, however balanced the router is over all: the right one is what a controller by the load of steps can
# bring to 0. Look which runs fall, how soon, and which only fall on the right.

# %%
over_layers = {name: values.mean(axis=1) for name, values in window.items()}
balance_figures.violation(steps, batch, over_layers, f"{size} steps")

# %% [markdown]
# The same by layer, of windows. Look for a layer that a controller does not hold: the first layers see little but the token,
# and frequent tokens come in bursts.

# %%
balance_figures.violation_by_layer(
    steps, {name: values[:, few] for name, values in window.items()}, [layers[i] for i in few], f"{size} steps"
)

# %% [markdown]
# ## Load of every expert (appendix C)
#
# A row an expert, training from left to right, as bright as its load over the layer's mean: 1 is balance. Look for bright rows
# (experts that get several times their share), dark ones that stay dark (starved: a router that never sends them tokens does
# not teach them), and rows that flicker (a bias that moves too far a step).

# %%
maps = {name: balance.load_map(run.load_TLE[:, shown]) for name, run in runs.items()}
balance_figures.load_maps(steps, maps, layers[shown])

# %% [markdown]
# ## The bias on its way (§2.1.2)
#
# After each step an overloaded expert's bias falls by the speed u, an underloaded one's rises. Left: every expert of a layer;
# the numbers are those of the experts that end highest and lowest. Only differences of biases choose, so they are shown beside
# the layer's mean. Middle: the mean drifts, upwards where more experts lie below the mean load than above it, which is
# harmless; the spread is what balance costs in units of the score. Right: while biases travel they do not turn; once a layer
# is balanced they turn every second step or so. In a run with the report's schedule none turns at the end: u is 0 for the last
# 500B of its 14.8T tokens.

# %%
moving = {name: run for name, run in runs.items() if np.any(run.bias_TLE[-1])}
print(f"runs whose bias moves: {', '.join(moving) or 'none'}")
own = [shown, *(i for i in few if i != shown)][:3]
biases = {name: run.bias_TLE[:, own] for name, run in moving.items()}
balance_figures.bias_paths(
    {name: steps[name] for name in moving},
    biases,
    {name: balance.turned(bias_TLE) for name, bias_TLE in biases.items()},
    [layers[i] for i in own],
) if moving else None

# %% [markdown]
# ## An expert's bias against its load (§2.1.2)
#
# Left, load of the first fiftieth of training: if experts that are too full at the start stay in demand, they end with a low
# bias, and r is near -1; near 0, the router has become another since. Middle, load of the last tenth: with balance all points
# lie in a column at 1, whatever their bias is. Right: an expert whose bias is still on its way has turned seldom (a starved
# one, far right, never); experts in balance turn all the time.

# %%
experts = {}
for name, run in moving.items():
    n, found = len(run.step_T), routing.bias_dynamics(run.bias_TLE)
    early, late = run.load_TLE[: max(1, n // 50)], run.load_TLE[-max(1, n // 10) :]
    experts[name] = balance_figures.Experts(
        np.asarray(run.bias_TLE[-1][few], np.float64),
        *(routing.relative_load(part.sum(axis=0, dtype=np.int64))[few] for part in (early, late)),
        found.flips[few] / np.maximum(1, found.updates[few] - 1),
    )
balance_figures.bias_against_load(experts, [layers[i] for i in few]) if experts else None

# %% [markdown]
# ## What u = 0.001 means (§4.2)
#
# A bias competes with differences of scores, which lie between 0 and 1. The spread of one token's scores decides for that
# token; the spread of the experts' mean scores is what a bias has to make up for in balance. Over that, u says how many steps
# it takes: with u = 0.001 a bias has gone 0.1 after 100 steps at the soonest, and the report trains for more than 200,000. In
# a run of a few hundred steps u = 0.001 cannot keep up with scores that change as fast as they do there, which is why the
# small presets have 0.01.

# %%
rows = []
for name, run in runs.items():
    if choices[name]:
        i, spread = max(choices[name]), balance.score_spread(choices[name][max(choices[name])].scores_NLE)
        for j in few:
            goal, u = spread.expert_L[j], run.config.train.bias_update_speed
            here = np.std(run.bias_TLE[-1, j].astype(np.float64))
            rows.append(
                (name, f"{i:,}", layers[j], f"{spread.token_L[j]:.4f}", f"{goal:.4f}", f"{here:.4f}",
                 f"{goal / 1e-3:,.0f}", *((f"{goal / u:,.0f}", f"{u:g}") if name in moving else ("-", "-")))
            )  # fmt: skip
heads = ("run", "step", "layer", "spread of a token's", "of mean scores", "of biases", "steps at 0.001", "at the run's", "u")
print(routing_figures.table(heads, rows) if rows else "no run has kept a checkpoint: nothing to compute scores with")

# %% [markdown]
# And what a speed does by itself: the bias controller from 0 on the first run's last scores, which do not change. Left: a
# small u balances late; a large one soon, but then it moves past balance with every step. Right: how far its bias has come,
# beside the spread of the mean scores. In training the scores move too: u must be large enough to follow, and small enough not
# to be the noise itself; the bias method's authors found 0.0001 too slow at first and 0.01 restless at the end.

# %%
rated = {}
if choices[first_name]:
    scores_NE = choices[first_name][max(choices[first_name])].scores_NLE[:, shown]
    goal = float(scores_NE.astype(np.float64).mean(axis=0).std())
    how = {"steps": SIMULATED, "batch_tokens": len(scores_NE) // 4}
    rated = {f"u = {u:g}": balance.balance_scores(scores_NE, first.config.model, u, **how) for u in SPEEDS}
balance_figures.speeds(rated, goal) if rated else None

# %% [markdown]
# ## When routing settles (§4.5.3)
#
# The share of the last checkpoint's choices that earlier checkpoints make too, for the same tokens (saturation, arXiv
# 2409.02060 §5.1). A bias that keeps turning keeps exchanging the experts of tokens with small margins, so look whether the
# controllers' lines lie apart close to the end. Between two checkpoints there is only one number: give runs that keep several
# (`--set=keep_checkpoints=20`).

# %%
settled = {name: sorted(of_run) for name, of_run in choices.items() if len(of_run) > 1}
shares = {
    name: routing.saturation([choices[name][i].experts_NLK for i in at], n_experts).mean(axis=1) for name, at in settled.items()
}
print("" if shares else "no run has kept two checkpoints: nothing to compare")
balance_figures.saturation(settled, shares, top_k / n_experts) if shares else None
