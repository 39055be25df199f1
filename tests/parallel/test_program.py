"""What the compiled step sends, and how its results lie: read from the program, so that a silent copy or gather fails."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ParallelConfig
from dsv3_jax.model.module import model_spec
from dsv3_jax.model.spec import Spec
from dsv3_jax.moe.experts import routed_experts
from dsv3_jax.moe.layer import moe, moe_spec
from dsv3_jax.parallel.all_to_all import buffer_rows
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.rules import compute_dims, map_specs, partition_spec
from dsv3_jax.planner.hlo import axes_of, cost_of
from dsv3_jax.training import step as training
from oracles.compiling import QUICK
from oracles.mesh_cells import LENGTH, ROWS, Cell, cell_batch, cell_config, first_state

HYPER = training.Hyper(*(jnp.float32(value) for value in (1e-3, 1e-3, 0.3)))


@functools.cache
def compiled(name, **settings):
    config = cell_config(name, moe_intermediate_size=40, **settings)  # a size that no other weight has
    cell = Cell(config)
    state, batch = cell.put(first_state(config)), cell.put_batch(cell_batch(0, 1))
    step = training.make_train_step(config, 2, cell.placement)
    program = step.lower(state, batch, HYPER).compile(compiler_options=QUICK)
    return config, cell.placement, program, program(state, batch, HYPER)[0]


def expert_bytes(config, ranks):
    """Bytes that a gather of expert weights would have: of a layer or of all, one rank's or everybody's."""
    sizes = set()

    def visit(name, spec: Spec):
        if "experts" in spec.axes:
            layers, *piece = spec.shape
            for n in (1, layers):
                sizes.add(n * math.prod(piece) * 4)
                sizes.add(n * math.prod(piece) * 4 // ranks)

    map_specs(visit, model_spec(config.model))
    return sizes


def test_expert_parallel_layout_never_gathers_expert_weights_and_sends_what_the_plan_says():
    config, placement, program, state = compiled("EP 8")
    collectives = cost_of(program.as_text()).collectives
    gathers = [c for c in collectives if c.kind == "all-gather"]
    assert gathers and not {c.result_bytes for c in gathers} & expert_bytes(config, 8)
    rows = buffer_rows(ROWS // 8 * LENGTH, 4, 8, 16, 1.25)
    exchanges = [c for c in collectives if c.kind == "all-to-all"]
    assert {axes_of(c.groups, placement.sizes) for c in exchanges} == {("expert",)}
    hidden = config.model.hidden_size
    assert {c.result_bytes for c in exchanges} == {rows * hidden * 4, rows * 4}
    # of each MoE layer (one by scan, one of MTP): x, gates, y forward; x, gates, dy, dx, dgates backward
    assert sum(c.times for c in exchanges) == 2 * 8 and all(c.dynamic for c in exchanges)
    largest = max(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(state.params))
    assert max(c.result_bytes for c in collectives) <= max(largest, rows * hidden * 4)


@pytest.mark.parametrize("name", ["EP 8", "FSDP 2 x EP 4"])
def test_results_lie_as_the_layout_says(name):
    config, placement, _, state = compiled(name)
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(training.state_shardings(config, placement)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)
    experts = state.params["moe_layers"]["mlp"]["experts"]["gate_proj"]
    in_pieces = name.startswith("FSDP")
    assert experts.sharding.spec == P(None, "expert", "data" if in_pieces else None, None)
    pieces = {shard.data.shape for shard in experts.addressable_shards}
    assert pieces == {(1, 16 // placement.sizes["expert"], 64 // (2 if in_pieces else 1), 40)}
    moment = state.opt_state.mu["moe_layers"]["self_attn"]["o_proj"]
    assert {shard.data.size for shard in moment.addressable_shards} == {moment.size // 8}


@pytest.mark.parametrize("implementation", ["bucketed", "ragged_dot"])
def test_tensor_ranks_sum_the_gradients_of_tokens_and_not_of_rows(implementation):
    """A routed row is a copy of a token: top_k times as many of them, were they summed before they are added up."""
    tokens, hidden, width, experts, top_k = 24, 8, 6, 4, 2
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    indices = jnp.stack([jnp.arange(tokens) % experts, (jnp.arange(tokens) + 1) % experts], axis=1).astype(jnp.int32)
    up, down = P(None, None, "tensor"), P(None, "tensor", None)
    weights = {"gate_proj": up, "up_proj": up, "down_proj": down}

    def loss(x, gates, weights):
        y = routed_experts(x, indices, gates, weights, implementation=implementation)
        return jnp.square(jax.lax.psum(y, "tensor")).sum()

    gradient = jax.shard_map(jax.grad(loss, argnums=(0, 1)), mesh=mesh, in_specs=(P(), P(), weights), out_specs=P())
    shapes = {"gate_proj": (experts, hidden, width), "up_proj": (experts, hidden, width), "down_proj": (experts, width, hidden)}
    like = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, hidden), (tokens, top_k))]
    program = (
        jax.jit(gradient).lower(*like, {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}).compile()
    )
    sums = [c.operand_bytes for c in cost_of(program.as_text()).collectives if c.kind == "all-reduce"]
    assert sum(sums) == 4 * (2 * tokens * hidden + tokens * top_k)  # y and dx, and the gates' gradients


def test_tensor_ranks_sum_a_gradient_once_whatever_reads_the_tokens():
    """In a layer with shared experts: y and dx of all experts, the gates' gradients, and the router's scores none."""
    config = cell_config("EP 4 x TP 2", mesh_expert=1).model
    placement = Placement(Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 1, 2), AXES), ParallelConfig(layout="tensor_expert"))
    specs = map_specs(lambda name, spec: partition_spec(compute_dims(name, spec, placement.sizes)), moe_spec(config))
    tokens, hidden = 24, config.hidden_size

    def loss(x, params):
        return jnp.square(moe(params, jnp.zeros(config.n_routed_experts), x, config, placement)[0]).sum()

    gradient = jax.shard_map(jax.grad(loss), mesh=placement.mesh, in_specs=(P(), specs), out_specs=P())
    shapes = map_specs(lambda name, spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), moe_spec(config))
    program = jax.jit(gradient).lower(jax.ShapeDtypeStruct((1, tokens, hidden), jnp.float32), shapes).compile()
    sums = [c.operand_bytes for c in cost_of(program.as_text()).collectives if c.kind == "all-reduce"]
    assert sum(sums) == 4 * (2 * tokens * hidden + tokens * config.num_experts_per_tok)
