"""The placement of experts against the published example, a restatement in exact integers, and the model that it serves."""

import itertools
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.inference.placement import (
    Replicas,
    device_loads,
    expert_rows,
    fullest_over_mean,
    physical_indices,
    place_experts,
    slot_rows_by_device,
)
from dsv3_jax.moe.experts import routed_experts
from oracles.unchecked import unchecked

# The example in the README of DeepSeek's EPLB: 2 layers of 12 experts in 4 groups, 16 replicas on 2 nodes of 4 GPUs.
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
SIZES = {"num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}


# The published example -------------------------------------------------------------------------------------------------------


def test_hierarchical_placement_of_the_published_example_is_equal_in_every_entry():
    replicas = place_experts(LOADS, **SIZES)
    assert replicas.phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert replicas.logcnt.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    # Of experts 1 and 4 in layer 0 the replica made first sits in the later slot: creation orders them, not position.
    assert replicas.log2phy.tolist() == [
        [[12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2], [1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]],
        [[13, -1], [15, 11], [8, -1], [14, -1], [9, -1], [10, 12], [2, 4], [0, -1], [6, 3], [7, -1], [1, -1], [5, -1]],
    ]
    assert all(field.dtype == np.int32 for field in replicas)


def test_device_loads_of_the_published_example_before_and_after():
    before, after = device_loads(LOADS, place_experts(LOADS, **SIZES), num_gpus=8)
    assert after.tolist() == [
        [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
        [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
    ]
    # By hand: experts 0 and 1, 2, 3 and 4, 5, 6 and 7, 8, 9 and 10, 11.
    assert before.tolist() == [[222, 40, 165, 165, 43, 73, 239, 86], [127, 104, 83, 197, 344, 172, 102, 27]]


def test_rows_of_replicas_are_rows_of_their_expert_and_of_their_device():
    replicas = place_experts(LOADS, **SIZES)
    rows_LR = np.arange(32).reshape(2, 16)
    by_expert, by_device = expert_rows(rows_LR, replicas), slot_rows_by_device(rows_LR, 8)
    for layer, slots in enumerate(replicas.phy2log):
        assert by_expert[layer].tolist() == [sum(rows_LR[layer][slots == e]) for e in range(12)]
        assert by_device[layer].tolist() == [rows_LR[layer][2 * p] + rows_LR[layer][2 * p + 1] for p in range(8)]
    np.testing.assert_allclose(fullest_over_mean(np.array([[1, 3], [2, 2], [0, 0]])), [1.5, 1.0, np.nan])
    with pytest.raises(ValueError, match="num_gpus"):
        slot_rows_by_device(rows_LR, 5)


@pytest.mark.parametrize("policy", [{"num_groups": 3, "num_nodes": 2}, {"num_groups": 1, "num_nodes": 1}, {}])
def test_global_placement_has_the_known_device_loads(policy):
    """Groups that nodes do not divide, or one group on one node, or neither named: the same policy.

    Loads and not slots: for this policy no slots are published, and those we know come from another program, whose order among
    equals (the two replicas of one expert, say) nobody vouches for. Loads are the same whichever of the equals comes first.
    """
    replicas = place_experts(LOADS, num_replicas=16, num_gpus=8, **policy)
    assert device_loads(LOADS, replicas, num_gpus=8).after.tolist() == [
        [130.5, 95.5, 130, 138, 138.5, 134.5, 134, 132],
        [123, 123, 125.5, 118.5, 172, 157.5, 172, 164.5],
    ]


# What the algorithm says, in exact integers ----------------------------------------------------------------------------------


def packed(weights, packs):
    """[(pack, rank)] of each item, as BALANCED_PACK is described, with lists."""
    room = len(weights) // packs
    if room == 1:
        return [(i, 0) for i in range(packs)]
    content, where = [[] for _ in range(packs)], {}
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        open_packs = [p for p in range(packs) if len(content[p]) < room]
        pack = min(open_packs, key=lambda p: (sum(weights[i] for i in content[p]), p))
        where[item] = pack, len(content[pack])
        content[pack].append(item)
    return [where[item] for item in range(len(weights))]


def replicated(weights, size):
    """[(expert, rank)] of each replica, as REPLICATE is described."""
    result = [(j, 0) for j in range(len(weights))]
    while len(result) < size:
        count = [sum(e == j for e, _ in result) for j in range(len(weights))]
        j = max(range(len(weights)), key=lambda j: (Fraction(weights[j], count[j]), -j))
        result.append((j, count[j]))
    return result


def placed(weights, size, groups, nodes, gpus):
    """{(expert, rank): slot} of one layer, step by step through node-major ids."""
    if groups % nodes:
        groups = nodes = 1
    per_group, per_node = len(weights) // groups, len(weights) // nodes
    group_of_slot = {}
    sums = [sum(weights[g * per_group : (g + 1) * per_group]) for g in range(groups)]
    for group, (node, rank) in enumerate(packed(sums, nodes)):
        group_of_slot[node * (groups // nodes) + rank] = group
    expert_of = [group_of_slot[m // per_group] * per_group + m % per_group for m in range(len(weights))]
    slots = {}
    for node in range(nodes):
        local = expert_of[node * per_node : (node + 1) * per_node]
        copies = replicated([weights[e] for e in local], size // nodes)
        count = [sum(j == i for j, _ in copies) for i in range(per_node)]
        shares = [Fraction(weights[local[j]], count[j]) for j, _ in copies]
        for (j, copy), (gpu, position) in zip(copies, packed(shares, gpus // nodes), strict=True):
            slots[local[j], copy] = (node * (gpus // nodes) + gpu) * (size // gpus) + position
    return slots


@st.composite
def problems(draw, loads=None):
    """(loads [L][E], sizes): one to three nodes of up to three GPUs, at most five replicas more than experts."""
    nodes, per_node, per_gpu = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    gpus = nodes * per_node
    size = gpus * per_gpu
    groups_per_node = draw(st.integers(1, 3))
    groups = nodes * groups_per_node if draw(st.booleans()) else draw(st.sampled_from([g for g in (1, 2, 3) if g <= size]))
    divisor = groups if groups % nodes == 0 else 1
    choices = [e for e in range(divisor, size + 1, divisor) if size - e <= 5]
    if not choices:
        groups, choices = 1 if nodes == 1 else nodes, [size]
    experts = draw(st.sampled_from(choices))
    # Multiples of 720, which all counts up to 6 divide: the division is exact in floats too, so equals are equal in both.
    loads = st.integers(0, 4).map(lambda n: 720 * n) | st.integers(0, 99).map(lambda n: 720 * n) if loads is None else loads
    layers = draw(st.lists(st.lists(loads, min_size=experts, max_size=experts), min_size=1, max_size=2))
    return layers, {"num_replicas": size, "num_groups": groups, "num_nodes": nodes, "num_gpus": gpus}


@settings(max_examples=120)
@given(problems())
def test_every_slot_is_the_one_that_the_description_gives_ties_included(problem):
    layers, sizes = problem
    replicas = place_experts(layers, **sizes)
    for weights, phy2log, log2phy in zip(layers, replicas.phy2log, replicas.log2phy, strict=True):
        expected = placed(weights, *(sizes[name] for name in ("num_replicas", "num_groups", "num_nodes", "num_gpus")))
        assert {(e, c): slot for e, row in enumerate(log2phy.tolist()) for c, slot in enumerate(row) if slot >= 0} == expected
        assert {slot: e for slot, e in enumerate(phy2log.tolist())} == {slot: e for (e, _), slot in expected.items()}


# What holds for any loads ----------------------------------------------------------------------------------------------------

ANY_LOADS = st.floats(0, 1e9) | st.sampled_from([0.0, 1.0, 3.0])


@settings(max_examples=60)
@given(problems(ANY_LOADS))
def test_counts_and_both_tables_describe_one_assignment(problem):
    layers, sizes = problem
    phy2log, log2phy, logcnt = place_experts(layers, **sizes)
    assert logcnt.min() >= 1 and (logcnt.sum(axis=1) == sizes["num_replicas"]).all()
    assert log2phy.shape[2] == logcnt.max()
    for layer in range(len(layers)):
        for expert, count in enumerate(logcnt[layer]):
            slots = log2phy[layer, expert]
            assert (slots[count:] == -1).all()
            assert set(slots[:count].tolist()) == set(np.flatnonzero(phy2log[layer] == expert).tolist())


@settings(max_examples=60)
@given(problems(ANY_LOADS))
def test_a_group_of_experts_stays_on_one_node(problem):
    layers, sizes = problem
    if sizes["num_groups"] % sizes["num_nodes"]:
        return
    per_group = len(layers[0]) // sizes["num_groups"]
    for phy2log in place_experts(layers, **sizes).phy2log:
        nodes = phy2log.reshape(sizes["num_nodes"], -1) // per_group
        assert sum(len(set(groups.tolist())) for groups in nodes) == sizes["num_groups"]


@settings(max_examples=60)
@given(problems(ANY_LOADS))
def test_devices_of_a_node_differ_by_one_replica_at_most_and_no_load_is_lost(problem):
    """What greedy packing does promise. Not that its maximum beats the contiguous one's: see the next test."""
    layers, sizes = problem
    nodes = sizes["num_nodes"] if sizes["num_groups"] % sizes["num_nodes"] == 0 else 1
    replicas = place_experts(layers, **sizes)
    before, after = device_loads(layers, replicas, sizes["num_gpus"])
    for weights, old, new, phy2log, logcnt in zip(layers, before, after, replicas.phy2log, replicas.logcnt, strict=True):
        # Sums of a dozen float64 numbers of one sign: 1e-12 is thousands of roundings.
        slack = 1e-12 * sum(weights)
        assert abs(old.sum() - sum(weights)) <= slack and abs(new.sum() - sum(weights)) <= slack
        heaviest = (np.array(weights) / logcnt)[phy2log].reshape(nodes, -1).max(axis=1)
        assert (np.ptp(new.reshape(nodes, -1), axis=1) <= heaviest + slack).all()


def test_greedy_packing_can_lose_to_a_placement_that_is_even_already():
    """3, 3, 0 and 2, 2, 2 are even; heaviest first gives 3, 2, 2 and 3, 2, 0. So no test may claim that it always improves."""
    loads = [[3, 3, 0, 2, 2, 2]]
    before, after = device_loads(loads, place_experts(loads, num_replicas=6, num_gpus=2), num_gpus=2)
    assert before.tolist() == [[6, 6]] and after.tolist() == [[7, 5]]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(0, 4))
def test_no_other_counts_have_a_lighter_heaviest_replica(loads, more):
    size = len(loads) + more
    counts = [c for c in itertools.product(range(1, more + 2), repeat=len(loads)) if sum(c) == size]
    best = min(max(Fraction(w, c) for w, c in zip(loads, count, strict=True)) for count in counts)
    (count,) = place_experts([loads], num_replicas=size, num_gpus=1).logcnt.tolist()
    assert max(Fraction(w, c) for w, c in zip(loads, count, strict=True)) == best


def test_a_skewed_load_becomes_nearly_even_in_the_reports_prefilling_unit():
    """256 experts and 32 redundant ones on 32 GPUs of 4 nodes: the largest load's excess over the mean falls tenfold."""
    loads = np.random.default_rng(0).zipf(1.8, size=(1, 256)).clip(max=50)
    replicas = place_experts(loads, num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)
    before, after = (v.max() / v.mean() - 1 for v in device_loads(loads, replicas, num_gpus=32))
    assert before > 0.5 and after < before / 10


# What a running model needs --------------------------------------------------------------------------------------------------


def skewed_choices(rng, tokens, k, experts):
    """Every token chooses expert 0 and k - 1 others, the early ones far more often."""
    scores = rng.gumbel(size=(tokens, experts)) - 0.7 * np.arange(experts)
    scores[:, 0] = np.inf
    return np.argsort(-scores, axis=1)[:, :k].astype(np.int32)


to_physical = jax.jit(physical_indices)


def served(seed=0, layers=2, tokens=37, k=3, experts=12):
    rng = np.random.default_rng(seed)
    indices = np.stack([skewed_choices(rng, tokens, k, experts) for _ in range(layers)])
    loads = [np.bincount(chosen.ravel(), minlength=experts) for chosen in indices]
    replicas = place_experts(loads, **SIZES)
    assert replicas.logcnt.max() >= 3  # expert 0, in both layers: else there would be little to spread
    return rng, indices, loads, replicas


def test_physical_experts_and_indices_give_the_logical_result():
    rng, indices, _, replicas = served()
    (layers, tokens, k), experts, hidden, width = indices.shape, 12, 8, 5
    indices[:, ::5, -1] = experts  # no expert
    shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    stacked = {name: rng.normal(size=(layers, experts, *shape)).astype(np.float32) for name, shape in shapes.items()}
    physical = {name: w[np.arange(layers)[:, None], replicas.phy2log] for name, w in stacked.items()}
    x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.float32)
    gates = jnp.asarray(rng.uniform(0.1, 1, size=(tokens, k)), jnp.float32)

    @jax.jit
    def run(indices, weights):
        return routed_experts(x, indices, gates, weights, implementation="dense")

    for layer in range(layers):
        chosen = to_physical(indices[layer], np.arange(tokens, dtype=np.int32), replicas.layer(layer))
        logical_y = run(indices[layer], {name: w[layer] for name, w in stacked.items()})
        physical_y = run(chosen, {name: w[layer] for name, w in physical.items()})
        # The same few terms summed in another order: some 2^-24 each, relative to the largest; a wrong expert makes 1e-1.
        assert np.max(np.abs(physical_y - logical_y)) < 2e-6 * np.max(np.abs(logical_y))


def test_token_t_goes_to_replica_t_modulo_count_and_choices_stay_distinct():
    rng, indices, _, replicas = served()
    indices[:, ::5, -1] = 12
    tokens = rng.permutation(1000)[: indices.shape[1]].astype(np.int32)
    for layer in range(2):
        actual = np.asarray(to_physical(indices[layer], tokens, replicas.layer(layer)))
        for chosen, token, row in zip(indices[layer].tolist(), tokens.tolist(), actual.tolist(), strict=True):
            slots = [replicas.log2phy[layer, e][: replicas.logcnt[layer, e]] if e < 12 else [16] for e in chosen]
            assert row == [of_expert[token % len(of_expert)] for of_expert in slots]
            assert len(set(row)) == len(row)
        assert actual.dtype == np.int32


def test_replicas_of_an_expert_that_every_token_chooses_serve_equally_many():
    _, indices, _, replicas = served()
    tokens = np.arange(indices.shape[1], dtype=np.int32)
    for layer in range(2):
        actual = np.asarray(to_physical(indices[layer], tokens, replicas.layer(layer)))
        slots = replicas.log2phy[layer, 0][: replicas.logcnt[layer, 0]]
        assert np.ptp([(actual == slot).sum() for slot in slots]) <= 1


def test_sequences_of_tokens_keep_their_shape_and_the_layer_may_be_traced():
    _, indices, _, replicas = served(tokens=36)
    tokens = np.arange(36, dtype=np.int32)
    on_device = Replicas(*map(jnp.asarray, replicas))
    traced = jax.jit(lambda indices, tokens, layer: physical_indices(indices, tokens, on_device.layer(layer)))
    for layer in range(2):
        actual = traced(indices[layer].reshape(4, 9, 3), tokens.reshape(4, 9), layer)
        copy = tokens[:, None] % replicas.logcnt[layer][indices[layer]]
        expected = replicas.log2phy[layer][indices[layer], copy]
        np.testing.assert_array_equal(np.asarray(actual), expected.reshape(4, 9, 3))


# Mistakes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_replicas": 12, "num_gpus": 8}, "num_gpus: expected a divisor of the 12 replicas, got 8"),
        ({"num_replicas": 8}, "num_replicas: expected at least the 12 experts, got 8"),
        ({"num_gpus": 8, "num_nodes": 3}, "num_gpus: expected a multiple of the 3 nodes, got 8"),
        ({"num_groups": 8}, "num_groups: expected a divisor of the 12 experts, got 8"),
        ({"num_nodes": 0}, "expected positive sizes, got 16 replicas, 8 GPUs, 4 groups, 0 nodes"),
        ({"loads": LOADS[0]}, r"loads: expected \[layers, experts\], neither of them 0, got \(12,\)"),
        ({"loads": [[]]}, r"loads: expected \[layers, experts\], neither of them 0, got \(1, 0\)"),
        ({"loads": [[1.0] * 11 + [-1.0]]}, "loads: expected finite non-negative numbers, got -1.0 to 1.0"),
        ({"loads": [[1.0] * 11 + [float("nan")]]}, "loads: expected finite non-negative numbers, got nan to nan"),
        ({"loads": [[1.0] * 11 + [float("inf")]]}, "loads: expected finite non-negative numbers, got 1.0 to inf"),
        ({"loads": [[1e308] * 12]}, "loads: expected finite non-negative numbers"),
    ],
)
def test_sizes_and_loads_that_cannot_be_placed_are_refused_in_one_line(changed, message):
    arguments = {"loads": LOADS} | SIZES | changed
    with pytest.raises(ValueError, match=message) as error:
        place_experts(arguments.pop("loads"), **arguments)
    assert "\n" not in str(error.value)


def test_groups_that_the_nodes_do_not_divide_need_not_divide_the_experts():
    place_experts(LOADS, num_replicas=16, num_gpus=8, num_groups=5, num_nodes=2)


def test_a_placement_for_something_else_is_refused_in_one_line():
    *_, replicas = served()
    indices, tokens = jnp.zeros((4, 3), jnp.int32), jnp.zeros(4, jnp.int32)
    for message, call in [
        (r"loads: expected the placement's \[L, E\], \(2, 12\), got \(1, 12\)", lambda: device_loads(LOADS[:1], replicas, 8)),
        ("num_gpus: expected a divisor of the 16 replicas, got 5", lambda: device_loads(LOADS, replicas, 5)),
        ("num_gpus: expected a divisor of the 16 replicas, got 0", lambda: device_loads(LOADS, replicas, 0)),
        ("replicas: expected those of one layer, got 1 axes more", lambda: physical_indices(indices, tokens, replicas)),
        (r"tokens: expected .* \(4,\), got \(3,\)", lambda: physical_indices(indices, tokens[:3], replicas.layer(0))),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            unchecked(call)
        assert "\n" not in str(error.value)
