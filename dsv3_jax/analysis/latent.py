"""What MLA's latent keeps [§2.1.1]: spectra, the two parts of attention's logits, and what fewer directions would cost.

The cache holds a token's latent c_kv after its norm, and its rotated key. "Energy" of a direction is its part of the latents'
mean square. A latent that keeps r directions V (orthonormal, [C, r]) is V V^T c_kv; as only kv_b_proj reads the latent, a model
with V V^T kv_b_proj is that model, and its cache would hold r numbers and the rotary key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.inference.attention import cache_width, cached_attention
from dsv3_jax.inference.decode import positions
from dsv3_jax.inference.score import Supply, check_tokens, final_norm, hidden_layer, run_layer, score_context
from dsv3_jax.inference.serving import attention_laid_out
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import attention, mla_heads
from dsv3_jax.model.rope import apply_rope, softmax_scale
from dsv3_jax.planner.parameters import BF16, cache_elements
from dsv3_jax.planner.rows import Number
from dsv3_jax.training.loss import chunk_length, cross_entropy

CHUNK = 64  # tokens that attend to the cache at a time
LOGITS = 2**24  # alive at a time
GROUPS = 8


# --- bytes ---


def gqa_groups(model: ModelConfig) -> int:
    """Key/value heads of the GQA that MLA is compared with: 8, as others have them, but half the model's heads where few."""
    return max(1, min(GROUPS, model.num_attention_heads // 2))


def cache_bytes(model: ModelConfig, scheme: str, form: Quantiser | None) -> Number:
    """Of a token in all layers of the main model; `scheme`: mla, mha, gqa or mqa, of the model's head sizes without rotary
    channels; `form`: how rows are rounded, with the bytes of their scales; None: BF16."""
    elements = cache_elements(model, scheme, gqa_groups(model))
    return model.num_hidden_layers * (BF16 * elements if form is None else form.row_bytes(elements))


# --- spectra ---


def effective_rank(singular: Float[np.ndarray, "*rows C"]) -> Float[np.ndarray, "*rows"]:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007): from 1, all in one direction,
    to C, all alike; 0 where all are 0."""
    total = singular.sum(axis=-1, keepdims=True)
    share = np.divide(singular, total, out=np.zeros_like(singular), where=total > 0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def directions_for(singular: Float[np.ndarray, "*rows C"], share: float) -> Integer[np.ndarray, "*rows"]:
    """The fewest leading directions with at least `share` of the energy, the sum of squares; values must be descending."""
    energy = np.cumsum(np.square(singular), axis=-1)
    enough = share * energy[..., -1:] * (1 - 1e-12)  # all of the energy may be one rounding short of itself
    return np.asarray((energy < enough).sum(axis=-1) + (energy[..., -1] > 0))


class WeightSpectra(NamedTuple):
    """Singular values of one layer's kv_b_proj, descending: as one matrix [C, H (n + v)], and W^UK and W^UV of each head."""

    whole_C: Float[np.ndarray, " C"]
    keys_HC: Float[np.ndarray, "H X"]
    values_HC: Float[np.ndarray, "H Y"]


def weight_spectra(kv_b_CHO: Float[np.ndarray, "C H O"], nope: int) -> WeightSpectra:
    """float64; `nope`: content channels of a head's key, which come first among its O."""
    weight = kv_b_CHO.astype(np.float64)
    by_head = weight.transpose(1, 0, 2)
    parts = weight.reshape(len(weight), -1), by_head[..., :nope], by_head[..., nope:]
    return WeightSpectra(*(np.asarray(np.linalg.svd(part, compute_uv=False)) for part in parts))


def second_moment(c_NC: Float[np.ndarray, "*batch C"]) -> Float[np.ndarray, "C C"]:
    """Mean of c c^T over all rows, float64: not centred, as a cache without the mean would not be."""
    rows = np.asarray(c_NC, np.float64).reshape(-1, c_NC.shape[-1])
    return rows.T @ rows / len(rows)


class Principal(NamedTuple):
    """`singular_C`: root mean square of the latents along each direction, descending; `directions_CC`: its columns."""

    singular_C: Float[np.ndarray, " C"]
    directions_CC: Float[np.ndarray, "C C"]


def principal(moment_CC: Float[np.ndarray, "C C"]) -> Principal:
    energy, directions = np.linalg.eigh(moment_CC)
    return Principal(np.sqrt(np.maximum(energy[::-1], 0.0)), directions[:, ::-1])


# --- fewer directions ---


def truncation_error(
    weight_CO: Float[np.ndarray, "C O"], moment_CC: Float[np.ndarray, "C C"], directions_CC: Float[np.ndarray, "C C"]
) -> Float[np.ndarray, " R"]:
    """|| c W - c V V^T W || / || c W || over latents c of this second moment, with the first r columns V of an orthonormal
    basis: for r = 0 (1, all is lost), 1, ..., C (0)."""
    moment, turned = directions_CC.T @ moment_CC @ directions_CC, directions_CC.T @ weight_CO
    # What is lost with direction i and with j meets in the square: M_ij (W W^T)_ij, summed over both beyond r.
    lost = moment * (turned @ turned.T)
    beyond = np.cumsum(np.cumsum(lost[::-1, ::-1], axis=0), axis=1).diagonal()[::-1]
    return np.sqrt(np.maximum(np.append(beyond, 0.0), 0.0) / beyond[0])


def ranks_of(rank: int) -> tuple[int, ...]:
    """1, 2, 4, ... and three quarters of the latent's width, and all of it."""
    doubled = [2**i for i in range(rank.bit_length()) if 2**i < rank]
    return tuple(sorted({*doubled, max(1, 3 * rank // 4), rank}))


# --- logits ---


class LogitParts(NamedTuple):
    """Variances over the keys that a query sees, mean over queries, by head: of the content part, of the rotary part, and of
    their sum, the logit: what a query adds to all of its keys alike no softmax sees."""

    content_H: Float[Array | np.ndarray, " H"]
    rotary_H: Float[Array | np.ndarray, " H"]
    logit_H: Float[Array | np.ndarray, " H"]


def logit_parts(
    q_BHTC: Float[Array, "B H T C"],
    q_rope_BHTR: Float[Array, "B H T R"],
    k_BHTC: Float[Array, "B H T C"],
    k_rope_B1TR: Float[Array, "B one T R"],
    scale: float,
) -> LogitParts:
    """Of rotated queries and keys, in float32; a query's keys are those up to its own. Needs two positions."""
    length = q_BHTC.shape[2]
    seen_TS = jnp.tril(jnp.ones((length, length), jnp.float32))
    count_T = seen_TS.sum(axis=1)

    def variance(scores_TS: Array) -> Array:
        mean_T = (scores_TS * seen_TS).sum(axis=1) / count_T
        square_T = (jnp.square(scores_TS - mean_T[:, None]) * seen_TS).sum(axis=1) / count_T
        return square_T[1:].mean()  # the first query sees one key

    def one_head(operands: Any) -> LogitParts:
        q, q_rope, k, k_rope = (a.astype(jnp.float32) for a in operands)
        content_TS, rotary_TS = scale * q @ k.T, scale * q_rope @ k_rope.T
        return LogitParts(variance(content_TS), variance(rotary_TS), variance(content_TS + rotary_TS))

    k_rope_BHTR = jnp.broadcast_to(k_rope_B1TR, q_rope_BHTR.shape)
    batch, heads = q_BHTC.shape[:2]
    flat = [a.reshape(batch * heads, *a.shape[2:]) for a in (q_BHTC, q_rope_BHTR, k_BHTC, k_rope_BHTR)]
    found = jax.lax.map(one_head, tuple(flat))  # one square of scores at a time
    return LogitParts(*(part.reshape(batch, heads).mean(axis=0) for part in found))


# --- a model ---


class Study(NamedTuple):
    """By layer of the main model, L; by number of directions kept, R; C the latent's channels, H heads.

    Directions, spectra and logits are of the first half of the sequences, errors and losses of the second.
    """

    ranks: tuple[int, ...]
    weights: tuple[WeightSpectra, ...]
    latent_LC: Float[np.ndarray, "L C"]  # root mean square along each principal direction, descending
    logits_L: tuple[LogitParts, ...]
    keys_LR: Float[np.ndarray, "L R"]  # relative error of all heads' content keys
    values_LR: Float[np.ndarray, "L R"]
    outputs_LR: Float[np.ndarray, "L R"]  # of what attention adds to the residual stream, its input being exact
    absorbed_L: Float[np.ndarray, " L"]  # || absorbed - expanded || / || expanded ||, of what attention adds
    nll_RN: Float[np.ndarray, "R N"]  # nats of each token that follows another, with every layer's latent truncated
    nll_N: Float[np.ndarray, " N"]  # with none

    @property
    def more_R(self) -> Float[np.ndarray, " R"]:
        """Nats per token that truncation costs."""
        return (self.nll_RN - self.nll_N[None]).mean(axis=1)

    @property
    def error_R(self) -> Float[np.ndarray, " R"]:
        """Standard error of that, as if tokens were independent, which neighbours are not: the least that it can be."""
        return (self.nll_RN - self.nll_N[None]).std(axis=1) / np.sqrt(len(self.nll_N))


def study(supply: Supply, tokens_BT: Int[np.ndarray, "B T"], ranks: Sequence[int] | None = None) -> Study:
    """A model's latents over a text, one layer in memory at a time; 2 sequences at least, of an odd number the last is unused.

    Raises ValueError for attention without a latent, for tokens that are none of the model's or too few, and for ranks that
    the latent does not have.
    """
    config = supply.config
    if config.attention != "mla":
        raise ValueError(f"attention: expected mla, which alone has a latent, got {config.attention}; name another model")
    check_tokens(tokens_BT, config)
    batch, length = tokens_BT.shape
    if batch < 2 or length < 2:
        raise ValueError(f"tokens: expected two sequences of two tokens at least, got {list(tokens_BT.shape)}; cut a long one")
    width = config.kv_lora_rank
    ranks = ranks_of(width) if ranks is None else tuple(ranks)
    if not ranks or min(ranks) < 1 or max(ranks) > width:
        raise ValueError(f"ranks: expected numbers from 1 to {width}, the latent's channels, got {list(ranks)}")
    tokens = np.asarray(tokens_BT[: batch // 2 * 2], np.int32)
    fit_BTD, held_BTD = jnp.split(jnp.asarray(supply.embedding(tokens), config.compute_dtype), 2)
    truncated = [held_BTD] * len(ranks)
    layers = []
    for params, bias_E in supply.layers():
        kv_b_CHO = params["self_attn"]["kv_b_proj"].astype(jnp.dtype(config.compute_dtype))
        params = _with_kv_b(params, kv_b_CHO)  # FP8 as a plain array, so that truncated weights are another of its kind
        found, kept = _study_layer(params, fit_BTD, held_BTD, ranks, config)
        layers.append(found)
        fit_BTD, held_BTD = (run_layer(hidden_layer, params, bias_E, x, supply=supply) for x in (fit_BTD, held_BTD))
        truncated = [
            run_layer(hidden_layer, _with_kv_b(params, kv_b), bias_E, x, supply=supply)
            for kv_b, x in zip(kept, truncated, strict=True)
        ]
        jax.block_until_ready(truncated)
        del params  # before the next layer is read
    head_VD = jnp.concatenate([jnp.asarray(rows, config.compute_dtype) for rows in supply.head()])
    losses = [_nll(final_norm(x, supply), head_VD, tokens[batch // 2 :]) for x in (held_BTD, *truncated)]
    columns = [tuple(column) for column in zip(*layers, strict=True)]
    weights, logits, arrays = columns[0], columns[1], [np.stack(column) for column in columns[2:]]
    latent, keys, values, outputs, absorbed = arrays
    return Study(ranks, weights, latent, logits, keys, values, outputs, absorbed, np.stack(losses[1:]), losses[0])


def _study_layer(
    params: Any, fit_BTD: Array, held_BTD: Array, ranks: tuple[int, ...], config: ModelConfig
) -> tuple[tuple[Any, ...], list[Array]]:
    """What `Study` has of a layer, in its fields' order but for ranks and losses; and kv_b_proj truncated to each rank."""
    gain, attn = params["input_layernorm"], params["self_attn"]
    weight, nope = np.asarray(attn["kv_b_proj"], np.float64), config.qk_nope_head_dim
    looked = [_looked_at(gain, attn, x, config) for x in (fit_BTD, held_BTD)]
    cached = [_cached(attn, seen.normed_BTD, config) for seen in looked]
    latents = [np.asarray(rows[..., : len(weight)], np.float64) for _, rows in cached]
    found, moment_CC = principal(second_moment(latents[0])), second_moment(latents[1])
    errors = [
        truncation_error(part.reshape(len(weight), -1), moment_CC, found.directions_CC)[list(ranks)]
        for part in (weight[..., :nope], weight[..., nope:])
    ]
    kept, outputs = [], []
    for r in ranks:
        basis = found.directions_CC[:, :r]
        kv_b_CHO = np.einsum("cr,dr,dho->cho", basis, basis, weight, optimize=True)
        kept.append(jnp.asarray(kv_b_CHO, attn["kv_b_proj"].dtype))
        truncated = _attended({**attn, "kv_b_proj": kept[-1]}, looked[1].normed_BTD, config)
        outputs.append(_relative(truncated, looked[1].attended_BTD))
    absorbed = _relative(cached[0][0], looked[0].attended_BTD)
    parts = LogitParts(*(np.asarray(part, np.float64) for part in looked[0].parts))
    return (weight_spectra(weight, nope), parts, found.singular_C, *errors, np.array(outputs), absorbed), kept


def _with_kv_b(params: Mapping[str, Any], kv_b_CHO: Array) -> dict[str, Any]:
    return {**params, "self_attn": {**params["self_attn"], "kv_b_proj": kv_b_CHO}}


def _relative(found: Array, exact: Array) -> float:
    exact_64 = np.asarray(exact, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact_64) / np.linalg.norm(exact_64))


class _Looked(NamedTuple):
    """One attention, as the model has it."""

    normed_BTD: Array
    attended_BTD: Array
    parts: LogitParts


@partial(jax.jit, static_argnames=("config",))
def _looked_at(gain: Array, attn: Any, x_BTD: Array, config: ModelConfig) -> _Looked:
    x_BTD = rms_norm(x_BTD, gain, config.rms_norm_eps)
    rope, heads = score_context(x_BTD, config, None).rope, mla_heads(attn, x_BTD, config)
    q_rope, k_rope = apply_rope(heads.q_rope_BHTR, *rope), apply_rope(heads.k_rope_BGTR, *rope)
    parts = logit_parts(heads.q_content_BHTC, q_rope, heads.k_content_BGTC, k_rope, softmax_scale(config))
    return _Looked(x_BTD, attention(attn, x_BTD, rope, None, config), parts)


@partial(jax.jit, static_argnames=("config",))
def _attended(attn: Any, normed_BTD: Array, config: ModelConfig) -> Array:
    return attention(attn, normed_BTD, score_context(normed_BTD, config, None).rope, None, config)


def _cached(attn: Any, normed_BTD: Array, config: ModelConfig) -> tuple[Array, Array]:
    """The same from a cache of latents, absorbed, some tokens at a time, as decoding does it; and the cache."""
    batch, length, _ = normed_BTD.shape
    config = replace(config, decode_implementation="views")
    padded_BTD = jnp.pad(normed_BTD, ((0, 0), (0, -length % CHUNK), (0, 0)))  # what no earlier token sees
    rows, laid_out = jnp.zeros((batch, padded_BTD.shape[1], cache_width(config)), normed_BTD.dtype), _laid_out(attn, config)
    outs = []
    for start in range(0, length, CHUNK):
        out, rows = _chunk(laid_out, padded_BTD[:, start : start + CHUNK], rows, jnp.full(batch, start, jnp.int32), config)
        outs.append(out)
    return jnp.concatenate(outs, axis=1)[:, :length], rows[:, :length]


_laid_out = jax.jit(attention_laid_out, static_argnames=("config",))


@partial(jax.jit, static_argnames=("config",))
def _chunk(laid_out: Any, normed_BTD: Array, rows_BSC: Array, start_B: Array, config: ModelConfig) -> tuple[Array, Array]:
    rope = positions(start_B, normed_BTD.shape[1], config)
    return cached_attention(laid_out, normed_BTD, rows_BSC, start_B, rope, config, absorbed=True)


def _nll(normed_BTD: Array, head_VD: Array, tokens_BT: np.ndarray) -> np.ndarray:
    """Of the tokens that follow another, float64 [N]."""
    (batch, length), targets = tokens_BT.shape, jnp.asarray(tokens_BT[:, 1:])
    chunk = chunk_length(batch, length, len(head_VD), LOGITS)
    _, nll_BT = _cross_entropy(normed_BTD[:, :-1], head_VD, targets, jnp.ones(targets.shape, jnp.float32), chunk)
    return np.asarray(nll_BT, np.float64).reshape(-1)


_cross_entropy = jax.jit(cross_entropy, static_argnums=4)
