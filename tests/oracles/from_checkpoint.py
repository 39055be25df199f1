"""Released tensors as our parameter tree: what the stored cases and the NumPy reference's random weights are loaded with.

Written in jnp and linear in the tensors, so that `jax.vjp` turns a gradient of our tree into gradients under released names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model.mtp import mtp_spec
from dsv3_jax.model.spec import Spec, SpecTree
from dsv3_jax.model.transformer import block_spec

FLOAT32 = {"compute_dtype": "float32", "param_dtype": "float32", "remat": "none", "experts_implementation": "dense"}


def model_config(released: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """A config.json as ours, in float32; keys that are not a field of ours are left out."""
    values = {name: value for name, value in typed_fields(ModelConfig, released).items() if name != "initializer_range"}
    if released["topk_method"] == "group_limited_greedy":
        values["group_score_topk"] = 1
    if released.get("rope_scaling"):
        values["rope_scaling"] = RopeScaling(**typed_fields(RopeScaling, released["rope_scaling"]))
    return ModelConfig(**values | FLOAT32 | changes)


def typed_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of `cls`; JSON's 10000 as the float it stands for."""
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    return {name: float(v) if types[name] is float else v for name, v in values.items() if name in types}


def from_checkpoint(tensors: Mapping[str, Any], config: ModelConfig, xp: Any = jnp) -> tuple[dict[str, Any], Any]:
    """(params, bias [n_moe_layers, E]), float32, from tensors in (out, in) orientation; `xp=np` compiles nothing."""

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        tensor = xp.asarray(tensors[f"{name}.weight"], xp.float32)
        return tensor.T.reshape(shape)  # .T leaves a gain as it is

    def tree(spec: SpecTree, prefix: str) -> dict[str, Any]:
        return {name: leaf(name, child, prefix) for name, child in spec.items()}

    def leaf(name: str, spec: Spec | SpecTree, prefix: str) -> Any:
        if name == "block":  # an MTP module's block lies beside its projection
            return tree(spec, prefix)
        if name == "experts":
            shapes = {part: child.shape for part, child in spec.items()}
            ids = range(config.n_routed_experts)
            return {p: xp.stack([weight(f"{prefix}experts.{e}.{p}", s[1:]) for e in ids]) for p, s in shapes.items()}
        if isinstance(spec, Spec):
            return weight(prefix + ("shared_head.norm" if name == "norm" else name), spec.shape)
        return tree(spec, f"{prefix}{name}.")

    def layers(spec: SpecTree, first: int, last: int) -> Any:
        return jax.tree.map(lambda *ws: xp.stack(ws), *[tree(spec, f"model.layers.{i}.") for i in range(first, last)])

    main, dense = config.num_hidden_layers, config.n_dense_layers
    end = main + config.num_nextn_predict_layers
    params: dict[str, Any] = {
        "embed_tokens": xp.asarray(tensors["model.embed_tokens.weight"], xp.float32),
        "norm": weight("model.norm", (config.hidden_size,)),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = xp.asarray(tensors["lm_head.weight"], xp.float32)
    if dense:
        params["dense_layers"] = layers(block_spec(config, dense=True), 0, dense)
    if dense < main:
        params["moe_layers"] = layers(block_spec(config, dense=False), dense, main)
    if end > main:
        params["mtp"] = layers(mtp_spec(config), main, end)
    even = xp.zeros(config.n_routed_experts)
    rows = [tensors.get(f"model.layers.{i}.mlp.gate.e_score_correction_bias", even) for i in range(dense, end)]
    return params, xp.stack([xp.asarray(row, xp.float32) for row in rows]) if rows else xp.zeros((0, len(even)))


def released_gradients(gradients: Any, tensors: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Gradients of our tree as gradients of the released tensors, by name."""
    weights = {name: jnp.asarray(t, jnp.float32) for name, t in tensors.items()}
    _, transposed = jax.vjp(lambda t: from_checkpoint(t, config)[0], weights)
    return {name: np.asarray(gradient) for name, gradient in transposed(gradients)[0].items()}
