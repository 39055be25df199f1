"""What a folder must hold to be the model that its config.json describes; anything else is one line with file and tensor."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop.source import open_source
from oracles.released_folder import released_config, released_tensors, write_folder

CONFIG = released_config(hidden_size=136, num_nextn_predict_layers=1)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
Q_A, GATE = "model.layers.0.self_attn.q_a_proj.weight", "model.layers.1.mlp.gate.weight"
BIAS, DOWN = "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.2.mlp.experts.7.down_proj.weight"


def tensors(**options):
    return released_tensors(CONFIG, seed=0, **options)


def refused(tmp_path, held, message, config=CONFIG, **options):
    write_folder(tmp_path, config, held)
    with pytest.raises(ValueError, match=message) as error:
        open_source(tmp_path, **options)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_plain_dtypes_pass(tmp_path, dtype):
    write_folder(tmp_path, CONFIG, tensors(dtype=dtype))
    assert open_source(tmp_path).config.num_nextn_predict_layers == 1


@pytest.mark.parametrize("scale", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_fp8_passes_with_scales_of_every_dtype(tmp_path, scale):
    write_folder(tmp_path, CONFIG, tensors(dtype=ml_dtypes.bfloat16, fp8=scale), shards=3)
    open_source(tmp_path)


@pytest.mark.parametrize("name", [Q_A, GATE, BIAS, DOWN, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    held = tensors()
    del held[name]
    refused(tmp_path, held, f"tensor '{name}' is missing")


def test_missing_mtp_is_said_with_the_way_out(tmp_path):
    held = {name: tensor for name, tensor in tensors().items() if not name.startswith("model.layers.2.")}
    refused(tmp_path, held, r"the MTP module that config.json announces is not there; mtp=False \(--nomtp\)")
    assert open_source(tmp_path, mtp=False).config.num_nextn_predict_layers == 0


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.8.up_proj.weight", "model.layers.3.enorm.weight", "x\ny"])
def test_a_surplus_tensor_is_named(tmp_path, name):
    line = refused(tmp_path, tensors() | {name: np.zeros((2, 2), np.float32)}, "is no part of this model")
    assert repr(name) in line


def test_mtp_that_the_config_does_not_announce_is_surplus(tmp_path):
    refused(tmp_path, tensors(), "'model.layers.2", CONFIG | {"num_nextn_predict_layers": 0})


def test_old_buffers_are_ignored(tmp_path):
    write_folder(tmp_path, CONFIG, tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)})
    open_source(tmp_path)


@pytest.mark.parametrize("name", [Q_A, GATE, BIAS, DOWN, "model.norm.weight"])
def test_a_wrong_shape_is_named_with_both(tmp_path, name):
    held = tensors()
    held[name] = held[name].reshape(*held[name].shape, 1)
    refused(tmp_path, held, f"tensor '{name}': expected shape .*, got ")


@pytest.mark.parametrize("name", [Q_A, BIAS, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, ml_dtypes.float8_e5m2])
def test_a_wrong_dtype_is_named(tmp_path, name, dtype):
    held = tensors()
    held[name] = held[name].astype(dtype)
    refused(tmp_path, held, f"tensor '{name}': expected one of float32, bfloat16.*, got {np.dtype(dtype)}")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", BIAS])
def test_fp8_is_for_matrices_alone(tmp_path, name):
    held = tensors()
    held[name] = held[name].astype(FP8)
    refused(tmp_path, held, f"tensor '{name}': expected one of")


def test_fp8_without_its_scale_and_a_scale_without_fp8_are_named(tmp_path):
    held = tensors(fp8=np.float32)
    scale = held.pop(Q_A + "_scale_inv")
    refused(tmp_path / "a", held, "q_a_proj.weight' is FP8, but its weight_scale_inv is missing")
    refused(tmp_path / "b", tensors() | {Q_A + "_scale_inv": scale}, "q_a_proj.weight_scale_inv' is no part")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scales_that_are_none_are_named(tmp_path, bad, dtype):
    held = tensors(fp8=dtype)
    held[Q_A + "_scale_inv"][0, 1] = bad
    refused(tmp_path, held, "q_a_proj.weight_scale_inv': expected positive finite scales, got")


def test_a_nan_among_e8m0_scales_is_named(tmp_path):
    held = tensors(fp8=ml_dtypes.float8_e8m0fnu)
    held[Q_A + "_scale_inv"].view(np.uint8)[0, 0] = 0xFF
    refused(tmp_path, held, "q_a_proj.weight_scale_inv': expected positive finite scales, got nan")


def test_a_grid_of_scales_that_forgets_the_edge_is_named(tmp_path):
    held = tensors(fp8=np.float32)
    held[Q_A + "_scale_inv"] = held[Q_A + "_scale_inv"][:, :1]
    refused(tmp_path, held, r"q_a_proj.weight_scale_inv': expected float32 \[1, 2\], got float32 \[1, 1\]")


def test_a_copy_that_differs_is_named(tmp_path):
    held = tensors()
    held["model.layers.2.shared_head.head.weight"] = held["lm_head.weight"] + 1
    refused(tmp_path, held, "shared_head.head.weight' is not equal to 'lm_head.weight'")
    open_source(tmp_path, mtp=False)


def test_a_folder_without_copies_is_whole(tmp_path):
    held = {
        name: tensor
        for name, tensor in tensors().items()
        if not name.endswith(("2.embed_tokens.weight", "shared_head.head.weight"))
    }
    write_folder(tmp_path, CONFIG, held)
    open_source(tmp_path)


GIANTS = ["vocab_size", "kv_lora_rank", "num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"]


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize(
    ("key", "size"), [(k, 10**9) for k in GIANTS] + [("n_routed_experts", 10**5), ("num_hidden_layers", 10**30)]
)
def test_a_config_that_promises_a_giant_is_refused_at_once(tmp_path_factory, key, size, mtp):
    folder = tmp_path_factory.getbasetemp() / "giant"
    if not folder.exists():
        write_folder(folder, CONFIG, tensors())
    config = CONFIG | {key: size} | ({"num_hidden_layers": size} if key == "first_k_dense_replace" else {})
    (folder / "config.json").write_text(json.dumps(config | {"n_group": 1, "topk_group": 1}))
    with warnings.catch_warnings(), pytest.raises(ValueError) as error:
        open_source(folder, mtp=mtp)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
