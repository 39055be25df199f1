"""GPU kernels at V3's shapes, lowered to Triton and exported for CUDA on a machine without a GPU or its compiler."""

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.kernels.attention.api import mla_attention
from dsv3_jax.kernels.decode.api import paged_decode_attention
from dsv3_jax.kernels.grouped.api import grouped_swiglu
from dsv3_jax.kernels.quantise.api import quantise, swiglu_quantise
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.kernels.scaled.api import grouped_scaled_outer, grouped_scaled_product
from dsv3_jax.presets import preset

H100 = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
GPU, TRITON = "pallas_gpu", "__gpu$xla.gpu.triton"
V3 = preset("deepseek_v3_671b").model


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def experts(x, gates, gate, up, down, count):
    def loss(*operands):
        return grouped_swiglu(*operands, count, implementation=GPU).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2, 3, 4))(x, gates, gate, up, down)


def attention(*operands):
    def loss(*arrays):
        return mla_attention(*arrays, operands[5], 0.1, implementation=GPU).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2, 3, 4))(*operands[:5])


def decode(q, cache, table, lengths):
    return paged_decode_attention(q, cache, table, lengths, latent=512, scale=0.1, implementation=GPU)


def router(logits, bias):
    return choose(logits, bias, V3, implementation=GPU)


def tiles(x):
    return quantise(x, Quantiser(), implementation=GPU), quantise(x, Quantiser(tile=(128, 128)), implementation=GPU)


def swiglu(g, u):
    return swiglu_quantise(g, u, Quantiser(), implementation=GPU)


def fp8(x, w, dy, count):
    how = {"dtype": jnp.bfloat16, "implementation": GPU}
    x_rows, x_columns = (quantise(x, Quantiser(tile=tile), implementation=GPU) for tile in ((1, 128), (128, 1)))
    weights = quantise(w, Quantiser(tile=(128, 128)), implementation=GPU)
    y = grouped_scaled_product(x_rows, weights, count, **how)
    return y, grouped_scaled_outer(x_columns.T, quantise(dy, Quantiser(tile=(128, 1)), implementation=GPU), count, **how)


WEIGHT = array(8, 7168, 2048)
HEADS = array(1, 128, 4096, 128)
ROWS, COUNTS = array(32768, 7168), array(8, dtype=jnp.int32)
SEGMENTS = array(1, 4096, dtype=jnp.int32)
CASES = {
    "grouped": (experts, [ROWS, array(32768, dtype=jnp.float32), WEIGHT, WEIGHT, array(8, 2048, 7168), COUNTS], 6),
    "attention": (attention, [HEADS, array(1, 128, 4096, 64), HEADS, array(1, 4096, 64), HEADS, SEGMENTS], 3),
    "decode": (
        decode,
        [array(32, 1, 128, 576), array(4096, 64, 576), array(32, 512, dtype=jnp.int32), array(32, dtype=jnp.int32)],
        1,
    ),
    "router": (router, [array(4096, 256, dtype=jnp.float32), array(256, dtype=jnp.float32)], 1),
    "quantise": (tiles, [ROWS], 2),
    "fp8": (fp8, [ROWS, WEIGHT, array(32768, 2048), COUNTS], 6),
    "swiglu": (swiglu, [array(32768, 2048), array(32768, 2048)], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_kernel_is_lowered_and_exported_at_v3_s_shapes(name):
    function, operands, kernels = CASES[name]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
    with jax.sharding.use_abstract_mesh(H100):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)(*operands)
    assert exported.mlir_module().count(TRITON) >= kernels
