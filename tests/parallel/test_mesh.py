"""Mesh and rules: sizes, shapes of pieces, and errors that name the parameter and the axis."""

import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.config import ParallelConfig
from dsv3_jax.model.module import logical_axes, model_spec
from dsv3_jax.model.spec import Spec, gain
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import AXES, BATCH_AXES, LAYOUTS, make_mesh, mesh_shape
from dsv3_jax.parallel.rules import RULES, compute_dims, compute_specs, map_specs, state_dims, state_specs
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override
from dsv3_jax.training.step import abstract_state, state_shardings


def sizes(**given: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | given


@given(
    n_devices=st.integers(1, 4096),
    layout=st.sampled_from(sorted(LAYOUTS)),
    n_experts=st.sampled_from([8, 16, 60, 64, 160, 256]),
)
def test_every_layout_has_a_mesh_of_any_number_of_devices(n_devices, layout, n_experts):
    shape = mesh_shape(ParallelConfig(layout=layout), n_devices, n_experts)
    assert tuple(shape) == AXES and math.prod(shape.values()) == (1 if layout == "single" else n_devices)
    assert n_experts % shape["expert"] == 0


def test_the_layouts_are_those_of_the_report():
    assert mesh_shape(ParallelConfig(layout="report", mesh_pipe=16), 2048, 256) == sizes(pipe=16, data=2, expert=64)
    assert mesh_shape(ParallelConfig(layout="fully_sharded"), 512, 256) == sizes(data=512)
    assert mesh_shape(ParallelConfig(layout="tensor_expert", mesh_tensor=2), 8, 16) == sizes(expert=4, tensor=2)


@pytest.mark.parametrize("given, got", [({"mesh_expert": 3}, "= 6"), ({"mesh_data": 3, "mesh_expert": 4}, "= 12")])
def test_sizes_that_do_not_multiply_to_the_devices_are_one_line(given, got):
    with pytest.raises(ValueError, match="expected 8") as error:
        mesh_shape(ParallelConfig(layout="report", **given), 8, 16)
    assert got in str(error.value) and "mesh_expert" in str(error.value) and "\n" not in str(error.value)


def test_a_mesh_names_its_axes_and_keeps_an_expert_group_on_neighbouring_devices():
    config = override(preset("tiny"), {"layout": "report", "mesh_expert": 4})
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
    assert [[d.id for d in row] for row in mesh.devices.reshape(2, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_mesh(preset("tiny")).size == 1  # the layout `single` takes one of the eight


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_logical_axis_of_every_model_has_a_rule(name):
    axes = {axis for spec in jax.tree.leaves(logical_axes(preset(name).model), is_leaf=_is_spec) for axis in spec}
    assert axes <= set(RULES), axes - set(RULES)


def _is_spec(node):
    return isinstance(node, PartitionSpec)


def test_errors_name_the_parameter_and_the_axis():
    spec = Spec((6, 10), ("experts", "embed"))
    with pytest.raises(ValueError, match=r"mlp\.w: experts of 6 does not divide over mesh axis 'expert' of 4"):
        compute_dims("mlp.w", spec, sizes(expert=4))
    with pytest.raises(ValueError, match=r"mlp\.w: no dimension of .* divides over mesh axis 'data' of 7"):
        state_dims("mlp.w", spec, sizes(data=7))
    with pytest.raises(ValueError, match=r"x: mesh axis 'tensor' is used twice"):
        compute_dims("x", Spec((4, 4), ("vocab", "heads")), sizes(tensor=2))
    with pytest.raises(ValueError, match=r"x: logical axis 'color' has no rule"):
        compute_dims("x", Spec((4,), ("color",)), sizes())
    config = override(preset("tiny"), {"layout": "report", "mesh_data": 1, "mesh_expert": 8, "n_routed_experts": 12})
    with pytest.raises(ValueError, match="moe_layers.mlp.experts.*experts of 12 does not divide"):
        state_shardings(config, Placement(make_mesh(config), config.parallel))


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8)).map(lambda t: (t[0], 2 ** t[1], 3 * 2 ** t[2])),
    mesh=st.fixed_dictionaries({axis: st.sampled_from([1, 2, 4, 3]) for axis in AXES}),
)
def test_state_pieces_divide_and_use_each_data_axis_once(shape, mesh):
    spec = Spec(shape, ("layers", "heads", "embed"))
    try:
        dims = state_dims("w", spec, mesh)
    except ValueError:
        return
    used = [axis for dim in dims for axis in dim]
    assert len(used) == len(set(used)) and not dims[0], "layers are scanned, never divided"
    assert {axis for axis in BATCH_AXES if mesh[axis] > 1} <= set(used)
    for size, dim, coarse in zip(shape, dims, compute_dims("w", spec, mesh), strict=True):
        assert size % math.prod(mesh[axis] for axis in dim) == 0 and dim[: len(coarse)] == coarse


def test_the_axis_within_a_node_cuts_first_and_takes_the_first_dimension_that_it_divides():
    mesh = sizes(pipe=2, data=8, expert=64)
    table = Spec((129280, 7168), ("vocab", "embed"))
    assert state_dims("lm_head", table, mesh) == (("expert", "pipe"), ("data",))
    assert state_dims("o_proj", Spec((3, 128, 128, 7168), ("layers", "heads", "head_dim", "embed")), mesh) == (
        (), ("expert", "pipe"), ("data",), (),
    )  # fmt: skip
    experts = Spec((3, 256, 2048, 7168), ("layers", "experts", "expert_mlp", "embed"))
    assert state_dims("down_proj", experts, mesh) == ((), ("expert",), ("data", "pipe"), ())
    odd = Spec((3, 256, 9, 9), ("layers", "experts", "expert_mlp", "embed"))
    assert state_dims("odd", odd, mesh | {"data": 1}) == ((), ("expert", "pipe"), (), ())


def test_a_gain_that_nothing_divides_stays_whole_where_a_matrix_is_refused():
    assert state_dims("norm", gain(6, "embed"), sizes(data=4)) == ((),)
    with pytest.raises(ValueError, match="w: no dimension"):
        state_dims("w", Spec((6, 5), ("embed", "q_lora")), sizes(data=4))


@pytest.mark.parametrize("ranks", [{"data": 8, "expert": 64}, {"data": 16, "expert": 64}, {"data": 64, "expert": 64},
                                   {"pipe": 16, "data": 2, "expert": 64}])  # fmt: skip
def test_the_671b_state_is_spread_over_every_device_but_for_a_millionth(ranks):
    spec, mesh = model_spec(preset("deepseek_v3_671b").model), sizes(**ranks)
    pieces = {}

    def piece(name, spec):
        dims = state_dims(name, spec, mesh)
        pieces[name] = math.prod(spec.shape) // math.prod(mesh[axis] for dim in dims for axis in dim)

    map_specs(piece, spec)
    total = sum(math.prod(s.shape) for s in jax.tree.leaves(spec, is_leaf=lambda s: isinstance(s, Spec)))
    assert sum(pieces.values()) < total / math.prod(ranks.values()) * (1 + 1e-3)


@pytest.mark.parametrize("layout", ["report", "fully_sharded"])
def test_moments_are_in_pieces_whatever_the_parameters_are(layout):
    config = override(preset("tiny"), {"layout": layout, "mesh_data": 2, "mesh_expert": 4, "param_dtype": "bfloat16"})
    placement = Placement(make_mesh(config), config.parallel)
    shardings = state_shardings(config, placement)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract_state(config))
    spec = model_spec(config.model)
    compute, state = compute_specs(spec, placement.sizes), state_specs(spec, placement.sizes)
    for tree in (shardings.opt_state.mu, shardings.opt_state.nu, shardings.opt_state.master):
        assert jax.tree.map(lambda s: s.spec, tree) == state
    matrix = shardings.params["moe_layers"]["self_attn"]["q_a_proj"].spec
    expected = PartitionSpec(None, ("expert", "data"), None) if layout == "fully_sharded" else PartitionSpec(None, None, None)
    assert matrix == expected
    experts = shardings.params["moe_layers"]["mlp"]["experts"]["down_proj"].spec
    assert experts[1:3] == ("expert", "data" if layout == "fully_sharded" else None)
    assert shardings.params["norm"].spec == compute["norm"]
