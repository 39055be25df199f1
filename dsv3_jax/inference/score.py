"""Scores of given tokens, layer by layer: logits, MTP logits [§2.2], and what every router chose [§2.1.2].

A model is met here as a supply of layers, whole in memory or read from disk one at a time: one layer and the activations are
all that has to fit, on one device or on a mesh. Both supplies run the same compiled program, and so give the same numbers.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import leaves
from dsv3_jax.interop.read import Dtype, as_float, cuts_matrices, load_bias, read_tree
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mtp import module
from dsv3_jax.model.transformer import block, head_name, make_context
from dsv3_jax.moe.router import Routing
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.weights import bits_on_cpu, is_stored

HEAD_ELEMENTS = 2**22  # of the output head at a time


class Scores(NamedTuple):
    """Arrays of the host. L MoE layers of the main model, ascending; depth k of MTP in row k - 1.

    Row i of depth k is fed by positions i and i + k and predicts token i + k + 1; its last k rows have no input: NaN, or -1.
    """

    logits: Float[np.ndarray, "B T V"]
    hidden: Float[np.ndarray, "B T D"]  # after the final norm
    router_indices: Int[np.ndarray, "L B T K"]  # by descending biased score, ties to the lower id
    router_weights: Float[np.ndarray, "L B T K"]  # gates, aligned with the indices
    mtp_logits: Float[np.ndarray, "M B T V"] | None
    mtp_router_indices: Int[np.ndarray, "M B T K"] | None


@runtime_checkable
class Supply(Protocol):
    """A model's parts, one after the other."""

    @property
    def config(self) -> ModelConfig:
        """What is computed."""

    @property
    def placement(self) -> Placement | None:
        """On which devices; None: one."""

    def embedding(self, tokens: Int[np.ndarray, "B T"]) -> np.ndarray:
        """Rows of the embedding table."""

    def layers(self) -> Iterator[tuple[Any, Any]]:
        """(parameters, row of the router bias or None) of the main model's layers."""

    def depths(self) -> Iterator[tuple[Any, Any]]:
        """The same of the MTP modules."""

    def gain(self) -> Array:
        """The final norm's."""

    def head(self) -> Iterator[Any]:
        """The output head, some rows [v, D] at a time."""


class InMemory:
    """A supply from whole parameters."""

    def __init__(self, params: Any, bias_LE: Array, config: ModelConfig):
        self.config, self.placement, self._params, self._bias = config, None, params, bias_LE

    def embedding(self, tokens: Int[np.ndarray, "B T"]) -> np.ndarray:
        return np.asarray(self._params["embed_tokens"][tokens])

    def _stack(self, name: str, n: int, first_row: int | None) -> Iterator[tuple[Any, Any]]:
        for i in range(n):
            yield _layer_of(self._params[name], i), None if first_row is None else self._bias[first_row + i]

    def layers(self) -> Iterator[tuple[Any, Any]]:
        yield from self._stack("dense_layers", self.config.n_dense_layers, None)
        yield from self._stack("moe_layers", self.config.n_main_moe_layers, 0)

    def depths(self) -> Iterator[tuple[Any, Any]]:
        yield from self._stack("mtp", self.config.num_nextn_predict_layers, self.config.n_main_moe_layers)

    def gain(self) -> Array:
        return self._params["norm"]

    def head(self) -> Iterator[Any]:
        table = self._params[head_name(self.config)]
        for rows in _head_rows(table.shape):
            yield table[rows]


class Streamed:
    """A supply from a folder; on a mesh every device reads its slice.

    FP8 stays FP8, unless the mesh cuts within matrices; everything else is read as `dtype`. Raises ValueError for such a mesh
    if the model is to round activations, for which weights have to stay as they are stored.
    """

    def __init__(self, source: Tensors, config: ModelConfig, dtype: Dtype, placement: Placement | None = None):
        self.config, self.placement, self._source, self._dtype = config, placement, source, dtype
        self._leaves = leaves(config)
        self._bias = load_bias(source, config, placement)
        self._keep_fp8 = placement is None or not cuts_matrices(placement)
        if config.fp8 and not self._keep_fp8:
            raise ValueError("--fp8: expected a layout that only divides experts, got one that cuts matrices; leave one out")

    def embedding(self, tokens: Int[np.ndarray, "B T"]) -> np.ndarray:
        rows = self._source.tensor(self._leaves["embed_tokens"].template)[tokens]
        return as_float(rows, np.dtype(jnp.dtype(self.config.compute_dtype)))

    def _stack(self, name: str, n: int, first_row: int | None) -> Iterator[tuple[Any, Any]]:
        for i in range(n):
            tree = jax.tree.map(lambda leaf, i=i: leaf.at_layer(i), self._leaves[name])
            row = None if first_row is None else self._bias[first_row + i]
            # Not by a name of its own, which would keep it alive while the next one is read.
            yield read_tree(self._source, tree, self._dtype, keep_fp8=self._keep_fp8, placement=self.placement), row

    def layers(self) -> Iterator[tuple[Any, Any]]:
        yield from self._stack("dense_layers", self.config.n_dense_layers, None)
        yield from self._stack("moe_layers", self.config.n_main_moe_layers, 0)

    def depths(self) -> Iterator[tuple[Any, Any]]:
        yield from self._stack("mtp", self.config.num_nextn_predict_layers, self.config.n_main_moe_layers)

    def gain(self) -> Array:
        return read_tree(self._source, self._leaves["norm"], self._dtype, placement=self.placement)

    def head(self) -> Iterator[Any]:
        table = self._source.tensor(self._leaves[head_name(self.config)].template)
        for rows in _head_rows(table.shape):
            yield as_float(table[rows], np.dtype(jnp.dtype(self.config.compute_dtype)))


@jax.jit
def _layer_of(stack: Any, i: Any) -> Any:
    return jax.tree.map(lambda a: a[i], stack)


def _head_rows(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, HEAD_ELEMENTS // shape[1])
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


class _Layer(NamedTuple):
    x_BTD: Array
    indices_BTK: Array | None
    gates_BTK: Array | None


def _kept(x_BTD: Array, routing: Routing | None) -> _Layer:
    return _Layer(x_BTD, None, None) if routing is None else _Layer(x_BTD, routing.indices, routing.gates)


def _block(params: Any, bias_E: Any, x_BTD: Array, config: ModelConfig, placement: Placement | None) -> _Layer:
    return _kept(*block(params, bias_E, x_BTD, score_context(x_BTD, config, placement), config))


def _depth(
    params: Any, bias_E: Array, x_BTD: Array, embedding_BTD: Array, config: ModelConfig, placement: Placement | None
) -> _Layer:
    return _kept(*module(params, bias_E, x_BTD, embedding_BTD, score_context(x_BTD, config, placement), config))


def score_context(x_BTD: Array, config: ModelConfig, placement: Placement | None) -> Any:
    segments = jnp.ones(x_BTD.shape[:2], jnp.int32)
    return make_context(segments, config, cross_document=True, placement=placement)


@lru_cache(maxsize=16)
def _compiled(
    function: Callable[..., Any], config: ModelConfig, placement: Placement | None, n_inputs: int, stored: Any
) -> Callable[..., Any]:
    local = partial(function, config=config, placement=placement)
    if placement is None:
        return jax.jit(local)
    rows, (tree, specs) = PartitionSpec(placement.batch_axes), stored
    in_specs = (jax.tree.unflatten(tree, specs), PartitionSpec(), *(rows for _ in range(n_inputs)))
    return jax.jit(jax.shard_map(local, mesh=placement.mesh, in_specs=in_specs, out_specs=rows))


def hidden_layer(params: Any, bias_E: Any, x_BTD: Array, config: ModelConfig, placement: Placement | None) -> Array:
    """For `run_layer`: a block of which nothing but the hidden states is wanted."""
    return block(params, bias_E, x_BTD, score_context(x_BTD, config, placement), config)[0]


def run_layer(function: Callable[..., Any], params: Any, bias_E: Any, *inputs: Array, supply: Supply) -> Any:
    """One layer; on a mesh each device computes its own sequences."""
    stored = None
    if supply.placement is None:
        params = _experts_as_bits(params)
    else:
        weights, tree = jax.tree.flatten(params, is_leaf=is_stored)
        stored = tree, tuple(jax.tree.leaves(w)[0].sharding.spec for w in weights)  # values and scales lie alike
    return _compiled(function, supply.config, supply.placement, len(inputs), stored)(params, bias_E, *inputs)


def _experts_as_bits(params: Any) -> Any:
    """Else a layer of narrow floats would be copied on CPU, and with it the most that memory must hold."""

    def part(path: Any, leaf: Array) -> Any:
        return bits_on_cpu(leaf) if any(getattr(key, "key", None) == "experts" for key in path) else leaf

    return jax.tree_util.tree_map_with_path(part, params)


def final_norm(x_BTD: Array, supply: Supply, gain: Array | None = None) -> Array:
    """With the main model's gain, or an MTP module's."""
    return _norm(x_BTD, supply.gain() if gain is None else gain, supply.config.rms_norm_eps)


@partial(jax.jit, static_argnames=("eps",))
def _norm(x: Array, gain: Array, eps: float) -> Array:
    return rms_norm(x, gain, eps)


@jax.jit
def _project(normed_BTD: Array, rows_VD: Array) -> Array:
    return jnp.einsum("btd,vd->btv", normed_BTD, rows_VD.astype(normed_BTD.dtype), preferred_element_type=jnp.float32)


def _logits(supply: Supply, normed_BTD: Array, out_BTV: np.ndarray) -> None:
    start = 0
    for rows in supply.head():
        out_BTV[..., start : start + len(rows)] = _project(normed_BTD, jnp.asarray(rows))
        start += len(rows)


def score(supply: Supply, tokens: Int[np.ndarray, "B T"], *, progress: bool = False) -> Scores:
    """Everything that the model says of `tokens`, positions from 0 in every row.

    On a mesh the rows are divided among its ranks; as many as are missing are added, and left out of the result.
    Raises ValueError if a token is not of the vocabulary.
    """
    config, placement = supply.config, supply.placement
    check_tokens(tokens, config)
    n_rows = len(tokens)
    ranks = placement.batch_ranks if placement else 1
    tokens = np.pad(np.asarray(tokens, np.int32), ((0, -n_rows % ranks), (0, 0)))
    batch, length = tokens.shape
    depth, dtype = config.num_nextn_predict_layers, jnp.dtype(config.compute_dtype)
    indices, gates = [], []
    bar = tqdm(total=config.num_hidden_layers + depth, desc="layers", unit="layer", disable=not progress, dynamic_ncols=True)
    with bar:
        x_BTD = jnp.asarray(supply.embedding(tokens), dtype)
        for params, bias_E in supply.layers():
            layer = run_layer(_block, params, bias_E, x_BTD, supply=supply)
            x_BTD = jax.block_until_ready(layer.x_BTD)
            del params  # before the next layer is read
            if layer.indices_BTK is not None:
                indices.append(np.asarray(layer.indices_BTK))
                gates.append(np.asarray(layer.gates_BTK))
            bar.update()
        normed_BTD = final_norm(x_BTD, supply)
        logits = np.empty((batch, length, config.vocab_size), np.float32)
        _logits(supply, normed_BTD, logits)
        shape = (0, batch, length, config.num_experts_per_tok)
        result = Scores(
            logits[:n_rows],
            np.asarray(normed_BTD, np.float32)[:n_rows],
            np.stack(indices)[:, :n_rows].astype(np.int32) if indices else np.zeros(shape, np.int32)[:, :n_rows],
            np.stack(gates)[:, :n_rows] if gates else np.zeros(shape, np.float32)[:, :n_rows],
            None,
            None,
        )
        if depth:
            hidden = normed_BTD if config.mtp_hidden == "post_norm" else x_BTD
            result = _with_depths(supply, tokens, hidden, result, bar)
    return result


def _with_depths(supply: Supply, tokens: np.ndarray, hidden_BTD: Array, main: Scores, bar: Any) -> Scores:
    config, (batch, length) = supply.config, tokens.shape
    depth, n_rows = config.num_nextn_predict_layers, len(main.logits)
    logits = np.full((depth, batch, length, config.vocab_size), np.nan, np.float32)
    indices = np.full((depth, batch, length, config.num_experts_per_tok), -1, np.int32)
    for k, (params, bias_E) in enumerate(supply.depths(), 1):
        assert bias_E is not None
        shifted = np.pad(tokens, ((0, 0), (0, k)))[:, k:]
        embedding_BTD = jnp.asarray(supply.embedding(shifted), hidden_BTD.dtype)
        layer = run_layer(_depth, params, bias_E, hidden_BTD, embedding_BTD, supply=supply)
        normed_BTD = final_norm(layer.x_BTD, supply, params["norm"])
        hidden_BTD = normed_BTD if config.mtp_hidden == "post_norm" else layer.x_BTD
        del params
        _logits(supply, normed_BTD, logits[k - 1])
        indices[k - 1] = np.asarray(layer.indices_BTK)
        used = max(0, length - k)
        logits[k - 1, :, used:], indices[k - 1, :, used:] = np.nan, -1
        bar.update()
    return main._replace(mtp_logits=logits[:, :n_rows], mtp_router_indices=indices[:, :n_rows])


def mapped_array(path: Path, flag: str) -> np.ndarray:
    """The array of an .npy file that `flag` names. Raises ValueError, one line, if it is none."""
    try:
        return np.lib.format.open_memmap(path, mode="r")  # allocates nothing that a header promises; no archives, no pickles
    except FileNotFoundError:
        raise ValueError(f"{flag}: no file {path}") from None
    except Exception as error:  # a damaged header is read as Python, and raises whatever the parser, mmap or dtype raise
        raise ValueError(f"{flag}: {path} is no .npy file: {' '.join(str(error).split())[:200]}") from None


def check_tokens(tokens: Any, config: ModelConfig) -> None:
    """Raises ValueError, one line, if this is no batch of token ids of the model."""
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise ValueError(f"tokens: expected integers [batch, seq], got {got}")
    if 0 in tokens.shape:
        raise ValueError(f"tokens: expected at least one token, got {list(tokens.shape)}")
    outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"tokens: expected 0..{config.vocab_size - 1}, got {outside[0]}")


def write_scores(path: Path, scores: Scores) -> None:
    """One .npz, whole or not at all; what the model does not have is left out."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            arrays: dict[str, Any] = {name: value for name, value in scores._asdict().items() if value is not None}
            np.savez(file, **arrays)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
