"""Other dtypes: block scales against an independent calculation, ragged edges included."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.interop.config_json import model_config
from dsv3_jax.interop.recode import block_scale, fp8_names, planned, quantise
from oracles.held import Held
from oracles.released_folder import FP8, NEVER_FP8, multiplied_out, released_config, released_tensors
from oracles.unchecked import unchecked


def recoded(tensors, released, target, **options):
    """Name -> tensor of what would be written."""
    result = {}
    for plan in planned(Held(tensors), model_config(released, "config.json"), target, **options):
        pieces = list(plan.pieces())
        result[plan.name] = np.concatenate(pieces) if pieces[0].ndim else pieces[0]
        assert (result[plan.name].dtype, result[plan.name].shape) == (plan.dtype, plan.shape)
        if plan.whole is not None:
            assert plan.whole().tobytes() == result[plan.name].tobytes()
    return result


def scales_by_hand(weight):
    """One block after the other."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = np.empty((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            block = weight[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            scale[r, c] = np.float32(max(np.abs(block).max(), 1e-4)) / np.float32(448)
    return scale


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_the_largest_of_every_block_becomes_the_largest_fp8(rows, columns, seed, power_of_two):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-6, 4)).astype(np.float32)
    scale, expected = block_scale(weight, power_of_two), scales_by_hand(weight)
    if power_of_two:
        assert (np.exp2(np.round(np.log2(scale))) == scale).all()
        assert (scale >= expected * (1 - 1e-6)).all() and (scale < 2 * expected).all()
    else:
        np.testing.assert_array_equal(scale, expected)
    values = quantise(weight, scale)
    spread = multiplied_out({"w": values, "w_scale_inv": scale})["w"]
    # Three bits of mantissa: half of 1/8 relative; below the smallest normal number, half of its last place.
    largest = np.abs(scale).max()
    assert (np.abs(spread - weight) <= np.maximum(np.abs(weight) / 16, 2.0**-10 * largest) * (1 + 1e-6)).all()
    assert np.isfinite(values.astype(np.float32)).all()


RELEASED = released_config(
    hidden_size=130, intermediate_size=300, moe_intermediate_size=129, q_lora_rank=140, num_nextn_predict_layers=1
)


def test_fp8_holds_the_matrices_that_released_files_hold_so():
    config = model_config(RELEASED, "config.json")
    stored = released_tensors(RELEASED, 0, fp8=np.float32)
    assert set(fp8_names(config)) == {name for name, tensor in stored.items() if tensor.dtype == FP8}


@pytest.mark.parametrize("scales", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_fp8_is_made_with_scales_behind_each_weight(scales):
    tensors = released_tensors(RELEASED, 1)
    made = recoded(tensors, RELEASED, "fp8", power_of_two=scales != np.float32)
    for name, tensor in tensors.items():
        if name.endswith(NEVER_FP8) or tensor.ndim == 1:
            kind = np.float32 if name.endswith("bias") else ml_dtypes.bfloat16
            assert made[name].dtype == kind
            np.testing.assert_array_equal(made[name], tensor.astype(kind))
            continue
        scale = block_scale(tensor, scales != np.float32)
        assert made[name + "_scale_inv"].dtype == scales
        np.testing.assert_array_equal(made[name + "_scale_inv"].astype(np.float32), scale)
        assert made[name].tobytes() == quantise(tensor, scale).tobytes()
    names = list(made)
    assert all(names[names.index(n) + 1] == n + "_scale_inv" for n in names if n + "_scale_inv" in made)


@pytest.mark.parametrize("scales", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_fp8_is_multiplied_out_and_rounded_once(scales, target):
    tensors = released_tensors(RELEASED, 2, dtype=ml_dtypes.bfloat16, fp8=scales)
    made = recoded(tensors, RELEASED, target)
    expected = multiplied_out(tensors)
    assert list(made) == list(expected)
    for name, tensor in expected.items():
        kind = np.dtype(np.float32 if target == "float32" or name.endswith("bias") else ml_dtypes.bfloat16)
        assert made[name].dtype == kind and made[name].tobytes() == tensor.astype(np.float32).astype(kind).tobytes()


@pytest.mark.parametrize("target", ["keep", "fp8"])
def test_what_is_fp8_stays_so_to_the_byte(target):
    tensors = released_tensors(RELEASED, 3, dtype=ml_dtypes.bfloat16, fp8=ml_dtypes.float8_e8m0fnu)
    made = recoded(tensors, RELEASED, target)
    assert {name: tensor.tobytes() for name, tensor in made.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_an_unknown_target_is_refused():
    config = model_config(RELEASED, "config.json")
    with pytest.raises(ValueError, match="--dtype: expected one of keep, float32, bfloat16, fp8, got 'int4'"):
        unchecked(lambda: planned(Held({}), config, "int4"))
