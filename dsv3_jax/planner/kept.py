"""What one layer keeps between forward and backward pass [§3.2.3, §3.3.3], read off its traced program."""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.bits import bits_dtype
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.spec import Spec
from dsv3_jax.model.transformer import block, block_spec, make_context
from dsv3_jax.parallel.rules import map_specs
from dsv3_jax.remat import rematerialised


def kept_per_token(config: ModelConfig, *, dense: bool, length: int = 1024) -> dict[str, float]:
    """Bytes of a token that the layer keeps beside its input, by dtype; `uint8` holds FP8 and 12 bits, packed, and `bfloat16`
    also what is held as its bits.

    As much as a longer sequence adds, so that what does not grow with it (gaps between experts' rows) is left out.
    """
    shorter, longer = (_kept(config, dense, n) for n in (length, 2 * length))
    return {dtype: (longer[dtype] - shorter[dtype]) / length for dtype in longer}


def _kept(config: ModelConfig, dense: bool, length: int) -> Counter[str]:
    def shape_of(name: str, spec: Spec) -> Any:
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(config.param_dtype))

    weights = map_specs(shape_of, block_spec(config, dense=dense))
    x = jax.ShapeDtypeStruct((1, length, config.hidden_size), jnp.dtype(config.compute_dtype))
    context = make_context(jnp.ones((1, length), jnp.int32), config, cross_document=True)
    bias = None if dense else jax.ShapeDtypeStruct((config.n_routed_experts,), jnp.float32)

    def run(weights: Any, x: Any, bias: Any, context: Any) -> Any:
        return block(weights, bias, x, context, config)[0]

    def residuals(weights: Any, x: Any, bias: Any, context: Any) -> list[Any]:
        function = rematerialised(lambda weights, x: run(weights, x, bias, context), config)
        return jax.tree.leaves(jax.vjp(function, weights, x)[1])

    jaxpr = jax.make_jaxpr(residuals)(weights, x, bias, context).jaxpr
    given = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    made = {id(var): var.aval for var in jaxpr.outvars if not hasattr(var, "val") and id(var) not in given}
    total: Counter[str] = Counter()
    for aval in made.values():
        kind = jnp.dtype(jnp.bfloat16) if aval.dtype == bits_dtype(jnp.dtype(jnp.bfloat16)) else aval.dtype
        total[str(kind)] += math.prod(aval.shape) * aval.dtype.itemsize
    return total
