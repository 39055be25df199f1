"""What the compiled step sends, and how its results lie: read from the program, so that a silent copy or gather fails."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.module import model_spec
from dsv3_jax.model.spec import Spec
from dsv3_jax.parallel.all_to_all import buffer_rows
from dsv3_jax.parallel.rules import map_specs
from dsv3_jax.planner.hlo import axes_of, cost_of
from dsv3_jax.training import step as training
from oracles.compiling import QUICK
from oracles.mesh_cells import LENGTH, ROWS, Cell, cell_batch, cell_config, first_state

HYPER = training.Hyper(*(jax.numpy.float32(value) for value in (1e-3, 1e-3, 0.3)))


def compiled(name, **settings):
    config = cell_config(name, **settings)
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
    config, placement, program, state = compiled("EP 8", moe_intermediate_size=40)  # a size that no other weight has
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
    assert pieces == {(1, 16 // placement.sizes["expert"], 64 // (2 if in_pieces else 1), 32)}
    moment = state.opt_state.mu["moe_layers"]["self_attn"]["o_proj"]
    assert {shard.data.size for shard in moment.addressable_shards} == {moment.size // 8}


def test_tensor_ranks_sum_the_gradients_of_tokens_and_not_of_rows():
    """A routed row is a copy of a token: top_k times as many of them, were they summed before they are added up."""

    def sent(implementation):
        _, placement, program, _ = compiled("EP 4 x TP 2", mesh_expert=1, experts_implementation=implementation)
        found = cost_of(program.as_text()).collectives
        return sum(c.operand_bytes * c.times for c in found if axes_of(c.groups, placement.sizes) == ("tensor",))

    assert sent("ragged_dot") == sent("bucketed")
