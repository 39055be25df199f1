"""Traffic against enumeration of ranks and rows, and what must not change it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.programs import flops, sent_bytes, small, step_jaxpr

from dsv3_jax.planner.chips import chip_named
from dsv3_jax.planner.share import make_share
from dsv3_jax.planner.wire import seconds, traffic
from dsv3_jax.planner.work import executed
from dsv3_jax.presets import preset
from dsv3_jax.settings import override

H800, V5P = chip_named("h800"), chip_named("v5p")
V3 = preset("deepseek_v3_671b")


def share_of(chips, config=None, **changes):
    return make_share(override(config or small(batch_size=64, batch_size_start=64), changes), chips)


def sent(share, chip=H800):
    return {t.key: t.bytes for t in traffic(share, chip)}


def total(found, what):
    return sum(size for key, size in found.items() if key.startswith(what))


@pytest.mark.parametrize("layout", ["report", "fully_sharded"])
def test_a_device_sends_and_computes_what_the_program_says(layout):
    config = small(
        batch_size=16, batch_size_start=16, remat="report", compute_dtype="bfloat16", exchange="ragged", exchange_buffer=1.0,
        layout=layout, mesh_expert=4, mesh_data=2,
    )  # fmt: skip
    share, jaxpr = make_share(config, 8), step_jaxpr(config)
    program, found = sent_bytes(jaxpr, share.sizes), sent(share)
    assert program["ragged_all_to_all", "expert"] == total(found, "dispatch") + total(found, "combine")
    for axis in ("data", "expert"):
        assert program["reduce_scatter", axis] == pytest.approx(total(found, f"scatter.{axis}"))
        if layout == "fully_sharded":  # else the compiler gathers, after the optimiser; gains it gathers in both
            gains = 4 * sum(w.compute for w in share.weights if not w.is_matrix)
            assert 0 < total(found, f"gather.{axis}") - program["all_gather", axis] < gains
    # The exchange's backward pass also says the experts' last product, which nothing reads and the compiler drops.
    model = config.model
    unread = 2 * (model.n_main_moe_layers + 1) * share.rows * model.hidden_size * model.moe_intermediate_size
    assert flops(jaxpr) - unread == executed(share).total * share.tokens


@pytest.mark.parametrize("fp8", ["report", *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in (
    '{"tile": 16}', '{"power_of_two": "nowhere"}', '{"gradient_scaling": "block"}'
))])  # fmt: skip
def test_fp8_sends_what_the_program_says_and_halves_the_dispatch(fp8):
    changes = dict(
        batch_size=16, batch_size_start=16, remat="report", compute_dtype="bfloat16", exchange="ragged", exchange_buffer=1.0,
        layout="report", mesh_expert=4, mesh_data=2,
    )  # fmt: skip
    config, wide = small(**changes, fp8=fp8), small(**changes)
    share = make_share(config, 8)
    program, found, before = sent_bytes(step_jaxpr(config), share.sizes), sent(share), sent(make_share(wide, 8))
    assert program["ragged_all_to_all", "expert"] == total(found, "dispatch") + total(found, "combine")
    assert total(found, "combine") == total(before, "combine")
    gates = 2 * 4 * share.rows * (config.model.n_main_moe_layers + 1) * 3 / 4
    ratio = (total(found, "dispatch") - gates) / (total(before, "dispatch") - gates)
    if fp8 == "report":
        assert ratio == (64 + 1) / (2 * 64)  # one byte a value, one for the scale of all 64, for two
    elif "tile" in fp8:
        assert ratio == (64 + 4) / (2 * 64)
    elif "nowhere" in fp8:  # rounding twice with such scales is not rounding once: sent as it is
        assert ratio == 1
    else:  # scales of several tokens cannot go with each: gradients as they are
        assert ratio == (2 * (64 + 1) + 2 * 64) / (3 * 2 * 64)


def test_one_device_sends_nothing():
    assert traffic(share_of(1), H800) == ()


@settings(max_examples=25)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]))
def test_the_exchange_sends_each_row_as_often_as_the_ranks_that_it_may_go_to(ranks, tensor, node):
    share = share_of(ranks * tensor, layout="report", mesh_expert=ranks, mesh_tensor=tensor, node_size=node)
    found, model = sent(share), share.config.model
    layers, rows = model.n_main_moe_layers + 1, share.tokens * model.num_experts_per_tok
    elsewhere = [rank for rank in range(1, ranks)]
    near = [rank for rank in elsewhere if rank * tensor // node == 0]
    row, gate = model.hidden_size * 4, 4
    for link, targets in (("node", near), ("network", [r for r in elsewhere if r not in near])):
        each = layers * rows / ranks * len(targets)  # x, gate; x, gate, dy again; y; dx, the gate's gradient
        assert found.get(f"dispatch.expert.{link}", 0) == pytest.approx(each * (3 * row + 2 * gate))
        assert found.get(f"combine.expert.{link}", 0) == pytest.approx(each * (2 * row + gate))


@settings(max_examples=25)
@given(st.sampled_from([2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["report", "fully_sharded"]))
def test_a_gather_brings_all_but_the_own_piece_however_the_nodes_lie(ranks, node, layout):
    share = share_of(ranks, layout=layout, mesh_expert=1, mesh_data=ranks, node_size=node, remat="none")
    found = sent(share)
    gains = sum(w.compute for w in share.weights if not w.is_matrix)
    matrices = sum(w.compute for w in share.weights if w.is_matrix)
    embedding = share.config.model.vocab_size * share.config.model.hidden_size  # looked up for main model and MTP
    elements = gains + matrices + (embedding if layout == "fully_sharded" else 0)
    assert total(found, "gather") == pytest.approx(4 * elements * (ranks - 1) / ranks)
    assert total(found, "scatter") == pytest.approx(total(found, "gather"))
    if ranks > node:
        nodes = ranks // node  # a node takes in what it lacks once, its devices share the work
        assert found["gather.data.network"] == pytest.approx(4 * elements * (nodes - 1) / nodes / node)
    else:
        assert "gather.data.network" not in found


def test_weights_are_gathered_again_for_the_backward_pass_unless_they_are_kept():
    kept, again = (
        total(sent(share_of(8, layout="fully_sharded", mesh_expert=1, remat=r)), "gather") for r in ("none", "report")
    )
    share = share_of(8, layout="fully_sharded", mesh_expert=1)
    layers = sum(w.compute for w in share.weights if w.is_matrix and "layers" in w.spec.axes)
    assert again - kept == pytest.approx(4 * layers * 7 / 8)


def test_micro_batches_repeat_the_gathers_of_pieces_but_not_those_of_a_step():
    def gathers(layout, micro):
        return total(sent(share_of(8, layout=layout, mesh_expert=1, micro_batch_size=micro)), "gather")

    assert gathers("report", 16) == gathers("report", 64)
    assert gathers("fully_sharded", 16) == pytest.approx(4 * gathers("fully_sharded", 64), rel=1e-2)  # gains once a step


def test_tensor_ranks_sum_two_results_a_block_and_their_gradients():
    share = share_of(2, layout="report", mesh_expert=1, mesh_tensor=2)
    m = share.config.model
    blocks, d = m.num_hidden_layers + 1, m.hidden_size
    latents = m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim
    channels = blocks * (3 * d + latents) + 2 * d + 2 * d  # two results, two gradients; embeddings; the heads' gradients
    elements = share.tokens * (channels + 3 * 2)  # three scalars of each depth's loss
    assert total(sent(share), "all_reduce") == pytest.approx(4 * elements)  # 2 (n - 1) / n of it


def test_a_torus_carries_what_nodes_and_network_carry_together():
    share = share_of(512, V3, layout="fully_sharded", mesh_expert=64)
    gpu, tpu = sent(share), sent(share, V5P)
    assert {key.split(".")[-1] for key in tpu} == {"ici"}
    assert sum(tpu.values()) == pytest.approx(sum(gpu.values()))


def test_an_exchange_takes_longer_on_a_larger_torus_and_a_gather_does_not():
    share = share_of(512, V3, layout="fully_sharded", mesh_expert=64)
    hops = {t.what: t.hops for t in traffic(share, V5P)}
    assert hops["dispatch"] == pytest.approx(3 * 4 / 4) and hops["gather"] == 1  # 4 x 4 x 4: one hop in each dimension
    found = next(t for t in traffic(share, V5P) if t.what == "dispatch")
    assert seconds(found, V5P) == pytest.approx(found.bytes * 3 / 600e9)


def test_crossing_nodes_is_what_a_larger_node_saves():
    shares = [share_of(64, V3, layout="report", batch_size=64, batch_size_start=64, node_size=n) for n in (1, 8, 64)]
    crossing = [sum(t.bytes for t in traffic(s, H800) if t.link == "network") for s in shares]
    everything = [sum(t.bytes for t in traffic(s, H800)) for s in shares]
    assert crossing[0] > crossing[1] > crossing[2] == 0
    assert math.isclose(everything[0], everything[1]) and math.isclose(everything[0], everything[2])
