"""Log-probabilities of continuations: texts to tokens, tokens to batches of a few shapes, and what the model says of them.

A sequence is padded behind, where causal attention does not look, so neither padding nor neighbours change its numbers
(beyond the order of sums). Logits are never held whole: the output head goes by in pieces.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.score import Supply, final_norm, hidden_layer, run_layer

SHORTEST = 16  # tokens that a pass is compiled for; then powers of two


class Request(NamedTuple):
    """A sequence of which the last `n_scored` tokens are predicted, each from all before it. The very last is not read."""

    tokens: tuple[int, ...]
    n_scored: int


class Scored(NamedTuple):
    """Of one request."""

    logprob: float  # nats, summed in float64
    greedy: bool  # whether each token was the most probable one


class Batch(NamedTuple):
    """Requests of one pass, which has `rows` of `length` tokens."""

    members: tuple[int, ...]
    rows: int
    length: int


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context with BOS before it, and of its continuation, as the field splits them.

    White space that ends the context goes to the continuation, for the words that follow are tokens with their space. The whole
    is encoded at once, and as many ids as the context alone has are the context's; where a token spans the border at least one
    id is left to the continuation. Raises ValueError for a continuation without a token.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    if not whole:
        raise ValueError("continuation: expected at least one token, got none")
    border = min(len(tokenizer.encode(kept)), len(whole) - 1) if kept else 0
    return [tokenizer.bos, *whole[:border]], whole[border:]


def cut(context: Sequence[int], continuation: Sequence[int], window: int) -> tuple[Request, int]:
    """A request of which the model reads at most `window` tokens, and how many of the context's were cut off, from the left.

    Raises ValueError if the continuation alone is longer than the window.
    """
    if len(continuation) > window:
        raise ValueError(f"a continuation of {len(continuation)} tokens does not fit the window of {window}; set --window")
    tokens = (*context, *continuation)
    over = max(0, len(tokens) - 1 - window)
    return Request(tokens[over:], len(continuation)), over


def plan(lengths: Sequence[int], batch_tokens: int) -> list[Batch]:
    """Batches of requests that read `lengths` tokens: about the same length together, in order, about `batch_tokens` a pass.

    A bucket with few requests gets rows for no more than them, to a power of two. The plan depends on nothing else, so that
    what is continued later runs the batches that it would have run.
    """
    buckets = np.array([bucket(n) for n in lengths], np.int64)
    found = []
    for length in np.unique(buckets).tolist():
        members = np.flatnonzero(buckets == length)
        rows = min(max(1, batch_tokens // length), 1 << (len(members) - 1).bit_length())
        found += [Batch(tuple(members[i : i + rows].tolist()), rows, length) for i in range(0, len(members), rows)]
    return found


def bucket(n_tokens: int) -> int:
    """Length that a pass is compiled for."""
    return max(SHORTEST, 1 << (n_tokens - 1).bit_length())


def n_read(request: Request) -> int:
    return len(request.tokens) - 1


def scored(
    supply: Supply, requests: Sequence[Request], batch_tokens: int, *, lengths: Sequence[int] | None = None,
    wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[dict[int, Scored]]:  # fmt: skip
    """What the model says of each request, batch by batch, by the requests' indices.

    `lengths` (default: what each reads) decides which go together; batches of which no request is `wanted` are passed over.
    """
    for batch in plan([n_read(r) for r in requests] if lengths is None else lengths, batch_tokens):
        if not any(map(wanted, batch.members)):
            continue
        tokens = np.zeros((batch.rows, batch.length), np.int32)
        targets = np.zeros((batch.rows, batch.length), np.int32)
        for row, i in enumerate(batch.members):
            n, ids = n_read(requests[i]), requests[i].tokens
            tokens[row, :n], targets[row, :n] = ids[:-1], ids[1:]
        logprobs, greedy = token_logprobs(supply, tokens, targets)
        found = {}
        for row, i in enumerate(batch.members):
            n = n_read(requests[i])
            own = slice(n - requests[i].n_scored, n)
            found[i] = Scored(float(logprobs[row, own].sum(dtype=np.float64)), bool(greedy[row, own].all()))
        yield found


def token_logprobs(
    supply: Supply, tokens_BT: Int[np.ndarray, "B T"], targets_BT: Int[np.ndarray, "B T"]
) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """log p(target) at every position, float32 nats, and whether the target has the largest logit (the lowest id of equals)."""
    x_BTD = jnp.asarray(supply.embedding(tokens_BT), jnp.dtype(supply.config.compute_dtype))
    for params, bias_E in supply.layers():
        x_BTD = jax.block_until_ready(run_layer(hidden_layer, params, bias_E, x_BTD, supply=supply))
        del params  # before the next layer is read
    normed_BTD, targets, start = final_norm(x_BTD, supply), jnp.asarray(targets_BT), 0
    seen = _nothing(tokens_BT.shape)
    for rows_VD in supply.head():
        seen = _with_piece(seen, normed_BTD, jnp.asarray(rows_VD), targets, jnp.int32(start))
        start += len(rows_VD)
    logprob_BT = seen.own_BT - (seen.top_BT + jnp.log(seen.sum_BT))
    return np.asarray(logprob_BT), np.asarray(seen.best_BT == targets)


class _Seen(NamedTuple):
    """Of the vocabulary's pieces so far, [B, T]: the largest logit, whose it is, the sum of exp(logit - top), the target's."""

    top_BT: Array
    best_BT: Array
    sum_BT: Array
    own_BT: Array


def _nothing(shape: tuple[int, ...]) -> _Seen:
    return _Seen(jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.full(shape, -jnp.inf))


@partial(jax.jit, donate_argnums=0)
def _with_piece(seen: _Seen, normed_BTD: Array, rows_VD: Array, targets_BT: Array, start: Array) -> _Seen:
    logits_BTV = jnp.einsum("btd,vd->btv", normed_BTD, rows_VD.astype(normed_BTD.dtype), preferred_element_type=jnp.float32)
    own_top_BT, place_BT = logits_BTV.max(axis=-1), targets_BT - start
    top_BT = jnp.maximum(seen.top_BT, own_top_BT)
    here_BT = (place_BT >= 0) & (place_BT < rows_VD.shape[0])
    own_BT = jnp.take_along_axis(logits_BTV, jnp.where(here_BT, place_BT, 0)[:, :, None], axis=-1)[:, :, 0]
    best_BT = start + jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
    return _Seen(
        top_BT,
        jnp.where(own_top_BT > seen.top_BT, best_BT, seen.best_BT),
        seen.sum_BT * jnp.exp(seen.top_BT - top_BT) + jnp.exp(logits_BTV - top_BT[:, :, None]).sum(axis=-1),
        jnp.where(here_BT, own_BT, seen.own_BT),
    )
