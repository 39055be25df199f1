"""Speculative decoding with the MTP modules [§5.4.3]: they draft, one pass of the main model checks all drafts at once.

At the beginning of a step position n has its token t_n, and everything before it is cached. The main model sees t_n and the D
drafts after it, positions n .. n + D. Drafts are accepted from the first on, `a` of them; the main model's own choice follows,
so that a step yields a + 1 tokens. Then module k runs where the chain of known tokens has grown. At position p it joins what
module k - 1 (the main model for k = 1) has there with the embedding of t_{p+k}; at p = n + a it drafts the next t_{n+a+1+k}.

Module k's last k - 1 positions of a step were fed with drafts. They are computed again, with the tokens that have come of them:
its window is n - k + 1 .. n + D. The one hidden state that this needs from before the step is carried.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.decode import Cache, Prompts, Stream, blocks, extend, lookup, project, taken_over
from dsv3_jax.inference.sampling import Sampling, draw, filtered, keys_at
from dsv3_jax.inference.serving import Module, Serving
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mtp import module_input

CLOSE = 1e-4  # two largest logits nearer than this: rounding may choose either


class Drafting(NamedTuple):
    """Between two steps. `drafts` are proposals for positions n + 1 .. n + D, `scores` what they were drawn from."""

    drafts_BD: Int[Array, "B K"]
    scores_BDV: Float[Array, "B K V"]  # filtered log-probabilities; of one column where drafts are greedy
    carried: tuple[Float[Array, "B D"], ...]  # of module k = 1 .. D - 1: its hidden state at position n - k


class Verified(NamedTuple):
    tokens_BT: Int[Array, "B T"]  # t_{n+1} .. t_{n+D+1}; those beyond `count` are void
    count_B: Int[Array, " B"]  # a + 1
    close_BT: Bool[Array, "B T"]  # chosen by a margin below CLOSE


def run_module(
    module: Module,
    rows_BSC: Array,
    hidden_BTD: Array,
    embedding_BTD: Array,
    start_B: Array,
    config: ModelConfig,
    *,
    absorbed: bool,
) -> tuple[Stream, Array]:
    """One MTP module over a window of positions from `start` on."""
    x_BTD = module_input(module.params, hidden_BTD, embedding_BTD, config)
    x_BTD, rows_BSC, count_LR = blocks(module.block, x_BTD, rows_BSC, start_B, None, config, absorbed=absorbed)
    return Stream(x_BTD, rms_norm(x_BTD, module.params["norm"], config.rms_norm_eps), count_LR), rows_BSC


def fed(stream: Stream, config: ModelConfig) -> Array:
    """What the next module reads."""
    return stream.normed_BTD if config.mtp_hidden == "post_norm" else stream.residual_BTD


def at(values_BT: Array, index_B: Array) -> Array:
    """values[b, index[b]]."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, keepdims=False))(values_BT, index_B)


def verify(
    logits_BTV: Float[Array, "B T V"], drafting: Drafting, position_B: Int[Array, " B"], seed: Array, sampling: Sampling
) -> Verified:
    """Accepts drafts so that what comes out is distributed as if the main model alone had drawn it, token by token.

    `logits` are of positions n .. n + D, which predict n + 1 ..; `position` is n.
    """
    drafts_BD, depth = drafting.drafts_BD, drafting.drafts_BD.shape[1]
    if sampling.greedy:
        own_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        accepted_BD = own_BT[:, :depth] == drafts_BD
        replacement_BT = own_BT
    else:
        accepted_BD, replacement_BT = _rejection(logits_BTV, drafting, position_B, seed, sampling)
    a_B = jnp.cumprod(accepted_BD.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
    place_T = jnp.arange(depth + 1, dtype=jnp.int32)[None, :]
    drafted_BT = jnp.pad(drafts_BD, ((0, 0), (0, 1)))
    tokens_BT = jnp.where(place_T < a_B[:, None], drafted_BT, replacement_BT)
    return Verified(tokens_BT, a_B + 1, close_calls(logits_BTV, sampling))


def close_calls(logits: Float[Array, "*batch V"], sampling: Sampling) -> Bool[Array, "*batch"]:
    """Where a greedy choice hangs on rounding. A draw never does."""
    if not sampling.greedy:
        return jnp.zeros(logits.shape[:-1], bool)
    top = jax.lax.top_k(logits, 2)[0]
    return top[..., 0] - top[..., 1] < CLOSE


def _rejection(
    logits_BTV: Array, drafting: Drafting, position_B: Array, seed: Array, sampling: Sampling
) -> tuple[Bool[Array, "B K"], Int[Array, "B T"]]:
    """A draft x of q is accepted with probability min(1, p(x) / q(x)); else the token is drawn from (p - q)+, normalised."""
    depth = drafting.drafts_BD.shape[1]
    sequence_B = jnp.arange(logits_BTV.shape[0], dtype=jnp.int32)
    p_BTV = jax.nn.softmax(filtered(logits_BTV, sampling), axis=-1)
    q_BDV = jax.nn.softmax(drafting.scores_BDV, axis=-1)
    accepted, replacement = [], []
    for i in range(depth + 1):
        own, coin = jnp.split(jax.vmap(jax.random.split)(keys_at(seed, sequence_B, position_B + 1 + i)), 2, axis=1)
        p = p_BTV[:, i]
        if i < depth:
            q, x = q_BDV[:, i], drafting.drafts_BD[:, i, None]
            ratio = jnp.take_along_axis(p, x, axis=1)[:, 0] / jnp.maximum(jnp.take_along_axis(q, x, axis=1)[:, 0], 1e-37)
            accepted.append(jax.vmap(jax.random.uniform)(coin[:, 0]) < ratio)
            rest = jnp.maximum(p - q, 0.0)
            # Rounding may leave nothing where p = q; such a draft is accepted anyway.
            p = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)
        replacement.append(jax.vmap(jax.random.categorical)(own[:, 0], jnp.log(p)).astype(jnp.int32))
    return jnp.stack(accepted, axis=1), jnp.stack(replacement, axis=1)


def drafted(
    model: Serving,
    depths: tuple[Array, ...],
    carried: tuple[Array, ...],
    main: Array,
    tokens: Verified,
    position_B: Int[Array, " B"],
    seed: Array,
    sampling: Sampling,
    config: ModelConfig,
) -> tuple[Drafting, tuple[Array, ...]]:
    """The chain of modules after a step. `main` [B, D + 1, H]: what the main model hands on at positions n .. n + D."""
    n_drafts, a_B = len(model.depths), tokens.count_B - 1
    known_BT, hidden, first_B = tokens.tokens_BT, main, position_B
    drafts, scores, kept, new_rows = [], [], [], []
    for k, (module, rows) in enumerate(zip(model.depths, depths, strict=True), 1):
        if k > 1:
            # One position further back, where module k - 1 has been since the step before.
            hidden, first_B = jnp.concatenate([carried[k - 2][:, None], hidden], axis=1), first_B - 1
        # Tokens t_{p+k} of the window p = n - k + 1 ..: they begin with t_{n+1} for every k.
        window = hidden.shape[1]
        embedding = lookup(model, _fitted(known_BT, window), config)
        stream, rows = run_module(module, rows, hidden, embedding, first_B, config, absorbed=True)
        new_rows.append(rows)
        hidden = fed(stream, config)
        last_B = a_B + (k - 1)  # of the window: position n + a
        logits_BV = project(model, at(stream.normed_BTD, last_B))
        token_position_B = position_B + tokens.count_B + k
        if sampling.greedy:
            scores.append(jnp.zeros((len(a_B), 1), jnp.float32))
        else:
            scores.append(filtered(logits_BV, sampling))
        # Another stream of keys than the checks': a draft must not know the coin that it will meet.
        draft_B = draw(logits_BV, token_position_B, seed ^ jnp.uint32(0x5F3759DF), sampling)
        drafts.append(draft_B)
        if k < n_drafts:
            kept.append(at(hidden, a_B))  # at position (n + a + 1) - k
        known_BT = _with_draft(known_BT, draft_B, tokens.count_B + (k - 1))
    return Drafting(jnp.stack(drafts, axis=1), jnp.stack(scores, axis=1), tuple(kept)), tuple(new_rows)


class PromptChain:
    """The modules over prompts, chunk by chunk behind the main model: their caches, and what the first drafts are made of."""

    def __init__(self, model: Serving, depths: tuple[Array, ...], prompts: Prompts, config: ModelConfig):
        self.rows, self.last_B = list(depths), jnp.asarray(prompts.length_B - 1)
        zeros = jnp.zeros((len(prompts.length_B), config.hidden_size), jnp.dtype(config.compute_dtype))
        self.main = zeros  # what the main model hands on at the prompts' last positions
        self.carried = [zeros] * (len(depths) - 1)  # of module k = 1 .. D - 1: at the last position but k
        self._tables = model._replace(layers=(), depths=())  # so that all modules share one program
        self._modules, self._tokens_BT, self._config = model.depths, prompts.tokens_BT, config

    def follow(self, start: int, stream: Stream) -> None:
        """After the main model's chunk from `start` on."""
        if not self._modules:
            return
        hidden, config = fed(stream, self._config), self._config
        first, length = jnp.int32(start), hidden.shape[1]
        self.main = _take_over(hidden, first, self.last_B, self.main)
        for k, module in enumerate(self._modules, 1):
            tokens_BT = np.pad(self._tokens_BT, ((0, 0), (0, k)))[:, start + k : start + k + length]
            run = _compiled_module(config)
            stream, self.rows[k - 1] = run(self._tables, module, self.rows[k - 1], hidden, jnp.asarray(tokens_BT), first)
            hidden = fed(stream, config)
            if k < len(self._modules):
                self.carried[k - 1] = _take_over(hidden, first, jnp.maximum(self.last_B - k, 0), self.carried[k - 1])


_take_over = jax.jit(taken_over)


@lru_cache(maxsize=8)
def _compiled_module(config: ModelConfig) -> Any:
    def run(
        tables: Serving, module: Module, rows: Array, hidden: Array, tokens_BT: Array, start: Array
    ) -> tuple[Stream, Array]:
        start_B = jnp.broadcast_to(start, tokens_BT.shape[:1])
        return run_module(module, rows, hidden, lookup(tables, tokens_BT, config), start_B, config, absorbed=False)

    return jax.jit(run, donate_argnums=2)


def _fitted(known_BT: Array, window: int) -> Array:
    return jnp.pad(known_BT, ((0, 0), (0, max(0, window - known_BT.shape[1]))))[:, :window]


def _with_draft(known_BT: Array, draft_B: Array, index_B: Array) -> Array:
    """A draft in its place after the tokens that are known."""
    wider = jnp.pad(known_BT, ((0, 0), (0, 1)))
    place = jnp.arange(wider.shape[1], dtype=jnp.int32)[None, :] == index_B[:, None]
    return jnp.where(place, draft_B[:, None], wider)


class Step(NamedTuple):
    cache: Cache
    drafting: Drafting
    verified: Verified
    count_LR: Array | None  # as of `Stream`


def speculative_step(
    model: Serving,
    cache: Cache,
    drafting: Drafting,
    token_B: Int[Array, " B"],
    position_B: Int[Array, " B"],
    seed: Array,
    sampling: Sampling,
    config: ModelConfig,
    *,
    going_B: Bool[Array, " B"] | None = None,
) -> Step:
    """t_n at `position` n and its drafts through the main model; then new drafts. `going`: as of `extend`."""
    tokens_BT = jnp.concatenate([token_B[:, None], drafting.drafts_BD], axis=1)
    batch, length = tokens_BT.shape
    going_BT = None if going_B is None else jnp.broadcast_to(going_B[:, None], (batch, length))
    stream, rows = extend(model, cache.layers, tokens_BT, position_B, config, absorbed=True, going_BT=going_BT)
    logits_BTV = project(model, stream.normed_BTD.reshape(batch * length, -1)).reshape(batch, length, -1)
    verified = verify(logits_BTV, drafting, position_B, seed, sampling)
    drafting, depths = drafted(
        model, cache.depths, drafting.carried, fed(stream, config), verified, position_B, seed, sampling, config
    )
    return Step(Cache(rows, depths), drafting, verified, stream.count_LR)
