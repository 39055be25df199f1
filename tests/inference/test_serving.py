"""A model laid out for decoding: from memory and from a folder the same, and nothing of it lost."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import serving
from dsv3_jax.inference.serving import experts_apart, from_params, read
from dsv3_jax.interop.source import open_source
from dsv3_jax.weights import is_stored
from oracles.decoding import TINY
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.random_checkpoint import tensor_shapes
from oracles.released_folder import multiplied_out, released_config, released_tensors, write_folder


def equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.fixture(params=["each by itself", "stacked"])
def layout(request, monkeypatch):
    if request.param == "stacked":
        monkeypatch.setattr(serving, "MOST_APART", 0)
    return request.param


@pytest.mark.parametrize("fields", [{"num_nextn_predict_layers": 1}, {"q_lora_rank": None, "tie_word_embeddings": True}])
def test_a_folder_is_read_as_from_parameters_in_memory(fields, layout, tmp_path):
    released = released_config(**TINY | fields)
    tensors = released_tensors(released, seed=1)
    write_folder(tmp_path, released, tensors)
    source = open_source(tmp_path)
    from_memory = from_params(*from_checkpoint(tensors, source.config), source.config)
    assert equal_trees(read(source.tensors, source.config, "float32"), from_memory)
    assert isinstance(from_memory.layers[1][0]["mlp"]["experts"]["down_proj"], tuple) == (layout == "each by itself")


def test_fp8_weights_stay_as_stored_or_are_multiplied_out(tmp_path):
    released = released_config(**TINY)
    tensors = released_tensors(released, seed=1, fp8=np.float32)
    write_folder(tmp_path, released, tensors)
    source = open_source(tmp_path)
    expected = from_params(*from_checkpoint(multiplied_out(tensors), source.config), source.config)
    assert equal_trees(read(source.tensors, source.config, "float32"), expected)
    kept = read(source.tensors, source.config, "float32", keep_fp8=True)
    own = kept.layers[1][0]["mlp"]["experts"]["down_proj"][2]
    assert is_stored(own) and own.dtype == jnp.float8_e4m3fn
    assert np.array_equal(own.astype(jnp.float32), expected.layers[1][0]["mlp"]["experts"]["down_proj"][2])
    x = jnp.ones((1, released["hidden_size"]))
    names = ("q_a_proj", "kv_a_proj_with_mqa")
    products = [serving.joined(m.layers[0][0]["self_attn"], names, x) for m in (kept, expected)]
    np.testing.assert_allclose(*products, atol=1e-6)


def test_no_weight_is_lost_or_held_twice(layout):
    released = TINY | {"num_nextn_predict_layers": 2}
    config, shapes = model_config(released), tensor_shapes(released)

    def laid_out():
        return from_params(*from_checkpoint({name: jnp.zeros(shape) for name, shape in shapes.items()}, config), config)

    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(laid_out))) == sum(map(math.prod, shapes.values()))


def test_experts_are_apart_where_they_are_few():
    config = model_config(TINY | {"num_nextn_predict_layers": 1})
    assert experts_apart(config)  # 2 layers of 4
    many = model_config(TINY | {"n_routed_experts": 1026, "n_group": 2})
    assert not experts_apart(many)
