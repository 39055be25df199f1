"""Names and shapes of released tensors, for any configuration, against the table of the random checkpoints."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.interop.check import wanted_tensors
from dsv3_jax.interop.config_json import model_config
from dsv3_jax.interop.names import copies, leaves
from oracles.random_checkpoint import tensor_shapes
from oracles.released_folder import released_config

CONFIGS = st.builds(
    lambda layers, dense, depth, q_lora, shared, tied, method: released_config(
        num_hidden_layers=layers, first_k_dense_replace=min(dense, layers), num_nextn_predict_layers=depth, q_lora_rank=q_lora,
        n_shared_experts=shared, tie_word_embeddings=tied, topk_method=method,
    ),
    st.integers(1, 4), st.integers(0, 4), st.integers(0, 2), st.sampled_from([None, 7]), st.integers(0, 2), st.booleans(),
    st.sampled_from(["noaux_tc", "greedy", "group_limited_greedy"]),
)  # fmt: skip


@given(CONFIGS)
def test_a_model_is_made_of_the_tensors_of_its_released_form(released):
    expected = tensor_shapes(released)
    if released["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    wanted = list(wanted_tensors(model_config(released, "config.json")))
    assert len(dict(wanted)) == len(wanted)
    assert dict(wanted) == expected


def test_copies_follow_the_depth_and_the_tie():
    config = model_config(released_config(num_hidden_layers=5, num_nextn_predict_layers=2), "config.json")
    assert copies(config) == {
        "model.layers.5.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.5.shared_head.head.weight": "lm_head.weight",
        "model.layers.6.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.6.shared_head.head.weight": "lm_head.weight",
    }
    tied = model_config(released_config(num_nextn_predict_layers=1, tie_word_embeddings=True), "config.json")
    assert set(copies(tied).values()) == {"model.embed_tokens.weight"} and "lm_head.weight" in copies(tied)


@pytest.mark.parametrize("part", ["self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_matrix_turned_to_our_side_and_back_is_the_same(part):
    tree = leaves(model_config(released_config(), "config.json"))["dense_layers"]
    for key in part.split("."):
        tree = tree[key]
    released = np.arange(np.prod(tree.released_shape)).reshape(tree.released_shape)
    ours = tree.ours(released)
    assert ours.shape == tree.sides and ours.flat[1] == (released[0, 1] if tree.n_in == 0 else released[1, 0])
    np.testing.assert_array_equal(tree.released(ours), released)
