"""Parameters from files: right to the bit for any shape, dtype and mesh, and with no more memory than they take."""

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.fp8.quantize import Quantised
from dsv3_jax.inference.loaded import load
from dsv3_jax.interop import read
from dsv3_jax.interop.config_json import model_config as interop_config
from dsv3_jax.interop.folder import ReleasedFolder
from dsv3_jax.interop.names import leaves
from dsv3_jax.interop.source import open_source
from oracles.checks_loader import check_same_parameters, check_stored_case
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.layouts import placement_of
from oracles.released_folder import multiplied_out, released_config, released_tensors, write_folder
from oracles.unchecked import unchecked

BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("case", ["fp8", "mtp", "noqlora", "wide"])
def test_stored_checkpoints_become_the_parameters_that_they_are(case):
    check_stored_case(case)


# Sizes around 128: ragged edges, more than one block, less than one.
SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([24, 130, 257]), "moe_intermediate_size": st.sampled_from([12, 129]),
        "intermediate_size": st.sampled_from([40, 300]), "q_lora_rank": st.sampled_from([None, 10, 140]),
        "kv_lora_rank": st.sampled_from([8, 129]), "v_head_dim": st.sampled_from([5, 40]),
        "num_hidden_layers": st.integers(1, 3), "first_k_dense_replace": st.integers(0, 3),
        "num_nextn_predict_layers": st.integers(0, 2), "n_shared_experts": st.integers(0, 2),
        "tie_word_embeddings": st.booleans(), "n_routed_experts": st.just(4), "n_group": st.just(2), "topk_group": st.just(1),
        "num_experts_per_tok": st.just(2),
    }
)  # fmt: skip
DTYPES = st.sampled_from([np.float32, np.float16, BF16, np.float64])
SCALES = st.sampled_from([None, np.float32, BF16, ml_dtypes.float8_e8m0fnu])


@settings(max_examples=6)
@given(SIZES, DTYPES, SCALES, st.integers(1, 3))
def test_any_checkpoint_becomes_its_parameters(tmp_path_factory, sizes, dtype, fp8, shards):
    sizes["first_k_dense_replace"] = min(sizes["first_k_dense_replace"], sizes["num_hidden_layers"])
    released = released_config(**sizes)
    tensors = released_tensors(released, seed=1, dtype=dtype, fp8=fp8)
    folder = tmp_path_factory.mktemp("any")
    write_folder(folder, released, tensors, shards)
    params, bias = from_checkpoint(multiplied_out(tensors), model_config(released), np)
    loaded = load(folder)
    check_same_parameters(loaded.params, params)
    np.testing.assert_array_equal(loaded.bias_LE, bias)
    narrow = load(folder, dtype="bfloat16").params
    gates = [path for path, leaf in jax.tree_util.tree_leaves_with_path(narrow) if leaf.dtype != jnp.bfloat16]
    # The router's matrix stays as precise as the file has it.
    assert all(path[-1].key == "gate" for path in gates)
    assert bool(gates) is (dtype != BF16 and not narrow.keys().isdisjoint({"moe_layers", "mtp"}))
    rounded = jax.tree.map(lambda a, b: b.astype(a.dtype), narrow, params)
    check_same_parameters(narrow, rounded)


@given(st.data(), st.sampled_from(["kv_b_proj", "o_proj", "q_proj", "embed_tokens"]), st.booleans())
def test_any_part_of_a_matrix_is_that_part_of_the_whole(data, name, is_fp8):
    config = interop_config(released_config(hidden_size=150, kv_lora_rank=130, v_head_dim=40, q_lora_rank=None), "config.json")
    tree = leaves(config)
    leaf = tree[name] if name == "embed_tokens" else tree["moe_layers"]["self_attn"][name].at_layer(0)
    released = np.random.default_rng(0).standard_normal(leaf.released_shape).astype(np.float32)
    scale = None
    if is_fp8 and name != "embed_tokens":
        scale = np.arange(1.0, 17.0, dtype=np.float32).reshape(4, 4)[
            : -(-released.shape[0] // 128), : -(-released.shape[1] // 128)
        ]
        released = released.astype(ml_dtypes.float8_e4m3fn)
        whole = multiplied_out({"w": released, "w_scale_inv": scale})["w"]
    else:
        whole = released
    starts = [data.draw(st.integers(0, size - 1)) for size in leaf.sides]
    part = [slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, leaf.sides, strict=True)]
    out = np.full([p.stop - p.start for p in part], np.nan, np.float32)
    read.fill_matrix(out, leaf, released, scale, part)
    expected = whole if name == "embed_tokens" else whole.T.reshape(leaf.sides)
    np.testing.assert_array_equal(out, expected[tuple(part)])


def fp8_folder(path, **changes):
    sizes = {"hidden_size": 136, "vocab_size": 48, "q_lora_rank": 16, "moe_intermediate_size": 24, "num_hidden_layers": 3}
    released = released_config(**sizes, **changes)
    tensors = released_tensors(released, seed=2, dtype=BF16, fp8=np.float32)
    write_folder(path, released, tensors, shards=2)
    return released, tensors


def test_fp8_is_kept_with_its_scales_and_stands_for_the_same_weights(tmp_path):
    released, tensors = fp8_folder(tmp_path, num_nextn_predict_layers=1)
    kept = load(tmp_path, dtype="stored").params
    q_b = kept["moe_layers"]["self_attn"]["q_b_proj"]
    assert isinstance(q_b, Quantised) and q_b.dtype == jnp.float8_e4m3fn and q_b.scale.dtype == jnp.float32
    stored = tensors["model.layers.2.self_attn.q_b_proj.weight"]
    assert np.asarray(q_b.values[1]).T.tobytes() == stored.tobytes()
    np.testing.assert_array_equal(q_b.scale[1].T, tensors["model.layers.2.self_attn.q_b_proj.weight_scale_inv"])
    whole = from_checkpoint(multiplied_out(tensors), model_config(released), np)[0]["moe_layers"]["self_attn"]["q_b_proj"]
    np.testing.assert_array_equal(q_b.astype(jnp.float32), whole)
    assert q_b.shape == whole.shape
    others = jax.tree.leaves(load(tmp_path, dtype="bfloat16", keep_fp8=True).params)
    assert {a.dtype for a in others} == {jnp.dtype("float8_e4m3fn"), jnp.dtype("float32"), jnp.dtype("bfloat16")}


LAYOUTS = {
    "report": {}, "fully_sharded": {}, "tensor_expert": {"mesh_tensor": 4},
    "report of 2 x 4": {"mesh_data": 2, "mesh_expert": 4},
}  # fmt: skip


@pytest.mark.parametrize("layout", [pytest.param(n, marks=[] if n == "fully_sharded" else pytest.mark.slow) for n in LAYOUTS])
def test_on_a_mesh_each_device_reads_its_slice_alone(tmp_path, layout, monkeypatch):
    released, tensors = fp8_folder(tmp_path, num_nextn_predict_layers=1)
    placed = placement_of(layout.split()[0], 8, **LAYOUTS[layout])
    made = []
    aligned = read.aligned_empty
    monkeypatch.setattr(read, "aligned_empty", lambda shape, dtype: made.append(tuple(shape)) or aligned(shape, dtype))
    loaded = load(tmp_path, placement=placed)
    params, bias = from_checkpoint(multiplied_out(tensors), model_config(released), np)
    check_same_parameters(loaded.params, params)
    np.testing.assert_array_equal(loaded.bias_LE, bias)
    experts = loaded.params["moe_layers"]["mlp"]["experts"]["up_proj"]
    pieces = {tuple(shard.data.shape) for shard in experts.addressable_shards}
    assert len(pieces) == 1 and np.prod(*pieces) < experts.size and experts.shape not in made
    assert sorted(made).count(*pieces) >= experts.size // np.prod(*pieces)


def test_on_a_mesh_of_experts_fp8_is_kept_in_slices(tmp_path):
    _, tensors = fp8_folder(tmp_path)
    up = load(tmp_path, dtype="stored", placement=placement_of("report", 8)).params["moe_layers"]["mlp"]["experts"]["up_proj"]
    for part in (up.values, up.scale):
        assert {shard.data.shape[1] for shard in part.addressable_shards} == {1}
    for shard in up.values.addressable_shards:
        expert = shard.index[1].start
        stored = tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        assert np.asarray(shard.data[0, 0]).T.tobytes() == stored.tobytes()


def test_a_mesh_that_cuts_matrices_refuses_to_keep_fp8(tmp_path):
    fp8_folder(tmp_path)
    with pytest.raises(ValueError, match="FP8 with its scales divides over experts only") as error:
        load(tmp_path, keep_fp8=True, placement=placement_of("fully_sharded", 8))
    assert "\n" not in str(error.value)


def test_an_unknown_dtype_is_refused(tmp_path):
    fp8_folder(tmp_path)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, stored, got 'int8'"):
        unchecked(lambda: load(tmp_path, dtype="int8"))


def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    pytest.skip("needs Linux's /proc")


class Peak:
    """The most anonymous memory while the block runs, sampled, above that at its beginning."""

    def __enter__(self):
        self.bytes, self.start, self.ended = 0, anonymous_bytes(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes() - self.start)

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.bytes = max(self.bytes, anonymous_bytes() - self.start)


@pytest.mark.parametrize("fp8", [None, pytest.param(np.float32, marks=pytest.mark.slow)])
def test_loading_takes_the_arrays_and_little_else(tmp_path, fp8):
    released = released_config(
        hidden_size=512, moe_intermediate_size=512, n_routed_experts=16, vocab_size=8000, num_hidden_layers=4
    )
    tensors = released_tensors(released, seed=0, dtype=BF16, fp8=fp8)
    write_folder(tmp_path, released, tensors)
    largest = max(tensor.nbytes for tensor in tensors.values())  # 8 MB
    del tensors
    load(tmp_path, dtype="bfloat16")  # whatever is set up once
    with Peak() as peak:
        params = jax.block_until_ready(load(tmp_path, dtype="bfloat16").params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert size > 6 * largest and peak.bytes < size + 2 * largest


def test_opening_reads_no_weight(tmp_path, monkeypatch):
    fp8_folder(tmp_path)
    asked, tensor = [], ReleasedFolder.tensor
    monkeypatch.setattr(ReleasedFolder, "tensor", lambda self, name: asked.append(name) or tensor(self, name))
    open_source(tmp_path)
    assert asked and all(name.endswith("_scale_inv") for name in asked)
