"""Validation on held-out documents: nats per token and, as the report's Pile column does, bits per byte [§4.4]."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int


class Validation(NamedTuple):
    """`scores` is JSON-able: `loss` and `bits_per_byte` by domain and over `all`, `mtp_loss` by depth."""

    scores: dict[str, Any]
    domain_load_LME: Int[np.ndarray, "L M E"]  # tokens of each domain that each expert got, by MoE layer


def validate(
    eval_step: Callable[..., Mapping[str, Any]],
    params: Any,
    bias: Any,
    batches: Iterable[Mapping[str, Any]],
    domains: Sequence[str],
    n_bytes: Mapping[str, int],
) -> Validation:
    """Sums `eval_step(params, bias, batch)` over `batches` in float64; `n_bytes` are the bytes of the text they hold."""
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, value in jax.device_get(eval_step(params, bias, batch)).items():
            wide = value.astype(np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64)
            sums[name] = sums.get(name, 0) + wide
    if not sums:
        raise ValueError("validation: no held-out sequence; the corpus is too small")
    nats = dict(zip(domains, sums["domain_loss_sum"].tolist(), strict=True))
    tokens = dict(zip(domains, sums["domain_tokens"].tolist(), strict=True))
    nats["all"], tokens["all"] = sum(nats.values()), sum(tokens.values())
    all_bytes = {**n_bytes, "all": sum(n_bytes[d] for d in domains)}
    scores = {
        "loss": {d: _ratio(nats[d], tokens[d]) for d in nats},
        "bits_per_byte": {d: _ratio(nats[d] / math.log(2), all_bytes[d]) for d in nats},
        "mtp_loss": [_ratio(a, b) for a, b in zip(sums["mtp_loss_sum"].tolist(), sums["mtp_tokens"].tolist(), strict=True)],
    }
    return Validation(scores, sums["domain_load"])


def _ratio(total: float, count: int) -> float | None:
    return total / count if count and math.isfinite(total) else None
