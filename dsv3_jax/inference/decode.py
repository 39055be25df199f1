"""Decoding with a latent cache [§2.1.1]: prompts in chunks, then one compiled step, whatever the length.

Sequences of a batch have lengths of their own. A cache row is a position; rows beyond a sequence's length hold whatever a
longer neighbour's chunk left there, are never seen, and are overwritten as the sequence grows.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.attention import cache_dtype, cache_shape, cached_attention
from dsv3_jax.inference.experts import gated, moe
from dsv3_jax.inference.serving import Layer, Serving
from dsv3_jax.inference.sharded import Stack, placement_of, stack_blocks
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.rope import rope_tables
from dsv3_jax.parallel.arrays import zeros_on_mesh


class Cache(NamedTuple):
    """One array [B, S, 512 + 64] a layer, or [L, B, S, 512 + 64] a stack; `depths`: of modules that draft.

    As `inference.attention` has them, which on TPU are wider.
    """

    layers: tuple[Shaped[Array, "*layers B S C"], ...]
    depths: tuple[Shaped[Array, "*layers B S C"], ...] = ()


def make_cache(config: ModelConfig, batch: int, size: int, *, depths: int = 0, model: Serving | None = None) -> Cache:
    """Room for `size` positions of `batch` sequences; of a `model` on a mesh, for each of its stacks, and in pieces."""
    placement = placement_of(model) if model else None
    platform = placement.platform if placement else jax.default_backend()
    shape, dtype = cache_shape(config, batch, size, platform), cache_dtype(config, platform)

    def rows(layer: Any) -> Array:
        if not isinstance(layer, Stack):
            return jnp.zeros(shape, dtype)
        return zeros_on_mesh((layer.n_layers, *shape), dtype, layer.placement.sharding(layer.placement.batch_spec))

    if model is None or placement is None:
        return Cache(tuple(map(rows, range(config.num_hidden_layers))), tuple(map(rows, range(depths))))
    return Cache(tuple(map(rows, model.layers)), tuple(rows(module.block) for module in model.depths[:depths]))


class Stream(NamedTuple):
    """What a forward pass over new tokens gives: hidden states before and after the final norm; on a mesh, rows by slot."""

    residual_BTD: Float[Array, "B T D"]
    normed_BTD: Float[Array, "B T D"]
    count_LR: Int[Array, "L R"] | None = None  # (token, expert) pairs that each slot of each MoE layer computed


def extend(
    model: Serving,
    rows: tuple[Array, ...],
    tokens_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    config: ModelConfig,
    *,
    absorbed: bool,
    going_BT: Bool[Array, "B T"] | None = None,
) -> tuple[Stream, tuple[Array, ...]]:
    """The main model on T new tokens of every sequence, from position `start` on; `rows` are the layers' caches.

    On a mesh, what is not `going` (default: everything is) is not sent to experts.
    """
    x_BTD, new, count_LR = lookup(model, tokens_BT, config), [], None
    for layer, layer_rows in zip(model.layers, rows, strict=True):
        x_BTD, layer_rows, count_LR = blocks(layer, x_BTD, layer_rows, start_B, going_BT, config, absorbed=absorbed)
        new.append(layer_rows)
    return Stream(x_BTD, rms_norm(x_BTD, model.norm, config.rms_norm_eps), count_LR), tuple(new)


def blocks(
    layer: Layer | Stack,
    x_BTD: Array,
    rows: Array,
    start_B: Array,
    going_BT: Array | None,
    config: ModelConfig,
    *,
    absorbed: bool,
) -> tuple[Array, Array, Array | None]:
    """One layer, or all of a mesh's stack: what comes out, the cache, and the slots' rows."""
    if isinstance(layer, Stack):
        going_BT = jnp.ones(x_BTD.shape[:2], bool) if going_BT is None else going_BT
        return stack_blocks(layer, x_BTD, rows, start_B, going_BT, config, absorbed=absorbed)
    rope = positions(start_B, x_BTD.shape[1], config)
    x_BTD, rows = cached_block(layer.params, layer.bias_E, x_BTD, rows, start_B, rope, config, absorbed=absorbed)
    return x_BTD, rows, None


def lookup(model: Serving, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T D"]:
    return model.embed_tokens[tokens_BT].astype(jnp.dtype(config.compute_dtype))


def positions(start_B: Array, length: int, config: ModelConfig) -> tuple[Array, Array]:
    """Rotary tables of `length` positions from `start` on."""
    return rope_tables(start_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :], config)


def cached_block(
    params: Any, bias_E: Any, x_BTD: Array, rows_BSC: Array, start_B: Array, rope: Any, config: ModelConfig, *, absorbed: bool
) -> tuple[Array, Array]:
    """As `dsv3_jax.model.transformer.block`, with a cache."""
    normed = rms_norm(x_BTD, params["input_layernorm"], config.rms_norm_eps)
    attended, rows_BSC = cached_attention(params["self_attn"], normed, rows_BSC, start_B, rope, config, absorbed=absorbed)
    x_BTD = x_BTD + attended
    normed = rms_norm(x_BTD, params["post_attention_layernorm"], config.rms_norm_eps)
    out = gated(params["mlp"], normed) if bias_E is None else moe(params["mlp"], bias_E, normed, config)[0]
    return x_BTD + out, rows_BSC


def project(model: Serving, normed_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """float32 logits."""
    head_VD = model.lm_head.astype(normed_BD.dtype)
    # The table first: for a few rows XLA's product on CPU is twice as fast so, and one row is no matter.
    return jnp.einsum("vd,bd->vb", head_VD, normed_BD, preferred_element_type=jnp.float32).T


# --- prompts


class Prompts(NamedTuple):
    """Token ids of prompts, padded on the right, and their lengths."""

    tokens_BT: Int[np.ndarray, "B T"]
    length_B: Int[np.ndarray, " B"]
    added: int = 0  # the last ones, that only fill the batch: nobody asked for them


def padded(prompts: Any, chunk: int, ranks: int = 1) -> Prompts:
    """Prompts side by side, to whole chunks, the shortest one again until they divide among `ranks`.

    Raises ValueError for none, or an empty one.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or not lengths.min():
        raise ValueError(
            "prompts: expected at least one token in each, got " + ("none" if not len(lengths) else "an empty one")
        )
    added = -len(lengths) % ranks
    prompts, lengths = [*prompts, *[min(prompts, key=len)] * added], np.append(lengths, [lengths.min()] * added)
    tokens = np.zeros((len(lengths), -(-int(lengths.max()) // chunk) * chunk), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Prompts(tokens, lengths.astype(np.int32), added)


@lru_cache(maxsize=8)
def _compiled_chunk(config: ModelConfig) -> Any:
    def chunk(
        model: Serving, rows: tuple[Array, ...], tokens_BT: Array, start: Array, last_B: Array, asked_B: Array, hidden_BD: Array
    ) -> tuple[Stream, tuple[Array, ...], Array]:
        """`hidden` of the prompts' last tokens is taken over from the chunk that they lie in."""
        batch, length = tokens_BT.shape
        going_BT = start + jnp.arange(length, dtype=jnp.int32)[None, :] <= jnp.where(asked_B, last_B, -1)[:, None]
        start_B = jnp.broadcast_to(start, (batch,))
        stream, rows = extend(model, rows, tokens_BT, start_B, config, absorbed=False, going_BT=going_BT)
        return stream, rows, taken_over(stream.normed_BTD, start, last_B, hidden_BD)

    return jax.jit(chunk, donate_argnums=(1,))


def taken_over(
    hidden_BTD: Float[Array, "B T D"], start: Array, position_B: Int[Array, " B"], before_BD: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """Of each sequence the hidden state at `position`, where it lies in the chunk from `start` on; else what was `before`."""
    place_B, length = position_B - start, hidden_BTD.shape[1]
    own = jnp.take_along_axis(hidden_BTD, jnp.clip(place_B, 0, length - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(((place_B >= 0) & (place_B < length))[:, None], own, before_BD)


class Prefilled(NamedTuple):
    cache: Cache
    hidden_BD: Float[Array, "B D"]  # of each prompt's last token, after the final norm
    count_LR: Array | None  # as of `Stream`, of all chunks


def prefill(
    model: Serving, cache: Cache, prompts: Prompts, config: ModelConfig, *, chunk: int,
    then: Callable[[int, Stream], None] = lambda start, stream: None,
) -> Prefilled:  # fmt: skip
    """Runs the prompts through the model, `chunk` tokens at a time, keys and values expanded. The cache is donated.

    `then` is called for each chunk, with its first position: what it does not keep is gone.
    """
    compiled, rows = _compiled_chunk(config), cache.layers
    hidden = jnp.zeros((len(prompts.length_B), config.hidden_size), jnp.dtype(config.compute_dtype))
    last, count_LR = jnp.asarray(prompts.length_B - 1), None
    asked = jnp.arange(len(prompts.length_B)) < len(prompts.length_B) - prompts.added
    for start in range(0, prompts.tokens_BT.shape[1], chunk):
        tokens = jnp.asarray(prompts.tokens_BT[:, start : start + chunk])
        stream, rows, hidden = compiled(model, rows, tokens, jnp.int32(start), last, asked, hidden)
        if stream.count_LR is not None:
            count_LR = stream.count_LR if count_LR is None else count_LR + stream.count_LR
        then(start, stream)
    return Prefilled(cache._replace(layers=rows), hidden, count_LR)


def last_logits(model: Serving, config: ModelConfig, prompts: Any) -> Float[np.ndarray, "B V"]:
    """float32 logits after each prompt's last token. Raises ValueError for no prompt, or an empty one."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    placement = placement_of(model)
    batch = padded(prompts, max(1, longest), placement.batch_ranks if placement else 1)
    done = prefill(model, make_cache(config, len(batch.length_B), longest, model=model), batch, config, chunk=longest)
    return np.asarray(project(model, done.hidden_BD))[: len(prompts)]
