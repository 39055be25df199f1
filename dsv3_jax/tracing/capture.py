"""A model's routing of a text, pass by pass; and passes whose tokens go to the experts of a trace instead of their own.

Every pass takes experts to use, with none where the router is free: a pass and its replay are one compiled program, and give
bitwise the same numbers on the same mesh and batch. Gates are always the router's own, so that its gradient is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.score import Supply, check_tokens, final_norm, hidden_layer, run_layer, score_context
from dsv3_jax.model.mtp import all_layers, module, mtp_forward
from dsv3_jax.model.transformer import block, forward, make_context
from dsv3_jax.moe.router import SELECTORS, Routing, group_limited
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.tracing.store import Choices, RoutingTrace, Text, Writer, about_model, expert_dtype

SHORTEST = 16  # tokens that a pass is compiled for; then powers of two


class Batch(NamedTuple):
    """Sequences of one pass, which has `rows` of `length` tokens: shorter ones are padded behind, where nobody sees it."""

    sequences: tuple[int, ...]
    rows: int
    length: int


def batches(text: Text, batch_tokens: int, ranks: int = 1) -> list[Batch]:
    """Sequences of about the same length together, about `batch_tokens` in a pass, or all of them where they are fewer; as many
    rows for each of `ranks`, at least one; a few shapes, and in order."""
    lengths = 1 << np.ceil(np.log2(np.maximum(text.lengths, SHORTEST))).astype(np.int64)
    found = []
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        rows = ranks * min(max(1, batch_tokens // (length * ranks)), -(-len(members) // ranks))
        found += [Batch(tuple(members[i : i + rows].tolist()), rows, length) for i in range(0, len(members), rows)]
    return found


def tokens_of(text: Text, batch: Batch) -> Int[np.ndarray, "B T"]:
    rows = np.zeros((batch.rows, batch.length), np.int32)
    for row, i in zip(rows, batch.sequences, strict=False):
        ids = text.tokens_N[text.sequence(i)]
        row[: len(ids)] = ids
    return rows


def forced_by(trace: RoutingTrace, batch: Batch) -> Int[np.ndarray, "L B T K"]:
    """The trace's experts of a batch; none, which leaves the router free, for padding. Raises ValueError for damaged ones."""
    about = trace.about
    forced = np.full((batch.rows, batch.length, len(about.layers), about.top_k), about.n_experts, np.int32)
    for row, i in zip(forced, batch.sequences, strict=False):
        place = trace.text.sequence(i)
        row[: place.stop - place.start] = trace.experts_of(place)
    return np.ascontiguousarray(forced.transpose(2, 0, 1, 3))


class Pass(NamedTuple):
    """Of one batch; on the device. Rows of MTP modules that have no token to look ahead at hold what means nothing."""

    hidden_BTD: Float[Array, "B T D"]  # of the main model, after the final norm
    layers: Any  # _Kept, stacked [L, ...]


class _Kept(NamedTuple):
    """Arrays [B, T, ...], in the order of `Choices`."""

    experts: Any
    gates: Any
    margins: Any
    groups: Any
    scores: Any


@runtime_checkable
class Tracer(Protocol):
    """Runs a model over batches of tokens."""

    @property
    def config(self) -> ModelConfig:
        """What is computed."""

    @property
    def ranks(self) -> int:
        """Among which a batch's rows are divided."""

    def run(self, tokens_BT: Int[np.ndarray, "B T"], forced_LBTK: Int[np.ndarray, "L B T K"] | None = None) -> Pass:
        """One pass; `forced_LBTK`: experts to use, E for the router's own choice; None: that everywhere."""


@dataclass(frozen=True)
class Whole:
    """A model in memory, all layers in one program."""

    params: Any
    bias_LE: Float[Array, "L E"]
    config: ModelConfig
    scores: bool = False
    ranks: int = 1

    def run(self, tokens_BT: Int[np.ndarray, "B T"], forced_LBTK: Int[np.ndarray, "L B T K"] | None = None) -> Pass:
        forced = _free(self.config, tokens_BT.shape) if forced_LBTK is None else forced_LBTK
        return _whole(self.config, self.scores)(self.params, self.bias_LE, tokens_BT, forced)


@dataclass(frozen=True)
class ByLayer:
    """A model that is read a layer at a time; what has to fit is one layer, and one batch's activations."""

    supply: Supply
    scores: bool = False

    @property
    def config(self) -> ModelConfig:
        return self.supply.config

    @property
    def ranks(self) -> int:
        return self.supply.placement.batch_ranks if self.supply.placement else 1

    def run(self, tokens_BT: Int[np.ndarray, "B T"], forced_LBTK: Int[np.ndarray, "L B T K"] | None = None) -> Pass:
        supply, config = self.supply, self.supply.config
        forced = iter(_free(config, tokens_BT.shape) if forced_LBTK is None else forced_LBTK)
        kept, one = [], _with_scores if self.scores else _without_scores
        x_BTD = jnp.asarray(supply.embedding(tokens_BT), jnp.dtype(config.compute_dtype))
        for params, bias_E in supply.layers():
            if bias_E is None:
                x_BTD = run_layer(hidden_layer, params, bias_E, x_BTD, supply=supply)
            else:
                found = run_layer(one.block, params, bias_E, x_BTD, jnp.asarray(next(forced)), supply=supply)
                x_BTD = found.x_BTD
                kept.append(found.kept)
            jax.block_until_ready(x_BTD)
            del params  # before the next layer is read
        normed_BTD = hidden_BTD = final_norm(x_BTD, supply)
        if config.mtp_hidden != "post_norm":
            hidden_BTD = x_BTD
        for k, (params, bias_E) in enumerate(supply.depths(), 1):
            shifted = jnp.asarray(supply.embedding(np.pad(tokens_BT, ((0, 0), (0, k)))[:, k:]), hidden_BTD.dtype)
            found = run_layer(one.depth, params, bias_E, hidden_BTD, shifted, jnp.asarray(next(forced)), supply=supply)
            kept.append(found.kept)
            hidden_BTD = found.x_BTD if config.mtp_hidden != "post_norm" else final_norm(found.x_BTD, supply, params["norm"])
        return Pass(
            normed_BTD, jax.tree.map(lambda *rows: np.stack([np.asarray(row) for row in rows]), *kept) if kept else None
        )


def _free(config: ModelConfig, shape: tuple[int, ...]) -> np.ndarray:
    return np.full((config.n_moe_layers, *shape, config.num_experts_per_tok), config.n_routed_experts, np.int32)


@cache
def _whole(config: ModelConfig, scores: bool) -> Any:
    n_main = config.n_main_moe_layers

    def summary(routing: Routing, bias_E: Array) -> _Kept:
        return _kept(routing, bias_E, config, scores)

    @jax.jit
    def run(params: Any, bias_LE: Array, tokens_BT: Array, forced_LBTK: Array) -> Pass:
        context = make_context(jnp.ones(tokens_BT.shape, jnp.int32), config, cross_document=True)
        main = forward(
            params, bias_LE, tokens_BT, context, config, extras=bias_LE[:n_main], forced_LBTK=forced_LBTK[:n_main],
            summary=summary,
        )  # fmt: skip
        depths = []
        if config.num_nextn_predict_layers:
            depths = mtp_forward(
                params, bias_LE, tokens_BT, main, context, config, extras=bias_LE[n_main:], forced_LBTK=forced_LBTK[n_main:],
                summary=summary,
            )  # fmt: skip
        return Pass(main.normed_BTD, all_layers(main, depths))

    return run


def has_groups(config: ModelConfig) -> bool:
    return SELECTORS.get(config.topk_method) is group_limited and config.topk_group < config.n_group


def _kept(routing: Routing, bias_E: Array, config: ModelConfig, scores: bool) -> _Kept:
    """In as few bits as a trace has. The groups are those that the router kept, also where it was not free."""
    half, groups = jnp.float16, None
    if has_groups(config):
        eligible = group_limited(routing.scores + bias_E.reshape((1,) * (routing.scores.ndim - 1) + (-1,)), config)
        kept = (eligible.reshape(*eligible.shape[:-1], config.n_group, -1) > -jnp.inf).any(axis=-1)
        bit = jnp.left_shift(jnp.uint32(1), jnp.arange(config.n_group, dtype=jnp.uint32))
        groups = jnp.where(kept, bit.reshape((1,) * (kept.ndim - 1) + (-1,)), jnp.uint32(0)).sum(axis=-1, dtype=jnp.uint32)
        groups = groups.astype(np.min_scalar_type(2**config.n_group - 1))
    experts = routing.indices.astype(expert_dtype(config.n_routed_experts))
    each = routing.scores.astype(half) if scores else None
    return _Kept(experts, routing.gates.astype(half), routing.margin.astype(half), groups, each)


class _Layer(NamedTuple):
    x_BTD: Array
    kept: _Kept | None


class _OneLayer:
    """The functions of one layer: always the same two objects, by which compiled programs are found again."""

    def __init__(self, scores: bool) -> None:
        def one_block(
            params: Any, bias_E: Array, x_BTD: Array, forced_BTK: Array, config: ModelConfig, placement: Placement | None
        ) -> _Layer:
            context = score_context(x_BTD, config, placement)
            x_BTD, routing = block(params, bias_E, x_BTD, context, config, forced_BTK)
            assert routing is not None
            return _Layer(x_BTD, _kept(routing, bias_E, config, scores))

        def one_depth(
            params: Any, bias_E: Array, x_BTD: Array, ahead_BTD: Array, forced_BTK: Array, config: ModelConfig,
            placement: Placement | None,
        ) -> _Layer:  # fmt: skip
            context = score_context(x_BTD, config, placement)
            x_BTD, routing = module(params, bias_E, x_BTD, ahead_BTD, context, config, forced_BTK)
            return _Layer(x_BTD, _kept(routing, bias_E, config, scores))

        self.block, self.depth = one_block, one_depth


_with_scores, _without_scores = _OneLayer(True), _OneLayer(False)


def choices_of(found: Pass, text: Text, batch: Batch, config: ModelConfig) -> list[Choices]:
    """By sequence; MTP's last rows, which have nothing to look ahead at, are none."""
    none = _Kept(config.n_routed_experts, 0, np.nan, 0, np.nan)
    arrays: Any = [None if x is None else np.asarray(x) for x in found.layers]
    result = []
    for row, i in enumerate(batch.sequences):
        n = int(text.lengths[i])
        own: Any = [None if x is None else np.moveaxis(x[:, row, :n], 0, 1).copy() for x in arrays]
        for k in range(1, config.num_nextn_predict_layers + 1):
            for x, empty in zip(own, none, strict=True):
                if x is not None:
                    x[max(0, n - k) :, config.n_main_moe_layers + k - 1] = empty
        result.append(Choices(*own))
    return result


def trace(
    tracer: Tracer, text: Text, writer: Writer, batch_tokens: int, forced: RoutingTrace | None = None, *, progress: bool = False
) -> None:
    """Runs what is left of the text, and finishes the writer's trace; `forced` must be of the same text.

    Raises ValueError for tokens that the model does not have, damaged experts to use, and for a trace begun in other batches.
    """
    check_tokens(np.asarray(text.tokens_N)[None], tracer.config)
    todo = batches(text, batch_tokens, tracer.ranks)
    done = sum(int(text.lengths[list(batch.sequences)].sum()) for batch in todo[: writer.done])
    if writer.done > len(todo) or writer.written != done:
        begun = f"{writer.written} tokens in {writer.done} batches"
        raise ValueError(
            f"--out: expected {done} tokens in the first {writer.done} of {len(todo)} batches, got {begun}; remove it"
        )
    with tqdm(total=len(text.tokens_N), desc="tokens", unit="token", disable=not progress, dynamic_ncols=True) as bar:
        for number, batch in enumerate(todo):
            places = [text.sequence(i) for i in batch.sequences]
            if number >= writer.done:
                experts = None if forced is None else forced_by(forced, batch)
                found = tracer.run(tokens_of(text, batch), experts)
                writer.write(places, choices_of(found, text, batch, tracer.config))
            bar.update(sum(place.stop - place.start for place in places))
    writer.finish()


def replayed(tracer: Tracer, forced: RoutingTrace, batch_tokens: int | None = None) -> Iterator[tuple[Batch, Pass]]:
    """Passes over a trace's text, forced to its experts. With the trace's own `batch_tokens`, tracer and mesh they are bitwise
    the passes that it was made by. Raises ValueError for a trace of another architecture."""
    check_replay(forced, tracer.config)
    for batch in batches(forced.text, batch_tokens or forced.about.batch_tokens, tracer.ranks):
        yield batch, tracer.run(tokens_of(forced.text, batch), forced_by(forced, batch))


def check_replay(forced: RoutingTrace, config: ModelConfig, model: str | None = None) -> None:
    """Raises ValueError, one line, for a trace of another architecture, or, where `model` is given, of other weights."""
    about = forced.about
    ours = about_model(config, model="", tokenizer=None, domains=(), source="", batch_tokens=0, how={})
    if about.architecture != ours.architecture:
        names = sorted(n for n in ours.config if n in about.config and ours.config[n] != about.config[n])
        said = "; ".join(f"{n} {about.config[n]!r}, not {ours.config[n]!r}" for n in names[:3]) or "other fields"
        raise ValueError(f"--replay: expected a trace of this model's architecture, got one with {said}")
    if model is not None and about.model != model:
        raise ValueError("--replay: the trace is of other weights of this architecture; --other_model lets it be")
