"""A training batch whose tokens go to the experts of a trace: routing replayed while the weights, routers' too, learn."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.tracing.capture import check_replay
from dsv3_jax.tracing.store import RoutingTrace


def training_batch(
    forced: RoutingTrace,
    sequences: Sequence[int],
    config: ModelConfig,
    *,
    length: int | None = None,
    tokens: Sequence[Int[np.ndarray, " S"]] | None = None,
) -> dict[str, np.ndarray]:
    """Rows for `training.step` (a leading axis of micro-batches is the caller's), one a sequence of the trace.

    int32 `tokens`, `segment_ids` (0: padding) and `domain_ids` [B, S], and `forced` [B, S - 1, L, K], the experts of all but a
    row's last token, which is a target alone. S: `length`, or the longest sequence's. `tokens`: what the caller takes the
    sequences to be. Raises ValueError, one line, for a trace of another architecture, other tokens, a sequence that it does not
    have, that is longer than `length`, or that predicts nothing, and for damaged experts.
    """
    check_replay(forced, config)
    text, about = forced.text, forced.about
    for i in sequences:
        if not 0 <= i < len(text.lengths):
            raise ValueError(f"sequences: expected 0..{len(text.lengths) - 1}, got {i}")
    if tokens is not None and len(tokens) != len(sequences):
        raise ValueError(f"tokens: expected those of {len(sequences)} sequences, got {len(tokens)}")
    longest = max((int(text.lengths[i]) for i in sequences), default=0)
    size = longest if length is None else length
    if not 2 <= longest <= size:
        raise ValueError(f"sequences: expected the longest to have 2..{max(size, 2)} tokens, got {longest}")
    shape = len(sequences), size
    ids, segments, domains = (np.zeros(shape, np.int32) for _ in range(3))
    experts = np.full((*shape, len(about.layers), about.top_k), about.n_experts, np.int32)
    for row, i in enumerate(sequences):
        place = text.sequence(i)
        n = place.stop - place.start
        if tokens is not None and not np.array_equal(tokens[row], text.tokens_N[place]):
            raise ValueError(f"tokens of row {row}: expected those of the trace's sequence {i}, got others")
        ids[row, :n], segments[row, :n], domains[row, :n] = text.tokens_N[place], 1, text.domain_of[i]
        experts[row, :n] = forced.experts_of(place)
    return {"tokens": ids, "segment_ids": segments, "domain_ids": domains, "forced": experts[:, :-1]}
