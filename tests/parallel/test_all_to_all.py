"""The exchange: equal to the experts of one device for every router, buffer and number of rounds; nothing dropped.

`ragged_all_to_all` does not exist on CPU: here its place is taken by a gather that follows its documentation.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ParallelConfig
from dsv3_jax.fp8.formats import E4M3, E5M2
from dsv3_jax.fp8.precision import Wire
from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.moe.experts import routed_experts
from dsv3_jax.parallel import all_to_all
from dsv3_jax.parallel.all_to_all import Queues, buffer_rows, exchanged_experts
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from oracles import numpy_fp8
from oracles.compiling import quick_jit
from oracles.jaxprs import arrays, equations
from oracles.numpy_layers import sigmoid

HIDDEN, WIDTH = 6, 5


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Row input_offsets[d] + i of each sender becomes row output_offsets[d] + i of receiver d, for i < send_sizes[d]."""
    me, rows = lax.axis_index(axis_name), jnp.arange(output.shape[0], dtype=jnp.int32)
    gathered = [lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    for sender in range(gathered[0].shape[0]):
        values, starts, sizes, targets = (a[sender] for a in gathered)
        at = rows - targets[me]
        inside = ((at >= 0) & (at < sizes[me])).reshape((-1,) + (1,) * (output.ndim - 1))
        output = jnp.where(inside, values[jnp.clip(starts[me] + at, 0, values.shape[0] - 1)], output)
    return output


@pytest.fixture(autouse=True)
def ragged_on_cpu(monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated)


def placement_of(ranks: int, exchange: str, buffer: float, data: int = 1) -> Placement:
    config = override(preset("tiny"), {"layout": "report", "mesh_data": data, "mesh_expert": ranks})
    mesh = make_mesh(config, jax.devices()[: ranks * data])
    return Placement(mesh, ParallelConfig(exchange=exchange, exchange_buffer=buffer))


def inputs(seed: int, n_tokens: int, top_k: int, n_experts: int, skew: str):
    rng = np.random.default_rng(seed)
    scores = rng.random((n_tokens, n_experts))
    if skew == "one expert":
        scores[:, 0] = 2
    elif skew == "one rank":
        scores[:, :top_k] = 2 + rng.random((n_tokens, top_k))
    indices = np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)
    x = rng.standard_normal((n_tokens, HIDDEN)).astype(np.float32)
    gates = rng.random((n_tokens, top_k)).astype(np.float32)
    shapes = {"gate_proj": (HIDDEN, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}
    weights = {name: rng.standard_normal((n_experts, *s)).astype(np.float32) for name, s in shapes.items()}
    return x, indices, gates, weights


def one_row_at_a_time(x, indices, gates, weights):
    """Eq. 12 in float64."""
    wide, y = {name: w.astype(np.float64) for name, w in weights.items()}, np.zeros(x.shape)
    for n, k in np.ndindex(indices.shape):
        gate, up, down = (wide[name][indices[n, k]] for name in ("gate_proj", "up_proj", "down_proj"))
        g = x[n] @ gate
        y[n] += gates[n, k] * ((g * sigmoid(g) * (x[n] @ up)) @ down)
    return y


def exchanged(placement: Placement, implementation: str = "bucketed"):
    """`(x, gates, weights), indices -> y` of all ranks' tokens on end."""
    local = partial(routed_experts, implementation=implementation)

    def share(differentiable, indices):
        x, gates, weights = differentiable
        return exchanged_experts(x, indices, gates, weights, local, placement)

    rows = P(("data", "expert"))
    return jax.shard_map(share, mesh=placement.mesh, in_specs=((rows, rows, P("expert")), rows), out_specs=rows)


def value_and_pull_back(function, differentiable, indices, dy):
    def run(differentiable, indices, dy):
        y, pull_back = jax.vjp(lambda d: function(d, indices), differentiable)
        return y, pull_back(dy)[0]

    return quick_jit(run)(differentiable, indices, dy)


def check(placement: Placement, x, indices, gates, weights, implementation: str = "bucketed") -> None:
    dy = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    y, grads = value_and_pull_back(exchanged(placement, implementation), (x, gates, weights), indices, dy)
    expected_y = one_row_at_a_time(x, indices, gates, weights)
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=2e-6 * max(1.0, np.abs(expected_y).max()))

    def alone(differentiable, indices):
        x, gates, weights = differentiable
        return routed_experts(x, indices, gates, weights, implementation="dense")

    _, expected = value_and_pull_back(alone, (x, gates, weights), indices, dy)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
@settings(max_examples=6)
@given(
    data=st.data(),
    ranks=st.sampled_from([2, 4, 8]),
    skew=st.sampled_from(["none", "one expert", "one rank"]),
    buffer=st.sampled_from([0.01, 0.5, 1.25, 100.0]),
)
def test_equals_the_experts_of_one_device_whatever_the_router_does(exchange, data, ranks, skew, buffer):
    own = data.draw(st.integers(1, 3), label="experts a rank")
    top_k = data.draw(st.integers(1, min(4, own * ranks)), label="top_k")
    tokens = ranks * data.draw(st.integers(1, 5), label="tokens a rank")
    check(placement_of(ranks, exchange, buffer), *inputs(tokens + top_k, tokens, top_k, own * ranks, skew), "dense")


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
def test_expert_groups_side_by_side_go_the_same_number_of_rounds(exchange):
    """Tokens of the first data rank all choose one expert, those of the second do not: both go as many rounds."""
    x, indices, gates, weights = inputs(0, 32, 2, 8, "none")
    indices[:16] = [0, 1]
    check(placement_of(4, exchange, 0.5, data=2), x, indices, gates, weights)


def test_an_interpreted_kernel_is_refused_on_a_mesh():
    with pytest.raises(ValueError, match="implementation: expected one that is compiled on a mesh"):
        check(placement_of(4, "padded", 3.0), *inputs(2, 16, 2, 8, "one rank"), "pallas_tpu:interpret")


@pytest.mark.parametrize("implementation", ["bucketed", "ragged_dot", "dense"])
def test_every_implementation_of_the_experts_leaves_the_empty_rows_of_a_buffer_out(implementation):
    check(placement_of(4, "padded", 3.0), *inputs(2, 16, 2, 8, "one rank"), implementation)


def test_poison_in_another_token_reaches_no_one_else():
    """A NaN token spoils its own row and the experts it visited, in no other token's output and no gate's gradient."""
    x, indices, gates, weights = inputs(3, 16, 2, 8, "none")
    x[5] = np.nan
    dy = np.ones_like(x)
    y, (dx, dgates, _) = value_and_pull_back(exchanged(placement_of(4, "padded", 1.25)), (x, gates, weights), indices, dy)
    others = np.arange(16) != 5
    assert np.isnan(y[5]).all() and np.isfinite(np.asarray(y)[others]).all()
    assert np.isfinite(np.asarray(dx)[others]).all() and np.isfinite(np.asarray(dgates)[others]).all()


@given(st.integers(1, 5000), st.integers(1, 8), st.sampled_from([2, 4, 8, 64]), st.integers(1, 4), st.floats(0.01, 80))
def test_the_buffer_holds_what_the_formula_says_and_never_more_than_could_come(n_tokens, top_k, ranks, own, buffer):
    rows = buffer_rows(n_tokens, top_k, ranks, ranks * own, buffer)
    assert rows % ranks == 0 and rows >= ranks
    assert rows == ranks * min(math.ceil(buffer * n_tokens * top_k / ranks), n_tokens * min(top_k, own))


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
def test_rounds_are_as_few_as_the_fullest_buffer_allows(exchange):
    count = np.zeros((4, 4, 2), np.int32)
    count[:, 1] = [[3, 0], [0, 2], [1, 1], [0, 0]]  # 7 rows for rank 1, at most 3 from one sender
    kind = getattr(all_to_all, exchange)
    rounds = [int(kind(4, capacity, ("expert",)).rounds(Queues(jnp.asarray(count)))) for capacity in (4, 8, 12)]
    assert rounds == ([3, 2, 1] if exchange == "padded" else [2, 1, 1])


def test_no_array_of_the_program_holds_more_rows_than_the_formula_allows():
    """Neither forward nor backward, whatever the router will do: C rows received, R rows of its own."""
    ranks, tokens, top_k, n_experts = 4, 64, 2, 8
    placement = placement_of(ranks, "padded", 1.25)
    x, indices, gates, weights = inputs(0, tokens, top_k, n_experts, "none")
    per_rank = tokens // ranks
    allowed = max(per_rank * top_k, buffer_rows(per_rank, top_k, ranks, n_experts, 1.25)) + 64  # and a block of the walk
    jaxpr = jax.make_jaxpr(lambda d: jax.vjp(lambda d: exchanged(placement)(d, indices), d)[1](x))((x, gates, weights))
    inside = next(e for e in equations(jaxpr) if e.primitive.name == "shard_map")
    rows = [a.shape[0] for a in arrays(inside.params["jaxpr"]) if len(a.shape) == 2 and a.shape[1] in (HIDDEN, WIDTH)]
    assert rows and max(rows) <= allowed < ranks * per_rank * top_k


def wired(placement: Placement, wire: Wire):
    """y = sum of gate * scale of the expert * x: what comes out is what went over the wire."""

    def local(x, expert, gates, weights):
        scale = weights["gate_proj"][:, 0, 0]
        return gates * scale[jnp.minimum(expert, scale.shape[0] - 1)] * x

    def share(differentiable, indices):
        x, gates, weights = differentiable
        return exchanged_experts(x, indices, gates, weights, local, placement, wire)

    rows = P(("data", "expert"))
    return jax.shard_map(share, mesh=placement.mesh, in_specs=((rows, rows, P("expert")), rows), out_specs=rows)


E4M3_WIRE, E5M2_WIRE = (Quantiser(form, (1, 4), power_of_two=True, floor=1e-30) for form in (E4M3, E5M2))


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
@pytest.mark.parametrize(
    "wire", [Wire(E4M3_WIRE, E5M2_WIRE), Wire(E5M2_WIRE, None), Wire(None, E4M3_WIRE)], ids=["both", "tokens", "gradients"]
)
def test_tokens_and_gradients_are_rounded_each_as_its_end_of_the_wire_says(exchange, wire):
    placement = placement_of(4, exchange, 0.5)
    x, indices, gates, weights = inputs(3, 24, 2, 8, "one rank")
    x *= 4.0 ** np.arange(-12, 12)[:, None]
    weights = {name: w[:, :1, :1] for name, w in weights.items()}
    dy = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    y, (dx, dgates, dweights) = value_and_pull_back(wired(placement, wire), (x, gates, weights), indices, dy)
    x8, dy8 = (numpy_fp8.rounded(a, how) if how else a for a, how in zip((x, dy), wire, strict=True))
    factor = gates.astype(np.float64) * weights["gate_proj"][indices, 0, 0]
    np.testing.assert_allclose(y, factor.sum(1, keepdims=True) * x8, rtol=1e-5)
    np.testing.assert_allclose(dx, factor.sum(1, keepdims=True) * dy8, rtol=1e-5)
    both = (x8 * dy8).sum(1, keepdims=True)
    expected = both * weights["gate_proj"][indices, 0, 0]
    np.testing.assert_allclose(dgates, expected, rtol=1e-4, atol=1e-5 * np.abs(x8).max())
    per_expert = np.zeros(len(weights["gate_proj"]))
    np.add.at(per_expert, indices, both * gates)
    np.testing.assert_allclose(dweights["gate_proj"][:, 0, 0], per_expert, rtol=1e-5, atol=1e-5 * np.abs(x8).max())


def test_tokens_that_go_over_the_wire_are_kept_as_they_went():
    placement, (x, indices, gates, weights) = placement_of(2, "padded", 1.0), inputs(3, 24, 2, 8, "even")
    weights = {name: w[:, :1, :1] for name, w in weights.items()}

    def pull_back(wire):
        return jax.eval_shape(lambda d: jax.vjp(lambda d: wired(placement, wire)(d, indices), d)[1], (x, gates, weights))

    for wire, dtype in ((Wire(E4M3_WIRE, None), "uint8"), (Wire(), "float32")):
        tokens = {str(a.dtype) for a in jax.tree.leaves(pull_back(wire)) if a.shape == x.shape}
        assert tokens == {dtype}
