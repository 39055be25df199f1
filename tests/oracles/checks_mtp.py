"""Checks of multi-token prediction's alignment; run by its tests, and by the mutants, which must fail them."""

import jax.numpy as jnp
import numpy as np

from dsv3_jax.model import mtp
from oracles import vectors
from oracles.numpy_model import aligned_targets


def check_known_alignment() -> None:
    """Per depth: which positions count, what they predict, whose embedding they join."""
    tokens = jnp.asarray(vectors.MTP_TOKENS, jnp.int32)
    for depth, known in vectors.MTP_ALIGNMENT.items():
        counted = np.flatnonzero(mtp.predicts_within_document(jnp.ones_like(tokens), depth)[0])
        targets, joined = mtp.shifted(tokens, depth + 1)[0], mtp.shifted(tokens[:, :-1], depth)[0]
        assert [(i, int(targets[i])) for i in counted] == [(i, target) for i, _, target in known], depth
        if depth:
            assert [int(joined[i]) for i in counted] == [embedded for _, embedded, _ in known], depth


def check_targets_within_documents() -> None:
    """Packed rows with padding at every place where it may stand."""
    rows = [[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8, [1] * 8, [7, 7, 7, 7, 0, 0, 0, 0]]
    segments = np.array(rows, np.int32)
    tokens = np.arange(40, dtype=np.int32).reshape(5, 8)
    for depth in range(4):
        targets, valid = aligned_targets(tokens, 7, depth, segments)
        np.testing.assert_array_equal(mtp.predicts_within_document(jnp.asarray(segments), depth), valid)
        ours = np.asarray(mtp.shifted(jnp.asarray(tokens), depth + 1))[:, :-1]
        np.testing.assert_array_equal(np.where(valid, ours, 0), targets)
