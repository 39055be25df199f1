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
    """int32 [T, layers, K] of the main model's layers; -1 in dense ones, where there is a row for `all`."""
    main = [i for i, name in enumerate(trace.about.layers) if name.isdigit()]
    found = np.asarray(trace.choices.experts_NLK[trace.text.sequence(sequence)][:, main], np.int32)
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
    """Writes a trace of these requests: of each its `tokens`, integers [T], and `experts`, as above.

    Layers and last tokens that an engine left out are none; gates and margins are NaN.

    Raises ValueError, one line, for arrays that do not fit their tokens or the model.
    """
    if len(tokens) != len(experts) or not len(tokens):
        raise ValueError(f"experts: expected an array for each of {len(tokens)} requests, at least one, got {len(experts)}")
    labels = list(domains) if domains is not None else ["requests"] * len(tokens)
    if len(labels) != len(tokens):
        raise ValueError(f"domains: expected one for each of {len(tokens)} requests, got {len(labels)}")
    names = tuple(dict.fromkeys(labels))
    bounds, at = np.cumsum([0, *map(len, tokens)]), np.arange(len(tokens))
    ids = np.concatenate([np.asarray(t, np.int32) for t in tokens])
    text = Text(ids, bounds, at, np.array([names.index(label) for label in labels]), names)
    about = about_model(config, model=model, tokenizer=None, domains=names, source=source, batch_tokens=len(ids), how={})
    writer = Writer(folder, about, text)
    writer.write(
        [text.sequence(i) for i in at],
        [_choices(e, len(t), config, i) for i, (t, e) in enumerate(zip(tokens, experts, strict=True))],
    )
    writer.finish()


def _choices(given: Any, n: int, config: ModelConfig, request: int) -> Choices:
    given, none, k = np.asarray(given), config.n_routed_experts, config.num_experts_per_tok
    layers = config.n_main_moe_layers, config.num_hidden_layers
    fits = given.ndim == 3 and given.dtype.kind in "iu" and n - 1 <= len(given) <= n
    if not fits or given.shape[1] not in layers or given.shape[2] != k:
        expected = f"integers [{n} or {n - 1} tokens, {layers[0]} or {layers[1]} layers, {k}]"
        raise ValueError(f"experts of request {request}: expected {expected}, got {given.dtype} {list(given.shape)}")
    rows = given[:, -config.n_main_moe_layers :].astype(np.int64)  # dense layers come first
    if rows.size and (rows.min() < -1 or rows.max() >= none):
        raise ValueError(f"experts of request {request}: expected -1..{none - 1}, got {rows.min()}..{rows.max()}")
    experts = np.full((n, config.n_moe_layers, config.num_experts_per_tok), none, expert_dtype(none))
    experts[: len(rows), : config.n_main_moe_layers] = np.where(rows < 0, none, rows)
    unknown = np.full(experts.shape, np.nan, np.float16)
    return Choices(experts, unknown, unknown[..., 0], None, None)
