"""Our parameters and the released tensors: one table, for reading and for writing [released format].

A leaf of the parameter tree stacks layers, and a routed expert's leaf stacks experts too; a released tensor is one matrix of
them, (out, in) where ours is (in, out) with heads apart. MTP modules follow the main model's layers: by the configuration's
depth, never by a number.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.module import model_spec
from dsv3_jax.model.spec import Spec
from dsv3_jax.parallel.rules import map_specs

STACKS = ("layers", "experts")
TOP = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
MTP_NORM = "shared_head.norm"
BIAS = "model.layers.{layer}.mlp.gate.e_score_correction_bias"
SCALE = "_scale_inv"  # appended to a weight's name
# What every MTP module of a released checkpoint carries beside its own: copies of the main model's tables.
COPIES = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
# Buffers that older files store and nobody needs.
IGNORED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Leaf:
    """One parameter of ours and where its matrices are: `name(layer, expert)`, indices into the stacks it has."""

    path: str
    spec: Spec
    template: str
    first_layer: int

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes that count matrices: layers, experts, both or none."""
        return tuple(size for axis, size in zip(self.spec.axes, self.spec.shape, strict=True) if axis in STACKS)

    @property
    def sides(self) -> tuple[int, ...]:
        """Shape of one matrix, ours."""
        return self.spec.shape[len(self.stack) :]

    @property
    def n_in(self) -> int:
        """How many of the sides a product sums over; 0 for what is not transposed: a gain, or a table of the vocabulary."""
        axes = self.spec.axes[len(self.stack) :]
        if len(axes) == 1 or axes[0] == "vocab":
            return 0
        return 2 if axes[0] in ("heads", "kv_heads") else 1

    @property
    def released_shape(self) -> tuple[int, ...]:
        if self.n_in == 0:
            return self.sides
        return math.prod(self.sides[self.n_in :]), math.prod(self.sides[: self.n_in])

    def name(self, at: tuple[int, ...]) -> str:
        """Of the released tensor at these indices of the stacks."""
        layer = self.first_layer + at[0] if self.spec.axes[0] == "layers" else self.first_layer
        return self.template.format(layer=layer, expert=at[-1] if at else 0)

    def at_layer(self, layer: int) -> "Leaf":
        """The part of one layer of the stack, by itself."""
        assert self.spec.axes[0] == "layers"
        spec = Spec(self.spec.shape[1:], self.spec.axes[1:], self.spec.init)
        return replace(self, spec=spec, first_layer=self.first_layer + layer)

    def at_expert(self, expert: int) -> "Leaf":
        """One expert of a single layer."""
        assert self.spec.axes[0] == "experts"
        spec = Spec(self.spec.shape[1:], self.spec.axes[1:], self.spec.init)
        return replace(self, spec=spec, template=self.template.replace("{expert}", str(expert)))

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        for at in np.ndindex(*self.stack):
            yield at, self.name(at)

    def ours(self, released: np.ndarray) -> np.ndarray:
        """A view of a released matrix with our sides."""
        if self.n_in == 0:
            return released
        n_out = len(self.sides) - self.n_in
        apart = released.reshape(*self.sides[self.n_in :], *self.sides[: self.n_in])
        return apart.transpose(*range(n_out, len(self.sides)), *range(n_out))

    def released(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `ours`; a view where NumPy can give one."""
        if self.n_in == 0:
            return ours
        order = (*range(self.n_in, len(self.sides)), *range(self.n_in))
        return ours.transpose(order).reshape(self.released_shape)


def leaves(config: ModelConfig) -> Any:
    """A tree like `model_spec(config)` of Leaf."""
    first = {"dense_layers": 0, "moe_layers": config.n_dense_layers, "mtp": config.num_hidden_layers}
    return map_specs(lambda path, spec: _leaf(path, spec, first), model_spec(config))


def _leaf(path: str, spec: Spec, first: dict[str, int]) -> Leaf:
    group, _, rest = path.partition(".")
    if not rest:
        return Leaf(path, spec, TOP[group] + ".weight", 0)
    rest = rest.removeprefix("block.")  # an MTP module's block lies beside its projection
    if group == "mtp" and rest == "norm":
        rest = MTP_NORM
    rest = rest.replace(".experts.", ".experts.{expert}.")
    return Leaf(path, spec, f"model.layers.{{layer}}.{rest}.weight", first[group])


def bias_names(config: ModelConfig) -> list[str]:
    """One for each row of the router bias; none where the model has no bias."""
    if not config.has_correction_bias:
        return []
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    return [BIAS.format(layer=layer) for layer in range(config.n_dense_layers, last)]


def copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that repeat another one -> that one."""
    found = {}
    for depth in range(config.num_nextn_predict_layers):
        for name, original in COPIES.items():
            if config.tie_word_embeddings and original == "lm_head.weight":
                original = COPIES["embed_tokens"]
            found[f"model.layers.{config.num_hidden_layers + depth}.{name}.weight"] = original
    if config.tie_word_embeddings:
        found["lm_head.weight"] = COPIES["embed_tokens"]
    return found
