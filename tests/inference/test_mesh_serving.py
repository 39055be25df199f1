"""Serving on a mesh [§3.4]: the report's units, tokens as on one device, replicas that serve, and experts moved to others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import deploy
from dsv3_jax.inference.decode import extend, make_cache
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.mesh import LAYOUTS, expected_loads, placed, serving_placement
from dsv3_jax.inference.placement import (
    Replicas,
    device_loads,
    expert_rows,
    fullest_over_mean,
    place_experts,
    slot_rows_by_device,
)  # fmt: skip
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.score import InMemory, score
from dsv3_jax.inference.serving import from_params, quantised
from dsv3_jax.interop.read import load_bias, load_parameters
from dsv3_jax.interop.source import open_source
from oracles.cases import DATA
from oracles.decoding import TINY
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.random_checkpoint import random_tensors

PROMPTS = [[1, 2, 3], [1, 4, 5, 2, 7, 3, 3], [5, 4, 3, 2], [9, 9, 1, 0, 2], [4, 4]]
NEW = 10
MESHES = {
    "decode, 4 expert x 2 tensor": ("decode", {"spare": 1}),
    "prefill, 8 expert": ("prefill", {"tensor": 1}),
    "prefill, 2 data x 2 expert x 2 tensor": ("prefill", {"data": 2, "spare": 2}),
    "decode, 2 tensor ranks alone": ("decode", {"devices": 2}),
    "decode, 8 data": ("decode", {"tensor": 1, "data": 8}),
}
SLOW = [pytest.param(name, marks=[] if i < 2 else pytest.mark.slow) for i, name in enumerate(MESHES)]


@functools.cache
def model(**changes):
    """(config, parameters, bias): two shared experts, two MTP modules, a router that likes some experts."""
    released = TINY | {"n_shared_experts": 2, "num_hidden_layers": 3, "num_nextn_predict_layers": 2}
    tensors = random_tensors(released, 1)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name] + np.array([0.0, 0.3, 0.0, 0.1])
    config = model_config(released, **{"experts_implementation": "auto"} | changes)
    return config, *from_checkpoint(tensors, config)


def placement_of(name, config):
    layout, how = MESHES[name]
    how = dict(how)
    return serving_placement(layout, config, jax.devices()[: how.pop("devices", 8)], **how)


@functools.cache
def deployed(name):
    config, params, bias = model()
    return deploy.from_params(params, bias, config, placement_of(name, config))


@functools.cache
def alone(**options):
    config, params, bias = model()
    return generate(from_params(params, bias, config), config, PROMPTS, max_new_tokens=NEW, chunk=4, **options)


def continued(serving, **options):
    return generate(serving, model()[0], PROMPTS, max_new_tokens=NEW, chunk=4, **options)


# Where things lie ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, devices, expert_ranks, each, copies", [("prefill", 32, 8, 9, 32), ("decode", 320, 80, 1, 63)])
def test_the_reports_units_for_prompts_and_for_decoding(layout, devices, expert_ranks, each, copies):
    """TP4 x DP8 and EP32 with a redundant expert each; TP4 x DP80 and EP320, one expert each, the shared one among 257."""
    config = ModelConfig()
    placement = serving_placement(layout, config, [object() for _ in range(devices)])
    assert (placement.sizes["expert"], placement.sizes["tensor"]) == (expert_ranks, 4)
    slots = placement.n_slots(config)
    assert slots == each * devices and slots - placement.n_experts(config) == copies
    replicas = placed(config, placement)
    assert replicas.phy2log.shape == (59, slots) and replicas.logcnt.min() == 1
    loads = device_loads(expected_loads(config, placement), replicas, devices).after
    assert fullest_over_mean(loads).max() < 1.4
    if layout == "decode":  # a token has nine experts, and one of them is always the shared one
        assert replicas.logcnt[0, 256] > 30


def test_groups_of_experts_stay_on_a_node_where_they_divide():
    config = ModelConfig()
    placement = serving_placement("prefill", config, [object() for _ in range(32)])
    loads = np.random.default_rng(0).integers(1, 1000, (59, 256))
    groups = placed(config, placement, loads).phy2log.reshape(59, 4, 72) // 32
    assert all(len(set(node.tolist())) == 2 for layer in groups for node in layer)


@pytest.mark.parametrize("name", [*list(MESHES)[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in list(MESHES)[2:])])
def test_a_device_has_its_heads_its_slots_and_its_sequences_caches(name):
    config, params, _ = model()
    serving, sizes = deployed(name), placement_of(name, config).sizes
    _, stack = serving.layers
    slots = placement_of(name, config).n_slots(config)

    def local(array):
        return array.sharding.shard_shape(array.shape)

    mlp, heads = stack.params["mlp"], config.num_attention_heads // sizes["tensor"]
    assert local(mlp["experts"]["up_proj"]) == (2, slots // (sizes["expert"] * sizes["tensor"]), 16, 8)
    assert local(stack.params["self_attn"]["k_up"])[1] == heads
    assert local(serving.layers[0].params["mlp"]["up_proj"]) == (1, 16, 20), "dense layers are whole"
    assert ("shared_experts" in mlp) == (MESHES[name][0] == "prefill")
    cache = make_cache(config, 16, 32, depths=2, model=serving)
    assert [rows.shape[0] for rows in (*cache.layers, *cache.depths)] == [1, 2, 1, 1]
    groups = sizes["data"] * sizes["expert"]
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert {local(rows)[1:] for rows in cache.layers} == {(16 // groups, 32, width)}
    for layer in range(2):
        for slot, expert in enumerate(np.asarray(stack.replicas.phy2log)[layer]):
            for matrix, weight in mlp["experts"].items():
                np.testing.assert_array_equal(weight[layer, slot], expert_of(params, matrix, layer, expert))


def expert_of(params, matrix, layer, expert):
    mlp = params["moe_layers"]["mlp"]
    if expert < 4:
        return mlp["experts"][matrix][layer, expert]
    part = slice(8 * (expert - 4), 8 * (expert - 3))  # of one MLP, as wide as two experts
    whole = mlp["shared_experts"][matrix][layer]
    return whole[part] if matrix == "down_proj" else whole[:, part]


# What comes out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLOW)
def test_greedy_tokens_are_those_of_one_device_whatever_the_mesh(name):
    got = continued(deployed(name))
    assert got.tokens == alone().tokens and got.statistics.close == alone().statistics.close == 0
    assert got.statistics.prompt_tokens == sum(map(len, PROMPTS)) and got.statistics.new_tokens == NEW * len(PROMPTS)


@pytest.mark.parametrize("name", SLOW)
def test_hidden_states_are_those_of_one_device(name):
    """Three new tokens of eight sequences, absorbed, of which the first lie at different positions."""
    config, params, bias = model()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 3), dtype=np.int32)
    start_B = jnp.arange(8, dtype=jnp.int32)
    states = []
    for serving in (deployed(name), from_params(params, bias, config)):
        rows = make_cache(config, 8, 16, model=serving).layers
        step = jax.jit(functools.partial(extend, config=config, absorbed=True))
        states.append(np.asarray(step(serving, rows, tokens, start_B)[0].residual_BTD))
    # float32, sums of other order, of states about 3; a gate that is off by a hundredth moves them by a hundred times more
    np.testing.assert_allclose(*states, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in list(MESHES)[:3]])
def test_drawn_tokens_are_those_of_one_device(name):
    drawn = Sampling(temperature=0.8, top_p=0.9, seed=7)
    assert continued(deployed(name), sampling=drawn).tokens == alone(sampling=drawn).tokens != alone().tokens


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in list(MESHES)[:3]])
def test_drafts_are_accepted_as_on_one_device(name):
    got, expected = continued(deployed(name), speculative=True), alone(speculative=True)
    assert got.tokens == expected.tokens == alone().tokens
    assert (got.statistics.accepted, got.statistics.steps) == (expected.statistics.accepted, expected.statistics.steps)


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [False, True])
def test_prompts_may_be_computed_on_another_mesh_whose_caches_then_move(speculative):
    """The report's two units: half of the devices lay out for prompts, the others for decoding."""
    config, params, bias = model()
    units = {"prefill": jax.devices()[:4], "decode": jax.devices()[4:]}
    prompts, decoding = (
        deploy.from_params(params, bias, config, serving_placement(layout, config, devices))
        for layout, devices in units.items()
    )
    got = continued(decoding, prefiller=prompts, speculative=speculative)
    assert got.tokens == alone().tokens and got.statistics.accepted == alone(speculative=speculative).statistics.accepted
    assert got.count_LR.shape == (2, 8) and got.count_LR.sum() == 2 * 4 * got.statistics.steps * (3 if speculative else 1)
    with pytest.raises(ValueError, match="deploy both"):
        continued(from_params(params, bias, config), prefiller=prompts)


@pytest.mark.slow
def test_bfloat16_is_served_too():
    config, params, bias = model(compute_dtype="bfloat16")
    serving = deploy.from_params(params, bias, config, placement_of("decode, 4 expert x 2 tensor", config))
    got = generate(serving, config, PROMPTS, max_new_tokens=NEW, chunk=4)
    expected = generate(from_params(params, bias, config), config, PROMPTS, max_new_tokens=NEW, chunk=4)
    same = [a == b for a, b in zip(got.tokens, expected.tokens, strict=True)]
    assert sum(same) >= 4  # sums of other order round differently


# The experts' load -----------------------------------------------------------------------------------------------------------


def choices(tokens, config, params, bias):
    """[L, E]: how often every expert is chosen, by the program that scores; each shared expert by every token."""
    total = np.zeros((2, 6), int)
    for row in tokens:
        indices = score(InMemory(params, bias, config), np.array([row])).router_indices
        total[:, :4] += [np.bincount(layer.reshape(-1), minlength=4) for layer in indices]
        total[:, 4:] += len(row)
    return total


@pytest.mark.parametrize("name", SLOW)
def test_rows_are_counted_where_they_are_computed_and_padding_is_not(name):
    config, params, bias = model()
    got, placement = continued(deployed(name)), placement_of(name, config)
    replicas = Replicas(*(part[:2] for part in placed(config, placement)))
    seen = [prompt + new[:-1] for prompt, new in zip(PROMPTS, got.tokens, strict=True)]
    expected = choices(seen, config, params, bias)[:, : placement.n_experts(config)]
    np.testing.assert_array_equal(expert_rows(got.count_LR, replicas), expected)
    for layer, slots in enumerate(replicas.phy2log):  # every copy of an expert that is asked for works
        assert all(got.count_LR[layer, slot] > 0 for slot, e in enumerate(slots) if expected[layer, e] > 8 * len(slots))


@pytest.mark.parametrize("name", SLOW[:2])
def test_a_running_model_is_rearranged_by_its_loads_and_says_the_same(name):
    config, params, _ = model()
    serving, placement = deployed(name), placement_of(name, config)
    first, ranks = continued(serving), placement.expert_ranks
    loads = np.array(expected_loads(config, placement))
    loads[:2] = expert_rows(first.count_LR, Replicas(*(part[:2] for part in placed(config, placement))))
    replicas = placed(config, placement, loads)
    moved = deploy.rearranged(serving, replicas)
    stack = moved.layers[1]
    assert not np.array_equal(stack.replicas.phy2log, serving.layers[1].replicas.phy2log)
    for layer in range(2):
        for slot, expert in enumerate(replicas.phy2log[layer]):
            for matrix, weight in stack.params["mlp"]["experts"].items():
                np.testing.assert_array_equal(weight[layer, slot], expert_of(params, matrix, layer, expert))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    second = continued(moved)
    jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "backend_compile" in event], "another placement is the same program"
    assert second.tokens == first.tokens
    np.testing.assert_array_equal(
        expert_rows(second.count_LR, Replicas(*(part[:2] for part in replicas))), loads[:2].astype(int)
    )
    before, after = (fullest_over_mean(slot_rows_by_device(r.count_LR, ranks)).mean() for r in (first, second))
    assert after < before


# Where parameters come from, and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["base", pytest.param("mtp", marks=pytest.mark.slow)])
def test_a_folder_is_read_as_parameters_in_memory_are_laid_out(case):
    source = open_source(DATA / case, compute_dtype="float32")
    placement = serving_placement("decode", source.config)
    params, bias = load_parameters(source.tensors, source.config, "float32"), load_bias(source.tensors, source.config)
    got = deploy.read(source.tensors, source.config, "float32", placement)
    expected = deploy.from_params(params, bias, source.config, placement)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout, how, said", [
    ("train", {}, "prefill, decode"), ("decode", {"tensor": 3}, "tensor"), ("decode", {"tensor": 4}, "heads"),
    ("decode", {"data": 5}, "data"), ("decode", {"data": 0}, "data"), ("decode", {"spare": -1}, "spare"),
    ("decode", {"data": 8, "tensor": 2}, "tensor"), ("decode", {"tensor": 0}, "tensor"),
])  # fmt: skip
def test_sizes_that_make_no_mesh_are_one_line(layout, how, said):
    with pytest.raises(ValueError) as error:
        serving_placement(layout, model()[0], **how)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_tensor_ranks_are_as_many_as_the_layout_has_and_divide_what_is_there():
    config = model()[0]  # of two heads
    for how, expected in (({}, (1, 4, 2)), ({"data": 4}, (4, 1, 2)), ({"data": 8}, (8, 1, 1)), ({"tensor": 1}, (1, 8, 1))):
        sizes = serving_placement("decode", config, **how).sizes
        assert (sizes["data"], sizes["expert"], sizes["tensor"]) == expected


def test_models_and_replicas_that_cannot_be_served_so_are_one_line():
    config, params, bias = model()
    placement = placement_of("decode, 4 expert x 2 tensor", config)
    with pytest.raises(ValueError, match="expected mla"):
        serving_placement("decode", dataclasses.replace(config, attention="mha"))
    with pytest.raises(ValueError, match="this model has none"):
        serving_placement("decode", dataclasses.replace(config, first_k_dense_replace=3))
    wrong = place_experts(np.ones((4, 6)), num_replicas=24, num_gpus=8)
    with pytest.raises(ValueError, match=r"\[layers, slots\] \(4, 16\)"):
        deploy.from_params(params, bias, config, placement, wrong)
    with pytest.raises(ValueError, match="one on a mesh"):
        quantised(deployed("decode, 4 expert x 2 tensor"), "int8")
    assert set(LAYOUTS) == {"prefill", "decode"}
