"""The Linen shell: declares parameters with their logical axes, and the balance collection; calls the pure functions."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.initial import initial_values, whole
from dsv3_jax.model.mtp import Depth, mtp_forward, mtp_spec
from dsv3_jax.model.spec import Spec, SpecTree, stacked
from dsv3_jax.model.transformer import Hidden, forward, make_context, transformer_spec


def model_spec(config: ModelConfig) -> SpecTree:
    """Every parameter: the main model's and, stacked under `mtp`, its MTP modules'."""
    depth = config.num_nextn_predict_layers
    return {**transformer_spec(config), **({"mtp": stacked(mtp_spec(config), depth)} if depth else {})}


def initial_bias(config: ModelConfig) -> Float[Array, "L E"]:
    """The router bias starts at 0; one row a MoE layer, the main model's first."""
    return jnp.zeros((config.n_moe_layers, config.n_routed_experts), jnp.float32)


class _Parameters(nn.Module):
    """One level of a SpecTree, declared."""

    spec: SpecTree
    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return _declare(self, self.spec, self.config)


def _declare(module: nn.Module, spec: SpecTree, config: ModelConfig) -> dict[str, Any]:
    def leaf(name: str, spec: Spec) -> Any:
        init = nn.initializers.ones if spec.init == "ones" else nn.initializers.normal(config.initializer_range)
        return module.param(name, nn.with_logical_partitioning(init, spec.axes), spec.shape, jnp.dtype(config.param_dtype))

    return {
        name: leaf(name, child) if isinstance(child, Spec) else _Parameters(child, config, name=name)()
        for name, child in spec.items()
    }


class DeepSeekV3(nn.Module):
    """`model.apply(variables, tokens)` -> (Hidden, MTP depths); `variables` holds `params` and `balance` (the router bias).

    With `tokens` None nothing is computed: `model.init(key)` only declares.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        *,
        cross_document: bool = True,
    ) -> tuple[Hidden, list[Depth]] | None:
        config = self.config
        params = _declare(self, model_spec(config), config)
        bias_LE = self.variable("balance", "bias", initial_bias, config).value
        if tokens_BT is None:
            return None
        segments = jnp.ones_like(tokens_BT) if segment_ids_BT is None else segment_ids_BT
        context = make_context(segments, config, cross_document=cross_document)
        hidden = forward(params, bias_LE, tokens_BT, context, config)
        return hidden, mtp_forward(params, bias_LE, tokens_BT, hidden, context, config)


class Variables(NamedTuple):
    """What an optimiser may touch, and what it may not."""

    params: dict[str, Any]
    bias_LE: Float[Array, "L E"]


def abstract_variables(config: ModelConfig) -> Variables:
    """Shapes and dtypes of every parameter and of the bias, without allocating anything."""
    variables = meta.unbox(jax.eval_shape(DeepSeekV3(config).init, jax.random.key(0)))
    return Variables(variables["params"], variables["balance"]["bias"])


def init_variables(config: ModelConfig, seed: int = 0, ulps: int = 0) -> Variables:
    """Fresh parameters (`model.initial`), and a zero router bias."""
    specs = model_spec(config)
    draws = initial_values(specs, config.initializer_range, seed, ulps)
    params = jax.tree.map(lambda draw, spec: jnp.asarray(draw(whole(spec.shape)), config.param_dtype), draws, specs)
    return Variables(params, initial_bias(config))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axis names of every parameter, as the sharding rules read them: a tree of PartitionSpec."""
    abstract = jax.eval_shape(DeepSeekV3(config).init, jax.random.key(0))
    return nn.get_partition_spec(abstract)["params"]
