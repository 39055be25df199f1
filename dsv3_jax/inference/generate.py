"""Continuing prompts: prefill, then several steps a call of one compiled program, with or without drafts.

The program knows when a sequence has ended (an end token, its length); the host looks at what came out after each call, shows
it, and may end a sequence (a stop string). No step waits for the host, and no length makes it compile again.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.decode import Cache, Prompts, extend, make_cache, padded, prefill, project
from dsv3_jax.inference.sampling import GREEDY, Sampling, check_sampling, draw
from dsv3_jax.inference.serving import Serving
from dsv3_jax.inference.sharded import placement_of
from dsv3_jax.inference.speculative import Drafting, PromptChain, Verified, close_calls, drafted, speculative_step

CHUNK = 512  # tokens of a prompt that are computed at a time
STEPS = 8  # of one call


class Statistics(NamedTuple):
    """Of one generation, all sequences together."""

    prompt_tokens: int
    new_tokens: int
    steps: int  # passes of the main model over a sequence, after its prompt
    drafts: int
    accepted: int
    close: int  # greedy tokens whose two largest logits were nearer than 1e-4: another order of summing may choose the other
    prefill_seconds: float  # with compiling, if this batch was the first of its kind
    decode_seconds: float  # without compiling: of `timed_tokens`
    timed_tokens: int
    host_seconds: float  # of the decoding, spent outside the compiled program

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        return 1 + self.accepted / self.steps if self.steps else 0.0


class Generated(NamedTuple):
    tokens: list[list[int]]  # new ones of every prompt, the end token included where it came
    statistics: Statistics
    # On a mesh: rows that each slot of the main model's MoE layers computed, those of prompts included if it computed them.
    count_LR: Int[np.ndarray, "L R"] | None = None


class _State(NamedTuple):
    cache: Cache
    drafting: Drafting | None
    token_B: Int[Array, " B"]  # at `position`, known but not in the cache
    position_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    out_BN: Int[Array, "B N"]
    count_B: Int[Array, " B"]  # tokens in `out`
    steps: Int[Array, ""]  # sequences times passes
    accepted: Int[Array, ""]
    close: Int[Array, ""]
    count_LR: Int[Array, "L R"] | None  # on a mesh, since the beginning


OnTokens = Callable[[int, list[int]], bool]  # (sequence, its newest tokens) -> whether it should end


def generate(
    model: Serving,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    end_ids: Sequence[int] = (),
    speculative: bool = False,
    prefiller: Serving | None = None,
    chunk: int = CHUNK,
    steps: int = STEPS,
    on_tokens: OnTokens = lambda sequence, tokens: False,
) -> Generated:
    """Continues every prompt by up to `max_new_tokens`, or until one of `end_ids`, or until `on_tokens` says so.

    `speculative` drafts with the model's MTP modules; greedy tokens are the same, drawn ones are distributed the same. `chunk`
    bounds the memory of the prompts' pass, `steps` how many passes run before the host looks. On a mesh sequences are divided
    among its ranks; as many as are missing are added, and left out of the result. `prefiller` is the same model laid out for
    prompts, on these devices or others: what it has cached then moves to the mesh that decodes [§3.4].

    Raises ValueError, one line, for prompts that are none or not of the vocabulary, a model without MTP modules, and sampling
    numbers out of range.
    """
    _check(config, prompts, max_new_tokens, sampling, speculative, model)
    n_given, prefiller = len(prompts), prefiller or model
    meshes = [placement.batch_ranks for placement in map(placement_of, (prefiller, model)) if placement]
    if prefiller is not model and len(meshes) < 2:
        raise ValueError("prefiller: expected it and the model on a mesh each, got one on a single device; deploy both")
    longest = max(map(len, prompts), default=1)
    chunk = min(chunk, max(16, 1 << (longest - 1).bit_length()))
    batch = padded(prompts, chunk, math.lcm(*meshes))
    n_drafts = min(len(model.depths), int(batch.length_B.min())) if speculative else 0
    model, prefiller = (each._replace(depths=each.depths[:n_drafts]) for each in (model, prefiller))
    size = max(batch.tokens_BT.shape[1], _rounded(longest + max_new_tokens + 2 * n_drafts + 1))
    began = time.perf_counter()
    plain, seed = sampling._replace(seed=0), jnp.uint32(sampling.seed)
    state = _begin(prefiller, config, batch, plain, seed, size, chunk, tuple(end_ids), steps)
    if (own := placement_of(model)) is not None and own != placement_of(prefiller):
        state = state._replace(count_LR=jnp.zeros((config.n_main_moe_layers, own.n_slots(config)), jnp.int32))
    limit_B = jnp.asarray(batch.length_B + max_new_tokens - 1)  # position of the last token that is wanted
    added_B = np.arange(len(batch.length_B)) >= n_given
    state = _settled(state._replace(done_B=state.done_B | (state.position_B >= limit_B) | added_B), model)
    tokens: list[list[int]] = [[int(t)] for t in np.asarray(state.token_B)]
    ended = [added_B[i] or on_tokens(i, row) for i, row in enumerate(tokens)]
    prefilled = time.perf_counter()
    run = _compiled_steps(config, plain, tuple(end_ids), steps, n_drafts)
    waited, total, timed, passes, accepted, close = 0.0, 0.0, 0, 0, 0, int(state.close)
    done = np.asarray(state.done_B) | np.array(ended)
    while not done.all():
        asked, known = time.perf_counter(), run.traces
        state = run(model, state._replace(done_B=jax.device_put(done, state.done_B.sharding)), limit_B, seed)
        out, count, now_done, *numbers = jax.device_get(
            (state.out_BN, state.count_B, state.done_B, state.steps, state.accepted, state.close)
        )
        answered = time.perf_counter()
        passes, accepted, close = passes + int(numbers[0]), accepted + int(numbers[1]), close + int(numbers[2])
        for i in np.flatnonzero(~done):
            new = _wanted(out[i, : count[i]].tolist(), end_ids, max_new_tokens - len(tokens[i]))
            tokens[i] += new
            ended[i] = bool(new) and on_tokens(int(i), new)
        done = now_done | np.array(ended) | np.array([len(row) >= max_new_tokens for row in tokens])
        if run.traces == known:  # else it was compiled first
            waited, total = waited + answered - asked, total + time.perf_counter() - asked
            timed += int(count.sum())
    tokens = tokens[:n_given]
    n_new = sum(map(len, tokens))
    return Generated(
        tokens,
        Statistics(
            int(batch.length_B[:n_given].sum()),
            n_new,
            passes,
            passes * n_drafts,
            accepted,
            close,
            prefilled - began,
            total,
            timed,
            total - waited,
        ),
        None if state.count_LR is None else np.asarray(state.count_LR),
    )


def _settled(state: _State, model: Serving) -> _State:
    """Where a call leaves it: on the model's device or, but for the cache, on all of its mesh.

    The first call and the second are one program then.
    """
    placement = placement_of(model)
    if placement is None:
        return jax.device_put(state, model.norm.sharding)
    small = jax.device_put(state._replace(cache=Cache((), ())), placement.sharding(PartitionSpec()))
    return small._replace(cache=jax.device_put(state.cache, placement.sharding(placement.batch_spec)))


def _rounded(size: int) -> int:
    """Cache sizes come in steps, so that neighbouring lengths share a program."""
    step = 128 if size <= 1024 else 1024
    return -(-size // step) * step


def _wanted(new: list[int], end_ids: Sequence[int], room: int) -> list[int]:
    """Up to the end token, or as many as there is room for."""
    first_end = next((i + 1 for i, token in enumerate(new) if token in end_ids), len(new))
    return new[: min(first_end, room)]


def _check(
    config: ModelConfig, prompts: Any, max_new_tokens: int, sampling: Sampling, speculative: bool, model: Serving
) -> None:
    check_sampling(sampling)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if speculative and not model.depths:
        raise ValueError("speculative: this model has no MTP module to draft with; leave it out")
    for prompt in prompts:
        bad = [t for t in prompt if not 0 <= t < config.vocab_size]
        if bad:
            raise ValueError(f"prompts: expected ids of 0..{config.vocab_size - 1}, got {bad[0]}")


def _begin(
    model: Serving, config: ModelConfig, prompts: Prompts, sampling: Sampling, seed: Array, size: int, chunk: int,
    end_ids: tuple[int, ...], steps: int,
) -> _State:  # fmt: skip
    """The state after the prompts and the first new token."""
    batch, depths = len(prompts.length_B), len(model.depths)
    cache = make_cache(config, batch, size, depths=depths, model=model)
    main = model._replace(depths=())  # the same programs with drafts and without
    chain = PromptChain(model, cache.depths, prompts, config)
    done = prefill(main, cache, prompts, config, chunk=chunk, then=chain.follow)
    length_B = jnp.asarray(prompts.length_B)
    token_B, over_B, close = _first_token(config, sampling, end_ids)(main, done.hidden_BD, length_B, seed)
    cache, drafting = done.cache, None
    if depths:
        drafting, rows = _first_drafts(model, chain, token_B, seed, sampling, config)
        cache = cache._replace(depths=rows)
    out = jnp.zeros((batch, steps * (depths + 1)), jnp.int32)
    # One array each: the state is donated.
    passes, accepted, count_B = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32)
    return _State(cache, drafting, token_B, length_B, over_B, out, count_B, passes, accepted, close, done.count_LR)


@lru_cache(maxsize=16)
def _first_token(config: ModelConfig, sampling: Sampling, end_ids: tuple[int, ...]) -> Any:
    def first(model: Serving, hidden_BD: Array, length_B: Array, seed: Array) -> tuple[Array, Array, Array]:
        logits_BV = project(model, hidden_BD)
        token_B = draw(logits_BV, length_B, seed, sampling)
        return token_B, _is_end(token_B, end_ids), close_calls(logits_BV, sampling).sum(dtype=jnp.int32)

    return jax.jit(first)


def _is_end(tokens: Array, end_ids: tuple[int, ...]) -> Array:
    return jnp.isin(tokens, jnp.array(end_ids, jnp.int32)) if end_ids else jnp.zeros(tokens.shape, bool)


@lru_cache(maxsize=8)
def _compiled_drafts(config: ModelConfig, sampling: Sampling) -> Any:
    return jax.jit(partial(drafted, sampling=sampling, config=config))


def _first_drafts(
    model: Serving, chain: PromptChain, token_B: Array, seed: Array, sampling: Sampling, config: ModelConfig
) -> tuple[Drafting, tuple[Array, ...]]:
    """As after a step whose position n was the prompts' last."""
    depth, batch = len(model.depths), len(token_B)
    main = jnp.pad(chain.main[:, None], ((0, 0), (0, depth), (0, 0)))
    known = Verified(
        jnp.pad(token_B[:, None], ((0, 0), (0, depth))), jnp.ones(batch, jnp.int32), jnp.zeros((batch, depth + 1), bool)
    )
    drafts = _compiled_drafts(config, sampling)
    return drafts(model._replace(layers=()), tuple(chain.rows), tuple(chain.carried), main, known, chain.last_B, seed)


class _Compiled:
    """A jitted function that counts how often it was traced, and so compiled."""

    def __init__(self, function: Callable[..., Any]):
        self.traces = 0

        def counted(*args: Any) -> Any:
            self.traces += 1
            return function(*args)

        self._run = jax.jit(counted, donate_argnums=1)

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)


@lru_cache(maxsize=16)
def _compiled_steps(config: ModelConfig, sampling: Sampling, end_ids: tuple[int, ...], steps: int, n_drafts: int) -> _Compiled:
    """`steps` steps, or fewer if every sequence has ended before."""
    one = _speculative if n_drafts else _plain

    def run(model: Serving, state: _State, limit_B: Array, seed: Array) -> _State:
        zero = jnp.zeros((), jnp.int32)
        state = state._replace(count_B=jnp.zeros_like(state.count_B), steps=zero, accepted=zero, close=zero)

        def body(carry: tuple[Array, _State]) -> tuple[Array, _State]:
            i, state = carry
            return i + 1, one(model, state, limit_B, seed, end_ids, sampling, config)

        def going(carry: tuple[Array, _State]) -> Array:
            return (carry[0] < steps) & ~carry[1].done_B.all()

        state, placement = jax.lax.while_loop(going, body, (zero, state))[1], placement_of(model)
        if placement is None:
            return state
        small = jax.lax.with_sharding_constraint(state._replace(cache=Cache((), ())), placement.sharding(PartitionSpec()))
        rows = jax.lax.with_sharding_constraint(state.cache, placement.sharding(placement.batch_spec))
        return small._replace(cache=rows)

    return _Compiled(run)


def _plain(
    model: Serving,
    state: _State,
    limit_B: Array,
    seed: Array,
    end_ids: tuple[int, ...],
    sampling: Sampling,
    config: ModelConfig,
) -> _State:
    stream, rows = extend(
        model, state.cache.layers, state.token_B[:, None], state.position_B, config, absorbed=True,
        going_BT=~state.done_B[:, None],
    )  # fmt: skip
    state = _counted(state, stream.count_LR)
    logits_BV = project(model, stream.normed_BTD[:, 0])
    token_B = draw(logits_BV, state.position_B + 1, seed, sampling)
    tokens = Verified(token_B[:, None], jnp.ones_like(token_B), close_calls(logits_BV, sampling)[:, None])
    return _advanced(state, tokens, Cache(rows, ()), None, limit_B, end_ids)


def _speculative(
    model: Serving,
    state: _State,
    limit_B: Array,
    seed: Array,
    end_ids: tuple[int, ...],
    sampling: Sampling,
    config: ModelConfig,
) -> _State:
    assert state.drafting is not None
    step = speculative_step(
        model, state.cache, state.drafting, state.token_B, state.position_B, seed, sampling, config, going_B=~state.done_B
    )
    state = _counted(state, step.count_LR)
    kept = jax.tree.map(
        lambda old, new: jnp.where(state.done_B.reshape((-1,) + (1,) * (new.ndim - 1)), old, new), state.drafting, step.drafting
    )
    return _advanced(state, step.verified, step.cache, kept, limit_B, end_ids)


def _counted(state: _State, count_LR: Array | None) -> _State:
    if count_LR is None or state.count_LR is None:
        return state
    return state._replace(count_LR=state.count_LR + count_LR)


def _advanced(
    state: _State, new: Verified, cache: Cache, drafting: Drafting | None, limit_B: Array, end_ids: tuple[int, ...]
) -> _State:
    """Sequences that have not ended take their new tokens."""
    going_B = ~state.done_B
    gained_B = jnp.where(going_B, new.count_B, 0)
    out_BN = state.out_BN
    place_N = jnp.arange(out_BN.shape[1], dtype=jnp.int32)[None, :]
    is_end_B, close = jnp.zeros_like(state.done_B), state.close
    for i in range(new.tokens_BT.shape[1]):
        counts_B = i < gained_B
        wanted_B = counts_B & ~is_end_B & (state.position_B + (i + 1) <= limit_B)
        close = close + (wanted_B & new.close_BT[:, i]).sum(dtype=jnp.int32)
        here = (place_N == (state.count_B + i)[:, None]) & counts_B[:, None]
        out_BN = jnp.where(here, new.tokens_BT[:, i, None], out_BN)
        is_end_B |= counts_B & _is_end(new.tokens_BT[:, i], end_ids)
    last_B = jnp.take_along_axis(new.tokens_BT, (new.count_B - 1)[:, None], axis=1)[:, 0]
    position_B = state.position_B + gained_B
    return _State(
        cache,
        drafting,
        jnp.where(going_B, last_B, state.token_B),
        position_B,
        state.done_B | is_end_B | (position_B >= limit_B),
        out_BN,
        state.count_B + gained_B,
        state.steps + going_B.sum(dtype=jnp.int32),
        state.accepted + jnp.where(going_B, new.count_B - 1, 0).sum(dtype=jnp.int32),
        close,
        state.count_LR,
    )
