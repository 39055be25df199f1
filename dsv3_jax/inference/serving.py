"""A model laid out for decoding: every layer by itself and, where they are few, every expert by itself.

A step that decodes reads each weight once, so it must not be copied first. XLA on CPU copies what it slices out of a stack, and
does not copy the operands of the branch that `lax.switch` takes: experts that are arrays of their own are multiplied where they
lie. On accelerators slices are read in place, and experts stay stacked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import Leaf, leaves
from dsv3_jax.interop.read import Dtype, load_bias, read_tree
from dsv3_jax.model.transformer import head_name
from dsv3_jax.weights import is_stored, to_int4, to_int8

# Above so many experts in all layers, every one a branch in the program, it would compile for too long.
MOST_APART = 1024


class Layer(NamedTuple):
    """One block."""

    params: Any
    bias_E: Any  # its row of the router bias; None: a dense layer


class Module(NamedTuple):
    """One MTP module: what joins its inputs, its final norm, and its block."""

    params: Any
    block: Any  # Layer, or a Stack of one


class Serving(NamedTuple):
    """Parameters for decoding. `layers`: of Layer, or on a mesh of `sharded.Stack`; `depths`: of Module, a chain."""

    embed_tokens: Any
    norm: Any
    lm_head: Any
    layers: tuple[Any, ...]
    depths: tuple[Any, ...]


# Products of the same input, one matrix side by side: names joined by `+`.
JOINED = (("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))


def joined(params: Mapping[str, Any], names: Sequence[str], x: Array) -> Array:
    """x times several matrices [in, out], their results side by side, whether they were laid out so or not."""
    one = "+".join(names)
    weights = [params[one]] if one in params else [params[name] for name in names]
    products = [x @ weight.astype(x.dtype) for weight in weights]
    return products[0] if one in params else jnp.concatenate(products, axis=-1)


def experts_apart(config: ModelConfig) -> bool:
    return jax.default_backend() == "cpu" and config.n_moe_layers * config.n_routed_experts <= MOST_APART


def from_params(params: Any, bias_LE: Array, config: ModelConfig) -> Serving:
    """From whole parameters, which are copied: the caller may let go of them."""

    def layer(name: str, i: int) -> Any:
        return _experts_apart(jax.tree.map(lambda a: a[i], params[name]), config)

    layers, depths = _assembled(layer, bias_LE, config)
    return Serving(params["embed_tokens"], params["norm"], params[head_name(config)], layers, depths)


def _assembled(
    layer: Callable[[str, int], Any], bias_LE: Array, config: ModelConfig
) -> tuple[tuple[Layer, ...], tuple[Module, ...]]:
    """The main model's layers and the MTP modules, from `layer(stack, i)`: the i-th of a stack of the parameter tree."""
    main = config.n_main_moe_layers
    dense = (Layer(_laid_out(layer("dense_layers", i), config), None) for i in range(config.n_dense_layers))
    sparse = (Layer(_laid_out(layer("moe_layers", i), config), bias_LE[i]) for i in range(main))

    def module(k: int) -> Module:
        params = layer("mtp", k)
        return Module(params, Layer(_laid_out(params.pop("block"), config), bias_LE[main + k]))

    return (*dense, *sparse), tuple(map(module, range(config.num_nextn_predict_layers)))


def attention_laid_out(attention: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """One attention's parameters with two sides a matrix, and for MLA what absorbs instead of the key-value projection."""
    attention = dict(attention)
    if config.attention == "mla":
        # Absorbed, k_up turns a head's query into the latent's space, v_up a sum of latents into its value.
        kv_b_CHD = attention.pop("kv_b_proj").astype(jnp.dtype(config.compute_dtype))
        k_CHD, v_CHW = jnp.split(kv_b_CHD, [config.qk_nope_head_dim], axis=-1)
        attention |= {"k_up": k_CHD.transpose(1, 2, 0), "v_up": v_CHW.transpose(1, 0, 2)}
        for name in ("q_b_proj", "q_proj"):
            if name in attention:
                attention[name] = _flat(attention[name], 1)
    attention["o_proj"] = _flat(attention["o_proj"], 2)
    return attention


def _laid_out(layer: Any, config: ModelConfig) -> Any:
    """A block's parameters as the decoding step multiplies with them: nothing to be turned over."""
    attention, mlp = attention_laid_out(layer["self_attn"], config), dict(layer["mlp"])
    if "experts" in mlp:
        if experts_apart(config):
            each = zip(*(mlp["experts"][name] for name in ("gate_proj", "up_proj", "down_proj")), strict=True)
            experts = [_joined_matrices(dict(zip(("gate_proj", "up_proj", "down_proj"), own, strict=True))) for own in each]
            mlp["experts"] = {name: tuple(expert[name] for expert in experts) for name in experts[0]}
        if "shared_experts" in mlp:
            mlp["shared_experts"] = _joined_matrices(mlp["shared_experts"])
    else:
        mlp = _joined_matrices(mlp)
    return {**layer, "self_attn": _joined_matrices(attention), "mlp": mlp}


def _flat(weight: Any, n_in: int) -> Any:
    """Two sides. A stored weight has them inside."""
    if is_stored(weight):
        return replace(weight, sides=weight.values.shape[-2:])
    return weight.reshape(math.prod(weight.shape[:n_in]), math.prod(weight.shape[n_in:]))


def _joined_matrices(params: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(params)
    for names in JOINED:
        if all(name in result and not is_stored(result[name]) for name in names):
            result["+".join(names)] = jnp.concatenate([result.pop(name) for name in names], axis=-1)
    return result


def _experts_apart(layer: Any, config: ModelConfig) -> Any:
    """A layer's experts as tuples of arrays."""

    def split(path: Any, leaf: Any) -> Any:
        if not any(getattr(key, "key", None) == "experts" for key in path):
            return leaf
        return tuple(jax.tree.map(lambda a, e=e: a[e], leaf) for e in range(config.n_routed_experts))

    return jax.tree_util.tree_map_with_path(split, layer, is_leaf=is_stored) if experts_apart(config) else layer


def read(source: Tensors, config: ModelConfig, dtype: Dtype, *, keep_fp8: bool = False) -> Serving:
    """Straight from a folder: no array is held twice."""
    tree, bias = leaves(config), load_bias(source, config)

    def tensors(leaf: Any) -> Any:
        return read_tree(source, leaf, dtype, keep_fp8=keep_fp8)

    def one(leaf: Leaf) -> Any:
        if "experts" in leaf.spec.axes and experts_apart(config):
            return tuple(tensors(leaf.at_expert(e)) for e in range(config.n_routed_experts))
        return tensors(leaf)

    def layer(name: str, i: int) -> Any:
        return jax.tree.map(lambda leaf: one(leaf.at_layer(i)), tree[name])

    layers, depths = _assembled(layer, bias, config)
    embed, norm = tensors(tree["embed_tokens"]), tensors(tree["norm"])
    head = embed if config.tie_word_embeddings else tensors(tree["lm_head"])
    return Serving(embed, norm, head, layers, depths)


Bits = Literal["int8", "int4"]


def quantised(model: Serving, bits: Bits) -> Serving:
    """Weight-only quantisation for serving: every matrix that a step multiplies with, but for the router's, the MTP modules'
    joining projection and k_up, v_up, which stay as they are; so does the embedding table, which is looked up.

    int8 has a scale for each output channel, int4 one for each 64 inputs of it. Products stay in the compute dtype.
    Raises ValueError for other bits, and for a model on a mesh.
    """
    if bits not in get_args(Bits):
        raise ValueError(f"quantise: expected one of {', '.join(get_args(Bits))}, got {bits!r}")
    if not all(isinstance(layer, Layer) for layer in model.layers):
        raise ValueError("quantise: expected a model on one device, got one on a mesh")
    convert = jax.jit(to_int8 if bits == "int8" else to_int4, static_argnums=1)

    def matrix(path: Any, leaf: Any) -> Any:
        name = next((key.key for key in reversed(path) if hasattr(key, "key")), "")
        kept = name in ("gate", "k_up", "v_up") or is_stored(leaf) or leaf.ndim < 2
        return leaf if kept else convert(leaf, -2)

    def block(layer: Layer) -> Layer:
        return layer._replace(params=jax.tree_util.tree_map_with_path(matrix, layer.params, is_leaf=is_stored))

    layers, depths = tuple(map(block, model.layers)), tuple(m._replace(block=block(m.block)) for m in model.depths)
    return model._replace(lm_head=convert(model.lm_head, -1), layers=layers, depths=depths)


class LogitError(NamedTuple):
    """What rounding the weights did to the logits: root mean square, relative to the logits' own, and the largest."""

    rms: float
    largest: float


def error_of(logits: Float[np.ndarray, "*batch V"], exact: Float[np.ndarray, "*batch V"]) -> LogitError:
    error = np.asarray(logits, np.float64) - np.asarray(exact, np.float64)
    return LogitError(
        float(np.sqrt((error**2).mean() / (np.asarray(exact, np.float64) ** 2).mean())), float(np.abs(error).max())
    )
