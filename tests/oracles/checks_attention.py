"""Checks of rotary embedding and attention against known numbers and the float64 reference; run by tests and mutants."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import mla, rope, transformer
from oracles import numpy_attention, vectors
from oracles.compiling import quick_jit
from oracles.from_checkpoint import from_checkpoint, model_config, typed_fields
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors

YARN = vectors.V3_YARN | {"original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla_yarn": {"rope_scaling": YARN},
    "mla_without_q_lora": {"q_lora_rank": None, "v_head_dim": 9},
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa_yarn": {"attention": "mqa", "num_key_value_heads": 1, "rope_scaling": YARN},
}


def rope_config(known: dict[str, Any]) -> ModelConfig:
    yarn = known["rope_scaling"]
    scaling = None if yarn is None else RopeScaling(**typed_fields(RopeScaling, yarn))
    return ModelConfig(
        qk_nope_head_dim=known["qk_nope_head_dim"], qk_rope_head_dim=known["qk_rope_head_dim"],
        rope_theta=float(known["rope_theta"]), rope_scaling=scaling,
    )  # fmt: skip


def check_known_frequencies() -> None:
    frequencies = rope.rope_frequencies(rope_config(vectors.V3_ROPE))
    plain = rope.rope_frequencies(rope_config(vectors.V3_ROPE_PRETRAINING))
    for pair, value in vectors.V3_YARN_FREQUENCIES.items():
        assert abs(frequencies[pair] / value - 1) < 1e-9, pair
    np.testing.assert_allclose(plain, [10000 ** (-j / 32) for j in range(32)], rtol=1e-14)


def check_known_softmax_scales() -> None:
    """Of the function that attention calls."""
    assert abs(mla.softmax_scale(rope_config(vectors.V3_ROPE_PRETRAINING)) - vectors.SOFTMAX_SCALE_V3_PRETRAINING) < 5e-11
    assert abs(mla.softmax_scale(rope_config(vectors.V3_ROPE)) - vectors.SOFTMAX_SCALE_V3_YARN) < 5e-11
    assert abs(mla.softmax_scale(rope_config(vectors.V2_ROPE)) - vectors.SOFTMAX_SCALE_V2_YARN) < 5e-8


def check_rotation_equals_the_reference() -> None:
    """Pairs (2j, 2j+1), at position 0 and far from it."""
    config = model_config(SMALL_CONFIG | {"qk_rope_head_dim": 8, "rope_scaling": YARN})
    positions = np.array([0, 1, 5, 63, 64, 199])
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 8)).astype(np.float32)
    tables = rope.rope_tables(jnp.asarray(positions[None, :], jnp.int32), config)
    actual = mla.apply_rope(jnp.asarray(x), *tables)
    for head in range(2):
        frequencies = numpy_attention.rope_frequencies(SMALL_CONFIG | {"qk_rope_head_dim": 8, "rope_scaling": YARN})
        expected = numpy_attention.rotate(x[0, head].astype(np.float64), positions, frequencies)
        # An angle of 199 is stored to 8e-6 in float32.
        np.testing.assert_allclose(actual[0, head], expected, rtol=0, atol=4e-5)


def check_attention_equals_the_reference(kind: str, *, length: int = 7, packed: bool = False) -> None:
    released = SMALL_CONFIG | KINDS[kind]
    config, tensors = model_config(released), random_tensors(released, seed=7)
    params, _ = from_checkpoint(tensors, config)
    weights = {name: array[0] for name, array in params["moe_layers"]["self_attn"].items()}
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, length, released["hidden_size"])).astype(np.float32)
    segments = np.ones((2, length), np.int32)
    if packed:
        segments[0, length // 3 :] = 2
        segments[1, length - 2 :] = 0

    def run(x: Any) -> Any:
        context = transformer.make_context(jnp.asarray(segments), config, cross_document=not packed)
        return mla.attention(weights, x, context.rope, context.segments_BT, config)

    actual = quick_jit(run)(jnp.asarray(x))
    for b in range(2):
        mask = numpy_attention.attention_mask(length, segments[b] if packed else None)
        expected = numpy_attention.attention(
            x[b].astype(np.float64), tensors, "model.layers.1.self_attn.", released, np.arange(length), mask
        )
        np.testing.assert_allclose(actual[b], expected, rtol=0, atol=2e-5)  # entries of order 1, sums of some 20 terms
