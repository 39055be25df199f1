import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from planner import hlo_programs
from planner.hlo_programs import BOTH, DATA, MESH
from planner.hlo_texts import UP, hlo_loop, hlo_module

from dsv3_jax.planner.hlo import Cost, axes_of, cost_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """The text of a program on a chip: stored ones, and the CPU's compiled in a process with 8 devices."""
    folder = tmp_path_factory.mktemp("hlo")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, hlo_programs.__file__, "cpu", str(folder)], env=env, check=True, timeout=300)
    return lambda chip, name: gzip.open((folder if chip == "cpu" else DATA) / f"{chip}_{name}.txt.gz", "rt").read()


def _on(chips: str, *expected: Any) -> list[Any]:
    return [(chip, *expected) for chip in chips.split()]


ALL = "cpu h100 v5p"
ONE_EXPERT_EACH, ALL_EXPERTS = 2 * 512 * 256 * 128, 8 * 2 * 512 * 256 * 128


@pytest.mark.parametrize(
    ("chip", "name", "flops"),
    [
        *_on(ALL, "summed", 5 * 2 * 32 * 256 * 256),
        *_on(ALL, "nested", 3 * 7 * 2 * 32 * 128 * 128),
        *_on(ALL, "searching", 3 * 2 * 32 * 128 * 128),
        *_on(ALL, "branching", 2 * 2 * 128 * 256 * 256),
        *_on(ALL, "batched", 4 * 4 * 2 * 256 * 192 * 256),
        *_on(ALL, "gathering", 2 * 2048 * 2048 * 2048),
        *_on(ALL, "exchanged", 0),
        *_on("v5e", "overlapping", 2 * 2 * 1024 * 2048 * 2048),
        # CPUs and GPUs multiply every row with every expert, and so does the text for TPUs where it sums over rows.
        *_on("v5p", "experts", ONE_EXPERT_EACH),
        *_on("v5p", "experts_gradients", 2 * ONE_EXPERT_EACH),
        *_on("cpu h100", "experts", ALL_EXPERTS),
        *_on("cpu h100", "experts_gradients", 2 * ALL_EXPERTS),
    ],
)
def test_flops_are_those_of_the_matrices_times_the_trips(texts: Any, chip: str, name: str, flops: int) -> None:
    assert cost_of(texts(chip, name)).flops == flops


def _summary(cost: Cost) -> list[tuple[Any, ...]]:
    """Elements rather than bytes: XLA:CPU computes in float32."""
    assert {c.dtype for c in cost.collectives} <= {"bf16", "f32"}
    size = {"bf16": 2, "f32": 4}
    return [
        (c.kind, c.operand_bytes // size[c.dtype], c.result_bytes // size[c.dtype], axes_of(c.groups, MESH), c.times)
        for c in cost.collectives
    ]


@pytest.mark.parametrize(
    ("chip", "name", "collectives"),
    [
        *_on(ALL, "summed", [("all-reduce", 32 * 256, 32 * 256, ("expert",), 5)]),
        *_on(
            ALL,
            "exchanged",
            [
                ("all-to-all", 1024 * 4096, 4096 * 1024, ("expert",), 1),
                ("reduce-scatter", 4096 * 1024, 4096 * 512, ("data",), 1),
                ("all-gather", 4096 * 512, 4096 * 2048, ("expert",), 1),
                ("collective-permute", 4096 * 2048, 4096 * 2048, ("data",), 1),
            ],
        ),
        *_on(ALL, "nested", []),
        *_on(ALL, "searching", [("all-reduce", 1, 1, ("data",), 1)]),
        *_on("cpu h100", "gathering", [("all-gather", 256 * 2048, 2048 * 2048, BOTH, 1)]),
        *_on("h100 v5p", "ragged", [("ragged-all-to-all", 64 * 256, 128 * 256, ("expert",), 3)]),
        *_on("v5e", "overlapping", [("all-gather", 1024 * 2048, 2048 * 2048, ("data",), 1)]),
    ],
)
def test_collectives_are_those_of_the_program(texts: Any, chip: str, name: str, collectives: list[Any]) -> None:
    cost = cost_of(texts(chip, name))
    assert _summary(cost) == collectives
    if chip != "cpu":
        assert {c.dtype for c in cost.collectives} <= ({"f32"} if name == "searching" else {"bf16"})


def test_a_gather_that_tpus_turn_into_a_ring_of_products_is_counted_hop_by_hop(texts: Any) -> None:
    cost = cost_of(texts("v5p", "gathering"))
    assert {(kind, size, axes) for kind, size, _, axes, _ in _summary(cost)} == {("collective-permute", 256 * 2048, BOTH)}
    assert 7 <= sum(c.times for c in cost.collectives) <= 9  # 7 shards of others, both ways round
    assert {p.times for p in cost.products} == {2}


@pytest.mark.parametrize(("chip", "name"), [*_on(ALL, "searching"), *_on("h100 v5p", "ragged_search")])
def test_a_loop_that_depends_on_data_counts_once_and_says_so(texts: Any, chip: str, name: str) -> None:
    cost = cost_of(texts(chip, name))
    assert cost.dynamic
    assert {(c.times, c.dynamic) for c in cost.collectives} == {(1, True)}
    assert all(p.dynamic for p in cost.products)  # in the loop of three within it
    assert not cost_of(texts(chip, "summed")).dynamic


def test_groups_are_positions_in_the_mesh_whatever_the_order_of_the_chips(texts: Any) -> None:
    for chip in ALL.split():
        (summed,) = cost_of(texts(chip, "summed")).collectives
        assert summed.groups == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_records_name_the_operation_in_the_source(texts: Any) -> None:
    cost = cost_of(texts("v5p", "summed"))
    assert cost.collectives[0].op_name == "jit(summed)/shard_map/while/body/closed_call/psum_invariant"
    assert cost.products[0].op_name.endswith("dot_general")


def test_lines_read_as_the_whole_text_does(texts: Any) -> None:
    text = texts("v5p", "experts_gradients")
    assert cost_of(iter(text.splitlines(keepends=True))) == cost_of(text)


def test_only_rows_of_other_groups_are_taken_to_be_skipped(texts: Any) -> None:
    text = texts("v5p", "experts_gradients")
    assert cost_of(text.replace("MODE_ITERATION_INDICES", "MODE_GROUP_STARTS")).flops == 2 * ONE_EXPERT_EACH  # as on a v6e
    assert cost_of(text.replace("MODE_ITERATION_INDICES", "MODE_LOWER_TRIANGULAR")).flops == ONE_EXPERT_EACH + ALL_EXPERTS


@pytest.mark.parametrize("kind", ["call-start(%p), to_apply=%wrapped", "async-start(%p), calls=%wrapped"])
def test_a_wrapped_collective_is_counted_once(kind: str) -> None:
    wrapped = """%wrapped (w: f32[2,3]) -> f32[8,3] {
  %w = f32[2,3]{1,0} parameter(0)
  ROOT %g = f32[8,3]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
}"""
    entry = f"""  %p = f32[2,3]{{1,0}} parameter(0)
  %start = ((f32[2,3]{{1,0}}), f32[8,3]{{1,0}}) {kind}, async_execution_thread="sparsecore"
  ROOT %done = f32[8,3]{{1,0}} {kind.split("-")[0]}-done(%start)"""
    (found,) = cost_of(hlo_module(entry, wrapped)).collectives
    assert (found.kind, found.operand_bytes, found.result_bytes, len(found.groups)) == ("all-gather", 24, 96, 2)


def test_a_reduce_scatter_that_tpus_write_as_a_fused_all_reduce_is_one() -> None:
    """Seven rows do not fill the tiles of eight devices: XLA pads them to eight, and fuses sum and slice."""
    fused = """%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[7,128]) -> bf16[1,128] {
  %input = bf16[7,128]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[8,128]{1,0} pad(%input, %zero), padding=0_1x0_0
  %all-reduce = bf16[8,128]{1,0} all-reduce(%pad), replica_groups=[1,8]<=[8], to_apply=%add
  %place = u32[] partition-id()
  %first = u32[] constant(0)
  ROOT %own = bf16[1,128]{1,0} dynamic-slice(%all-reduce, %place, %first), dynamic_slice_sizes={1,128}
}"""
    emitter = '"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion","strategy":"StrategyRing"}'
    entry = f"""  %p = bf16[7,128]{{1,0}} parameter(0)
  ROOT %own = bf16[1,128]{{1,0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={{{emitter}}}"""
    (found,) = cost_of(hlo_module(entry, fused)).collectives
    assert (found.kind, found.operand_bytes, found.result_bytes, len(found.groups[0])) == ("reduce-scatter", 1792, 256, 8)


def test_fields_take_their_costliest_branch_each() -> None:
    reducing = """%reducing (r: f32[2,3]) -> f32[2,3] {
  %r = f32[2,3]{1,0} parameter(0)
  ROOT %s = f32[2,3]{1,0} all-reduce(%r), replica_groups=[1,8]<=[8], to_apply=%add
}"""
    multiplying = """%multiplying (m: f32[2,3]) -> f32[2,3] {
  %m = f32[2,3]{1,0} parameter(0)
  %n = f32[3,3]{1,0} constant({...})
  ROOT %d = f32[2,3]{1,0} dot(%m, %n), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""
    choice = (
        "  %p = f32[2,3]{1,0} parameter(0)\n  %t = pred[] constant(true)\n  ROOT %c = f32[2,3]{1,0} conditional(%t, %p, %p), "
    )
    for branches in (
        "true_computation=%reducing, false_computation=%multiplying",
        "branch_computations={%multiplying, %reducing}",
    ):
        cost = cost_of(hlo_module(choice + branches, reducing, multiplying))
        assert [c.kind for c in cost.collectives] == ["all-reduce"] and cost.flops == 36


def test_estimated_cycles_are_multiplied_too_and_fusions_are_not_opened_for_them() -> None:
    fused = """%fused (f: f32[2,3]) -> f32[2,3] {
  %f = f32[2,3]{1,0} parameter(0)
  ROOT %g = f32[2,3]{1,0} negate(%f), backend_config={"estimated_cycles":"1000"}
}"""
    text = hlo_loop("0", UP, "(%i_c, %five), direction=LT").replace(
        "  %y = ",
        """  %a = f32[2,3]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"30"}}
  %e = f32[2,3]{1,0} copy(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  %h = f32[2,3]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add, backend_config={"estimated_cycles":"2"}
  %y = """,
    )
    text = text.replace("ENTRY", f"{fused}\nENTRY").replace(
        "  ROOT %loop", '  %k = f32[2,3]{1,0} copy(%p), backend_config={"estimated_cycles":"7"}\n  ROOT %loop'
    )
    assert cost_of(text).cycles == {"fusion": 5 * 30, "collective": 5 * 2, "other": 7}


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        (
            "f32[4,4]{1,0} ragged-dot(%p, %q, %n), lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}",
            2 * 4 * 4 * 3,
        ),
        # One result for each of 5 groups, each of which contracts its own rows.
        (
            "f32[5,3,7]{2,1,0} ragged-dot(%p, %q, %n), lhs_contracting_dims={0}, rhs_contracting_dims={0}, lhs_ragged_dims={0}",
            2 * 4 * 3 * 7,
        ),
        ("f32[4,3,4,3]{3,2,1,0} dot(%p, %p)", 2 * 4 * 3 * 4 * 3),
        ("f32[1,3]{1,0} convolution(%p, %p), dim_labels=fb_io->bf, batch_group_count=3", 2 * 4 * 3),
        (
            '(f32[4,7]{1,0}, s8[64]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_batch_dimensions":[]}}}',
            2 * 4 * 7 * 3,
        ),
        (
            'bf16[4,7]{1,0} custom-call(%n, %p), custom_call_target="tpu_custom_call", backend_config='
            '{"custom_call_config":{"body":"TUxJUg==","cost_estimate":{"flops":"1234","transcendentals":"5"}}}',
            1234,
        ),
    ],
)
def test_flops_of_products_that_no_stored_text_has(line: str, flops: int) -> None:
    entry = "  %p = f32[4,3]{1,0} parameter(0)\n  %q = f32[5,3,7]{2,1,0} parameter(1)\n  %n = s32[5]{0} parameter(2)\n"
    assert cost_of(hlo_module(f"{entry}  ROOT %c = {line}")).flops == flops


def test_kernels_whose_flops_nobody_states_are_listed(texts: Any) -> None:
    assert cost_of(texts("v5p", "experts")).opaque == {}
    cost = cost_of(hlo_module('  ROOT %c = f32[2,3]{1,0} custom-call(), custom_call_target="__gpu$xla.gpu.triton"'))
    assert (cost.flops, cost.opaque) == (0, {"__gpu$xla.gpu.triton": 1})


def test_kernels_are_counted_by_name_as_often_as_they_run() -> None:
    def call(name: str, op_name: str, target: str = "tpu_custom_call") -> str:
        return f'  %{name} = f32[2,3]{{1,0}} custom-call(), custom_call_target="{target}", metadata={{op_name="{op_name}"}}'

    loop = hlo_loop(0, UP, "(%i_c, %five), direction=LT")
    body = loop.replace("  %y = ", call("k", "jit(f)/while/body/closed_call/router/pallas_call") + "\n  %y = ")
    others = [
        call("a", "jit(f)/transpose(jvp(grouped_outer))/pallas_call"),
        call("b", "grouped_outer/pallas_call", "__gpu$xla.gpu.triton"),
        call("c", "jit(f)/router/ragged_dot"),
    ]
    text = body.replace("  %init = ", "\n".join([*others, "  %init = "]))
    assert cost_of(text).kernels == {"router": 5, "grouped_outer": 2}
    assert cost_of(loop).kernels == {}


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": ((1, 0), (2, 5))},
        {"window_strides": (1, 1), "padding": ((2, 2), (0, 0)), "lhs_dilation": (3, 1)},
        {"window_strides": (1, 2), "padding": ((3, -1), (0, 0)), "rhs_dilation": (2, 1), "feature_group_count": 2},
    ],
)
def test_flops_of_convolutions_leave_out_padding_and_holes(options: Mapping[str, Any]) -> None:
    features = 4 // options.get("feature_group_count", 1)
    x, kernel = jnp.ones((2, 9, 8, 4), jnp.float32), jnp.ones((3, 2, features, 6), jnp.float32)
    convolve = jax.jit(lambda x, k: lax.conv_general_dilated(x, k, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options))
    text = convolve.lower(x, kernel).compile().as_text()
    assert text and "convolution(" in text
    assert cost_of(text).flops == 2 * int(jnp.sum(convolve(x, kernel)))  # of ones, every sum counts its terms


# Axes.


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1, 2, 3), (4, 5, 6, 7)), ("expert",)),
        (((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        (((0, 1, 2, 3, 4, 5, 6, 7),), ("data", "expert")),
        (((0, 1), (2, 3), (4, 5), (6, 7)), ("expert",)),  # a part of the axis
        (((0, 1), (1, 2), (2, 3), (3, 4)), ("data", "expert")),
        (((0,), (1,)), ()),
    ],
)
def test_axes_are_those_along_which_members_differ(groups: Any, axes: tuple[str, ...]) -> None:
    assert axes_of(groups, MESH) == axes


def test_ids_in_the_order_of_the_mesh_can_be_given() -> None:
    snake = (10, 11, 13, 12, 16, 17, 15, 14)
    assert axes_of(((10, 16), (12, 14)), MESH, snake) == ("data",)
    assert axes_of(((10, 17),), MESH, snake) == ("data", "expert")


@pytest.mark.parametrize(("groups", "ids"), [(((0, 8),), None), (((0, 1),), range(4))])
def test_groups_of_another_mesh_are_refused(groups: Any, ids: Any) -> None:
    with pytest.raises(ValueError, match="expected ids of a mesh .*pass the mesh"):
        axes_of(groups, MESH, ids)
