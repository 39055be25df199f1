"""Stored weights against NumPy, on random shapes: what is kept, how far off it may be, and that slicing selects all parts."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.bits import to_bits
from dsv3_jax.fp8.quantize import Quantised
from dsv3_jax.weights import Bits, bits_on_cpu, n_bytes, to_int4, to_int8

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 20))


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=6, deadline=None)
@given(shape=SHAPES, axis=st.sampled_from([-2, -1]))
def test_int8_is_within_half_a_step_of_the_channel_s_largest(shape, axis):
    weight = normal(shape)
    stored = to_int8(jnp.asarray(weight), axis)
    assert stored.shape == shape and stored.values.dtype == jnp.int8
    step = np.abs(weight).max(axis=axis, keepdims=True) / 127
    error = np.abs(np.asarray(stored.astype(jnp.float32)) - weight)
    assert (error <= 0.5 * step * (1 + 1e-5) + 1e-12).all()


@settings(max_examples=6, deadline=None)
@given(shape=SHAPES, axis=st.sampled_from([-2, -1]), group=st.sampled_from([1, 2, 7, 32]))
def test_int4_is_within_half_a_step_of_the_group_s_largest(shape, axis, group):
    weight = normal(shape)
    stored = to_int4(jnp.asarray(weight), axis, group)
    assert stored.shape == shape and stored.pairs.dtype == jnp.uint8
    along = np.moveaxis(weight, axis, -1)
    back = np.moveaxis(np.asarray(stored.astype(jnp.float32)), axis, -1)
    for start in range(0, along.shape[-1], min(group, along.shape[-1])):
        part = slice(start, start + min(group, along.shape[-1]))
        step = np.abs(along[..., part]).max(axis=-1, keepdims=True) / 7
        assert (np.abs(back[..., part] - along[..., part]) <= 0.5 * step * (1 + 1e-5) + 1e-12).all()


def test_int8_takes_a_quarter_of_float32_and_int4_an_eighth_and_their_scales():
    weight = jnp.asarray(normal((256, 128)))
    assert n_bytes(to_int8(weight)) == 256 * 128 + 128 * 4
    assert n_bytes(to_int4(weight, -2, 64)) == 256 * 128 // 2 + 4 * 128 * 4


def test_a_matrix_of_zeros_stays_zero():
    zeros = jnp.zeros((5, 3))
    for stored in (to_int8(zeros), to_int4(zeros)):
        np.testing.assert_array_equal(np.asarray(stored.astype(jnp.float32)), zeros)


def block_scaled(stack, n_in, n_out, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((*stack, n_in, n_out)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (*stack, -(-n_in // 128), -(-n_out // 128))).astype(np.float32)
    return values, scale


@settings(max_examples=6, deadline=None)
@given(n_in=st.integers(1, 300), n_out=st.integers(1, 300))
def test_block_scales_belong_to_blocks_of_128_and_to_what_is_left_at_the_edges(n_in, n_out):
    values, scale = block_scaled((), n_in, n_out)
    got = np.asarray(Quantised(jnp.asarray(values), jnp.asarray(scale), (n_in, n_out)).astype(jnp.float32))
    for _ in range(20):
        i, j = np.random.default_rng(n_in * n_out).integers(0, (n_in, n_out))
        assert got[i, j] == np.float32(values[i, j]) * scale[i // 128, j // 128]
    assert got[-1, -1] == np.float32(values[-1, -1]) * scale[-1, -1]


def test_a_stored_weight_has_its_matrix_shape_again():
    values, scale = block_scaled((2,), 6, 20)
    weight = Quantised(jnp.asarray(values), jnp.asarray(scale), (6, 4, 5))
    assert weight.shape == weight.astype(jnp.float32).shape == (2, 6, 4, 5) and weight.ndim == 4


def test_bits_are_integers_for_narrow_floats_only():
    kinds = {jnp.bfloat16: jnp.uint16, jnp.float16: jnp.uint16, jnp.float8_e4m3fn: jnp.uint8, jnp.float32: jnp.float32}
    for kind, bits in kinds.items():
        assert to_bits(jnp.zeros(3, kind)).dtype == bits
    assert to_bits(jnp.zeros(3, jnp.int8)).dtype == jnp.int8


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32])
def test_bits_of_cpu_memory_are_that_memory_and_the_same_numbers(kind):
    array = jnp.asarray(normal((3, 64, 64)), jnp.float32).astype(kind)
    bits = bits_on_cpu(array)
    assert isinstance(bits, Bits) == (kind != jnp.float32)
    assert (bits.shape, bits.ndim, bits.dtype) == (array.shape, array.ndim, array.dtype)
    values = jax.tree.leaves(bits)[0]
    assert values.dtype.itemsize == array.dtype.itemsize and values.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(bits.astype(jnp.float32), array.astype(jnp.float32))
