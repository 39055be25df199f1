"""Quantisation in plain JAX: the model's own functions, one after the other."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.fp8.formats import Format
from dsv3_jax.fp8.quantize import Quantised, Quantiser, with_scale_bits
from dsv3_jax.fp8.quantize import quantise as rounded


def quantise(x_SMK: jax.Array, how: Quantiser, *, scale_bits: bool, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """As `call.Quantise`."""
    found = rounded(x_SMK, how)
    return found.values.astype(how.form.dtype), (with_scale_bits(found) if scale_bits else found).scale


def requantise_transposed(
    values_RI: jax.Array, scale: jax.Array, form: Format, how: Quantiser, *, scale_bits: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """As `call.Requantise`."""
    x_RI = Quantised(values_RI, scale, values_RI.shape, (1, how.tile[0]), form).astype(jnp.float32)
    return tuple(v.T for v in quantise(x_RI, how, scale_bits=scale_bits, interpret=interpret))  # type: ignore[return-value]


def swiglu_quantise(
    g_RF: jax.Array, u_RF: jax.Array, gates_R: jax.Array | None, how: Quantiser, *, scale_bits: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """As `call.SwigluQuantise`."""
    a_RF = jax.nn.silu(g_RF.astype(jnp.float32)) * u_RF.astype(jnp.float32)
    if gates_R is not None:
        a_RF = a_RF * gates_R[:, None]
    return quantise(a_RF, how, scale_bits=scale_bits, interpret=interpret)
