"""To and from the arrays that serving engines return of one request's routing: integers [tokens, layers, top_k].

Some engines have a row for every layer of the model, dense ones included, others for those with routers alone; none has gates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.tracing.store import Choices, RoutingTrace, Text, Writer, about_model, expert_dtype

Rows = Literal["routers", "all"]


def to_engine(trace: RoutingTrace, sequence: int, rows: Rows = "routers") -> Int[np.ndarray, "T L K"]:
    """int32 [T, layers, K] of the main model's layers; -1 for none: where no router chose, and in dense layers, where there is
    a row for `all`. Raises ValueError, one line, for a sequence that the trace does not have, and for damaged experts."""
    n = len(trace.text.lengths)
    if not 0 <= sequence < n:
        raise ValueError(f"sequence: expected 0..{n - 1}, got {sequence}")
    main = [i for i, name in enumerate(trace.about.layers) if name.isdigit()]
    found = trace.experts_of(trace.text.sequence(sequence))[:, main]
    found[found == trace.about.n_experts] = -1
    if rows == "routers":
        return found
    out = np.full((len(found), int(trace.about.config["num_hidden_layers"]), trace.about.top_k), -1, np.int32)
    out[:, [int(trace.about.layers[i]) for i in main]] = found
    return out


def from_engine(
    folder: Path,
    tokens: Sequence[Any],
    experts: Sequence[Any],
    config: ModelConfig,
    *,
    model: str = "",
    source: str = "a serving engine",
    domains: Sequence[str] | None = None,
) -> None:
    """Writes a trace of these requests: of each its `tokens`, integers [T], at least one, and `experts`, as above.

    Layers and last tokens that an engine left out, or has -1 for, are none; gates and margins are NaN.

    Raises ValueError, one line, for arrays that do not fit their tokens or the model, before anything is written.
    """
    if len(tokens) != len(experts) or not len(tokens):
        raise ValueError(f"experts: expected an array for each of {len(tokens)} requests, at least one, got {len(experts)}")
    labels = list(domains) if domains is not None else ["requests"] * len(tokens)
    if len(labels) != len(tokens):
        raise ValueError(f"domains: expected one for each of {len(tokens)} requests, got {len(labels)}")
    names = tuple(dict.fromkeys(labels))
    each = [_tokens(t, config, i) for i, t in enumerate(tokens)]
    found = [_choices(e, len(t), config, i) for i, (t, e) in enumerate(zip(each, experts, strict=True))]
    ids, bounds, at = np.concatenate(each), np.cumsum([0, *map(len, each)]), np.arange(len(each))
    text = Text(ids, bounds, at, np.array([names.index(label) for label in labels]), names)
    about = about_model(config, model=model, tokenizer=None, domains=names, source=source, batch_tokens=len(ids), how={})
    writer = Writer(folder, about, text)
    if not writer.done:
        writer.write([text.sequence(i) for i in at], found)
    writer.finish()


def _tokens(given: Any, config: ModelConfig, request: int) -> Int[np.ndarray, " T"]:
    ids = np.asarray(given)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"tokens of request {request}: expected integers [T], at least one, got {ids.dtype} {list(ids.shape)}")
    if not 0 <= ids.min() <= ids.max() < config.vocab_size:
        got = f"{ids.min()}..{ids.max()}"
        raise ValueError(f"tokens of request {request}: expected 0..{config.vocab_size - 1}, got {got}")
    return ids.astype(np.int32)


def _choices(given: Any, n: int, config: ModelConfig, request: int) -> Choices:
    given, none, k = np.asarray(given), config.n_routed_experts, config.num_experts_per_tok
    layers = config.n_main_moe_layers, config.num_hidden_layers
    fits = given.ndim == 3 and given.dtype.kind in "iu" and n - 1 <= len(given) <= n
    if not fits or given.shape[1] not in layers or given.shape[2] != k:
        expected = f"integers [{n} or {n - 1} tokens, {layers[0]} or {layers[1]} layers, {k}]"
        raise ValueError(f"experts of request {request}: expected {expected}, got {given.dtype} {list(given.shape)}")
    rows = given[:, given.shape[1] - config.n_main_moe_layers :]  # dense layers come first
    if rows.size and not -1 <= rows.min() <= rows.max() < none:
        raise ValueError(f"experts of request {request}: expected -1..{none - 1}, got {rows.min()}..{rows.max()}")
    rows = rows.astype(np.int64)
    low_first = np.sort(rows, axis=-1)
    repeated = (low_first[..., 1:] == low_first[..., :-1]).any(axis=-1)
    wrong = (low_first[..., -1] >= 0) & (repeated | (low_first[..., 0] < 0))
    if wrong.any():
        got = rows[wrong][0].tolist()
        raise ValueError(f"experts of request {request}: expected {k} different ones of a token, or -1 for all, got {got}")
    experts = np.full((n, config.n_moe_layers, config.num_experts_per_tok), none, expert_dtype(none))
    experts[: len(rows), : config.n_main_moe_layers] = np.where(rows < 0, none, rows)
    unknown = np.full(experts.shape, np.nan, np.float16)
    return Choices(experts, unknown, unknown[..., 0], None, None)
