"""A model laid out for decoding: every layer by itself and, where they are few, every expert by itself.

A step that decodes reads each weight once, so it must not be copied first. XLA on CPU copies what it slices out of a stack, and
does not copy the operands of the branch that `lax.switch` takes: experts that are arrays of their own are multiplied where they
lie. On accelerators slices are read in place, and experts stay stacked.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import Leaf, leaves
from dsv3_jax.interop.read import Dtype, load_bias, read_tree
from dsv3_jax.model.transformer import head_name
from dsv3_jax.weights import is_stored

# Above so many experts in all layers, every one a branch in the program, it would compile for too long.
MOST_APART = 1024


class Serving(NamedTuple):
    """Parameters for decoding: `layers` and MTP `depths` are tuples of (parameters, row of the router bias or None)."""

    embed_tokens: Any
    norm: Any
    lm_head: Any
    layers: tuple[Any, ...]
    depths: tuple[Any, ...]


def experts_apart(config: ModelConfig) -> bool:
    return jax.default_backend() == "cpu" and config.n_moe_layers * config.n_routed_experts <= MOST_APART


def from_params(params: Any, bias_LE: Array, config: ModelConfig) -> Serving:
    """From whole parameters, which are copied: the caller may let go of them."""

    def stack(name: str, n: int, first_row: int | None) -> Iterator[Any]:
        for i in range(n):
            layer = jax.tree.map(lambda a, i=i: a[i], params[name])
            yield _apart(layer, config), None if first_row is None else bias_LE[first_row + i]

    main, depth = config.n_main_moe_layers, config.num_nextn_predict_layers
    layers = (*stack("dense_layers", config.n_dense_layers, None), *stack("moe_layers", main, 0))
    return Serving(params["embed_tokens"], params["norm"], params[head_name(config)], layers, tuple(stack("mtp", depth, main)))


def _apart(layer: Any, config: ModelConfig) -> Any:
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

    def stack(name: str, n: int, first_row: int | None) -> Iterator[Any]:
        for i in range(n):
            layer = jax.tree.map(lambda leaf, i=i: one(leaf.at_layer(i)), tree[name])
            yield layer, None if first_row is None else bias[first_row + i]

    main, depth = config.n_main_moe_layers, config.num_nextn_predict_layers
    layers = (*stack("dense_layers", config.n_dense_layers, None), *stack("moe_layers", main, 0))
    depths = tuple(stack("mtp", depth, main))
    embed, norm = tensors(tree["embed_tokens"]), tensors(tree["norm"])
    head = embed if config.tie_word_embeddings else tensors(tree["lm_head"])
    return Serving(embed, norm, head, layers, depths)
