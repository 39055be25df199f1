"""Quantised values and scales against another implementation, where it is installed: Google's qwix."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8.formats import E4M3, E5M2
from dsv3_jax.fp8.quantize import Quantiser, quantise
from oracles.numpy_fp8 import spread

with warnings.catch_warnings():  # what it imports may warn; ours does not get away with it
    warnings.simplefilter("ignore", DeprecationWarning)
    qwix = pytest.importorskip("qwix")


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize(
    ("tile", "tiled_axes"),
    [((1, 128), {0: 1, 1: 128}), ((128, 1), {0: 128, 1: 1}), ((128, 128), {0: 128, 1: 128}), ((0, 0), {})],
    ids=["1x128", "128x1", "128x128", "tensor"],
)
def test_scales_and_values_equal_qwix_s(dtype, tile, tiled_axes):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((256, 384)) * 2.0 ** rng.integers(-6, 7, (256, 1))).astype(np.float32)
    theirs = qwix.quantize(jnp.asarray(x), dtype, tiled_axes=tiled_axes, calibration_method="absmax")
    ours = quantise(jnp.asarray(x), Quantiser(E4M3 if dtype == jnp.float8_e4m3fn else E5M2, tile, floor=1e-30))
    assert theirs.scale.shape == ours.scale.shape
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=2**-22)  # float32's rounding of one division
    got, expected = np.asarray(ours.values), np.asarray(theirs.qvalue.astype(jnp.float32))
    differs = got != expected
    # Only where x / s lies within float32's rounding of the middle between the two
    ratio = x.astype(np.float64) / spread(np.asarray(ours.scale), x.shape, tile)
    middle = (got.astype(np.float64) + expected) / 2
    assert (np.abs(ratio - middle)[differs] <= 2**-21 * np.abs(ratio)[differs]).all()
    assert differs.mean() < 1e-4
    # Either quantisation error is that of the other.
    np.testing.assert_allclose(ours.astype(jnp.float32)[~differs], qwix.dequantize(theirs)[~differs], rtol=2**-21)
