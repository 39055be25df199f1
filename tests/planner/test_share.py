"""What one device has of a run: neighbours by enumeration, pieces, and runs that do not divide."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.programs import small

from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.planner.share import Matrix, Share, component, make_share, matrix, whole
from dsv3_jax.presets import preset
from dsv3_jax.settings import override

V3 = preset("deepseek_v3_671b")
POWERS = st.sampled_from([1, 2, 4, 8])


@given(st.tuples(POWERS, POWERS, POWERS, POWERS), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from(AXES))
def test_ranks_in_a_node_are_those_of_an_enumeration(sizes, node, axis):
    config = override(small(), {"node_size": node})
    share = Share(config, dict(zip(AXES, sizes, strict=True)), 1, 1, ())
    places = list(itertools.product(*map(range, sizes)))  # in the order of the mesh's devices
    along = [i for i, place in enumerate(places) if all(x == 0 or name == axis for name, x in zip(AXES, place, strict=True))]
    assert share.in_node(axis) == sum(i < node for i in along)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("moe_layers.mlp.gate", "router"),
        ("moe_layers.mlp.experts.gate_proj", "routed_experts"),
        ("moe_layers.mlp.shared_experts.up_proj", "shared_experts"),
        ("dense_layers.mlp.gate_proj", "dense_mlp"),
        ("moe_layers.self_attn.q_a_layernorm", "attention"),
        ("moe_layers.post_attention_layernorm", "norms"),
        ("mtp.block.mlp.experts.up_proj", "mtp"),
        ("norm", "norms"),
    ],
)
def test_a_parameter_s_component_follows_from_its_path(name, expected):
    assert component(name) == expected


def test_a_parameter_as_matrices_has_its_heads_on_one_side():
    weights = {w.name: matrix(w.spec.axes, w.spec.shape) for w in whole(V3) if w.is_matrix}
    assert weights["moe_layers.self_attn.q_b_proj"] == Matrix(58, 1536, 128 * 192)
    assert weights["moe_layers.self_attn.o_proj"] == Matrix(58, 128 * 128, 7168)
    assert weights["moe_layers.mlp.experts.down_proj"] == Matrix(58 * 256, 2048, 7168)


def test_a_device_has_its_share_of_sequences_and_pieces():
    config = override(V3, {"layout": "report", "mesh_pipe": 16, "micro_batch_size": 1024})
    share = make_share(config, 1024)
    assert (share.sequences, share.micro_batches, share.tokens, share.rows) == (1, 15, 4096, 8 * 4096)
    experts = next(w for w in share.weights if w.name == "moe_layers.mlp.experts.up_proj")
    assert experts.compute * 64 == 58 * 256 * 7168 * 2048 and experts.state * 16 == experts.compute
    assert experts.added == ("pipe",)


@pytest.mark.parametrize(
    ("settings", "chips", "message"),
    [
        ({}, 2048, "--chips: layout single uses 1 device, got 2048"),
        ({"layout": "report"}, 0, "--chips: expected at least 1"),
        ({"layout": "report", "mesh_data": 3}, 512, "mesh: .* expected 512"),
        ({"layout": "report", "mesh_pipe": 8, "batch_size": 768, "batch_size_start": 768}, 512, "nearest .* 512 and 1024"),
        ({"layout": "report", "micro_batch_size": 96}, 128, "micro_batch_size: 96 .* are 128"),
        ({"layout": "tensor_expert", "mesh_tensor": 3}, 192, "mesh axis 'tensor'"),
        ({"experts_implementation": "dense"}, 1, "experts_implementation"),
    ],
)
def test_a_run_that_does_not_divide_is_refused_in_one_line(settings, chips, message):
    with pytest.raises(ValueError, match=message) as error:
        make_share(override(V3, settings), chips)
    assert "\n" not in str(error.value)
