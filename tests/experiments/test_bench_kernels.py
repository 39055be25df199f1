"""The kernels' programs for TPUs that are not here: each compiles at V3's shapes, and its lines say what they promise."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.kernels.attention import pallas_tpu, pallas_tpu_backward
from dsv3_jax.kernels.decode import pallas_tpu as decode_tpu
from dsv3_jax.kernels.decode import plan
from dsv3_jax.kernels.scaled import pallas_tpu as scaled_tpu
from dsv3_jax.planner import bundles
from experiments import (
    _bench_attention,
    _bench_kernels,
    _bench_measure,
    _bench_roofline,
    _bench_scaled,
    _bench_tokamax,
    bench_kernels,
)

ROOT = Path(__file__).parent.parent.parent
LIBTPU, CUDA = (ROOT / ".venv" / name for name in ("aot", "aot-gpu"))  # where `make test-slow` puts them


def line(kernel, peer, cycles, chip="v5p"):
    found = {"kernel": kernel, "chip": chip, "peer": peer, "blocks": [cycles]}
    return found | ({"cycles_per_gflop": float(cycles)} if cycles else {"failed": "too large"})


def test_the_best_peer_is_set_beside_each_of_ours():
    lines = [
        line("up", None, 100), line("up", "gmm", 0), line("up", "gmm", 130), line("up", "gmm", 110),
        line("up", None, 50, "v6e"), line("up", "gmm", 40, "v6e"), line("swiglu", None, 9), line("down", None, 0),
    ]  # fmt: skip
    assert [
        (found["ratio"], found["chip"], found["peer_blocks"], found["peer_over_ours"]) for found in bench_kernels.ratios(lines)
    ] == [
        ("up", "v5p", [110], 1.1),
        ("up", "v6e", [40], 0.8),
    ]


def test_each_peer_has_a_ratio_and_the_best_one_is_in_the_table():
    lines = [line("up", None, 100), line("up", "gmm", 130), line("up", "tokamax gmm", 90), line("up", "gmm", 110)]
    lines = [each | {"shape": "1x1"} for each in lines]
    found = bench_kernels.ratios(lines)
    assert [(each["peer"], each["peer_blocks"], each["peer_over_ours"]) for each in found] == [
        ("tokamax gmm", [90], 0.9), ("gmm", [110], 1.1)
    ]  # fmt: skip
    (row,) = bench_kernels.table([*lines, *found]).splitlines()[1:]
    assert row.split()[-1] == "0.9"


def test_without_tokamax_there_are_none_of_its_kernels(monkeypatch):
    def peers():
        found = [*_bench_kernels._product("a", "TPU v5", 256, 256, transposed=True), *_bench_kernels._outer("TPU v5")]
        return {case.peer for case in [*found, *_bench_kernels._attention("TPU v5", 4096)] if case.peer}

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    shipped = peers()
    assert shipped == {
        "gmm", "tgmm", "splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals", "flash_attention"
    }  # fmt: skip
    monkeypatch.setattr(_bench_tokamax, "installed", lambda: True)  # cases are made without it
    assert peers() - shipped == {f"tokamax {name}" for name in (
        "gmm", "gmm_v2", "tgmm", "tgmm_v2", "splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals"
    )}  # fmt: skip


def test_tokamax_s_tiles_cover_each_group_s_rows():
    counts = (40, 0, 3, 150, 7)
    tiles = _bench_tokamax.tiles_of(counts, 64)
    covered, at = [0] * len(counts), 0
    for group, first, end in tiles:
        assert first == at % 16 and first < end <= 64
        covered[group], at = covered[group] + end - first, at + end - first
    assert covered == list(counts)
    # 40 | 3 at 40 | 150 at 43: 11..64, 64, 33 left | 7 at 193. The branch of 64 rows is for ends of 48 and up, and so on.
    assert [(first, end) for _, first, end in tiles] == [(0, 40), (8, 11), (11, 64), (0, 64), (0, 33), (1, 8)]
    ours = _bench_kernels.of_outer(counts, 200, 256, 512, _bench_kernels.blocks_tpu.V5P.outer)
    cost = _bench_tokamax.gmm_v2_cost(counts, 256, 512, (64, 256, 16), ours)
    assert cost.steps == 2 * 6 and cost.trips == (2 / 6, 2 / 6, 0, 2 / 6)
    assert cost.flops == 2 * 2 * (2 * 64 + 2 * 48 + 2 * 16) * 256 * 256
    assert _bench_tokamax.gmm_v2_cost(counts, 256, 512, (64, 256, 64), ours).trips == ()
    groups, order = [group for group, *_ in tiles], "middle first last single empty"
    cost = _bench_tokamax.outer_cost(groups, counts, 256, 512, (64, 256, 256), order, ours)
    assert cost.steps == 2 * 7 and cost.trips == (1 / 7, 1 / 7, 1 / 7, 3 / 7, 1 / 7)
    cost = _bench_tokamax.outer_cost(groups, counts, 256, 512, (64, 256, 256), "single first last middle", ours)
    assert cost.steps == 2 * 6 and cost.trips == (3 / 6, 1 / 6, 1 / 6, 1 / 6) and cost.flops == 2 * 2 * 6 * 64 * 256 * 256


@pytest.mark.parametrize("backward", [False, True])
def test_tokamax_s_attention_walks_what_is_seen(backward):
    cost = _bench_tokamax.splash_cost(2048, (512, 1024, 512), backward=backward)
    blocks = [[(k <= q + 511, k + 1023 <= q) for k in (0, 1024)] for q in range(0, 2048, 512)]
    seen, whole = (sum(which[i] for row in blocks for which in row) for i in range(2))
    assert (seen, whole) == (6, 2) and cost.steps == 128 * seen
    ends = (2 if backward else 4) / seen
    assert cost.trips == (*[1.0] * backward, ends, whole / seen, (seen - whole) / seen, ends)
    assert cost.flops == 128 * 6 * 512 * 1024 * (1664 if backward else 640)
    square = _bench_tokamax.splash_cost(2048, (1024, 1024, 1024), backward=backward)
    computed = 3 if backward else 1 + 2 * 10 / 16  # of 4 x 4 parts on the diagonal 10 are computed
    assert square.flops == 128 * computed * 1024 * 1024 * (1664 if backward else 640)


def test_flash_attention_pads_to_one_width():
    cost = _bench_attention.flash_cost(2048, (1024, 1024, 512))
    assert cost.flops == 128 * 3 * 1024 * 1024 * 4 * 256 and cost.trips == (1 / 2, 3 / 4, 1 / 2)
    (q, k, v) = (jax.ShapeDtypeStruct((2, 256, width), jax.numpy.bfloat16) for width in (192, 192, 128))
    out = jax.eval_shape(_bench_attention.flash((128, 128, 128)), q, k, v)
    assert out.shape == (1, 2, 256, 256)


def test_shapes_are_not_mixed_up():
    lines = [line("a", None, 100) | {"shape": "4096"}, line("a", "s", 90) | {"shape": "32768"}]
    assert bench_kernels.ratios(lines) == []


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_attention_s_tiles_are_those_that_a_query_sees(length):
    blocks = pallas_tpu.Blocks(queries=256, keys=512, tile=128, height=128)
    heads, side = 4, 512
    cost = _bench_attention.forward_cost(length, blocks, heads)
    n_q, n_k = length // 256, length // side
    assert cost.steps == heads * n_q * n_k and cost.least_flops == heads * length * (length + 1) // 2 * 640
    whole, some, pairs = 0, [0, 0], 0
    for i in range(n_q):
        for t in range(length // 128):  # a tile of keys: seen by all queries of the block, or by some of its halves
            if (t + 1) * 128 - 1 <= i * 256:
                whole, pairs = whole + 1, pairs + 256 * 128
                continue
            for half in range(2):
                if t * 128 <= i * 256 + half * 128 + 127:
                    some[half], pairs = some[half] + 1, pairs + 128 * 128
    counts = [whole, *some] if n_k == 1 else [n_q, whole, *some, n_q]
    assert [round(n * n_q * n_k, 6) for n in cost.trips] == counts
    assert cost.flops == heads * pairs * 640
    fetched, before = 0, None
    for h in range(heads):
        for i in range(n_q):
            for j in range(n_k):
                at = h, min(j, (i * 256 + 255) // side)
                fetched, before = fetched + (at != before), at
    rope, once = fetched, heads * length * (2 * (128 + 64 + 128) + 4)
    if n_k == 1:
        rope = 1
    elif n_k > 1:  # the rotary key's blocks are not a head's: from one head's last to the next one's first nothing stays
        assert (length - 1) // side != 0
    assert cost.bytes == once + fetched * side * 2 * 256 + rope * side * 2 * 64


@pytest.mark.parametrize(("length", "keys"), [(512, 512), (1024, 512), (2048, 256)])
def test_attention_s_tiles_with_scores_turned_alternate_between_two_copies(length, keys):
    blocks = pallas_tpu.Blocks(queries=512, keys=keys, tile=128, height=128, part=128)
    cost = _bench_attention.forward_cost(length, blocks, 4)
    begun = pieces = values = scores = 0
    of_copy = {(diagonal, n): 0 for diagonal in (False, True) for n in (0, 1)}
    for i, j in np.ndindex(length // 512, length // keys):
        seen = [(q, k) for q in range(i * 512, i * 512 + 512, 128) for k in range(j * keys, j * keys + keys, 128) if k <= q]
        for n, (q, k) in enumerate(seen):
            of_copy[q == k, n % 2] += 1
        begun, pieces = begun + (len(seen) > 0), pieces + len({q for q, _ in seen})
        values, scores = values + len(seen), scores + len(seen) + (len(seen) > 0)
    steps, counts = (length // 512) * (length // keys), list(of_copy.values())
    whole = [begun, pieces, sum(counts[:2]), *counts[:2], sum(counts[2:]), *counts[2:]]
    expected = whole[1:] if steps == 1 else [length // 512, *whole, length // 512] if length > keys else whole
    assert cost.steps == 4 * steps and [round(n * steps, 6) for n in cost.trips] == expected
    assert cost.flops == 4 * 128 * 128 * 2 * (scores * 192 + values * 128)


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("length", [512, 1024])
@pytest.mark.parametrize("together", [1, 2])
def test_attention_s_backward_tiles_are_those_that_a_query_sees(length, heads, together):
    blocks = pallas_tpu_backward.Blocks(block=256, tile=128, wide=128 * together, span=4096)
    cost = _bench_attention.backward_cost(length, blocks, heads)
    n, tiles = length // 256, length // 128
    seen = sum(q >= k for q in range(tiles) for k in range(tiles))
    pairs = n * (n + 1) // 2
    assert cost.steps == heads * pairs and cost.trips[3] == 2
    # Those on the diagonal are masked, and of two that are taken together the one beside it, which is left over.
    masked = tiles + n * (together - 1)
    assert cost.trips[4:6] == (masked / pairs, (seen - masked) / together / pairs)
    ends = n / pairs, n / pairs / (heads // (2 - heads % 2))
    assert cost.trips[:3] == (ends[0], ends[1], ends[0]) and cost.trips[6:] == (ends[0], ends[0], ends[1])
    assert cost.flops == heads * seen * 128 * 128 * 1664
    assert cost.flops / cost.least_flops == pytest.approx((tiles + 1) / (tiles + 1 / 128), rel=1e-6)
    assert cost.least_bytes < cost.bytes
    with pytest.raises(ValueError, match="expected several blocks of 128 in a span of 4096, got 128"):
        _bench_attention.backward_cost(128, pallas_tpu_backward.Blocks(span=4096), heads)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_scaled_product_s_loops_are_those_of_its_groups(transposed, fp8):
    blocks = scaled_tpu.Blocks(256, 512, 512, 128, 256)
    cost = _bench_scaled.product_cost((300, 0, 130), 520, 512, 1024, blocks, transposed=transposed, fp8=fp8)
    # Tiles of 256 rows: 0 and 1 for the first group, 1 for the third one, and 1 and 2 for the rows without a group.
    steps, strips, none, runs = 5, 2 + 1 + 2, 1 + 1, 512 // 256
    converted = [] if fp8 else [2 * (256 // 32)]  # rows: tiles 0 and 1, and for its second group tile 1 is still there
    converted += [] if fp8 and transposed else [2 * (512 // (32 if transposed else 128))]  # weights of two groups
    assert cost.steps == 2 * steps and len(cost.trips) == 3 + len(converted)
    assert [round(n * steps, 6) for n in cost.trips[1:]] == [*converted, strips * runs, none * runs]
    assert cost.least_flops == 2 * 430 * 512 * 1024 and cost.flops == 2 * strips * 128 * 512 * 1024
    rows, weights = 520 * (512 + 4 * 4), 2 * 512 * 1024
    scales, least_weights = 4 * 4 * 8, 3 * (512 * 1024 + 4 * 4 * 8)
    assert cost.least_bytes == rows + least_weights + 520 * 1024 * 2
    assert cost.bytes == 2 * rows + weights + 2 * 2 * scales + 520 * 1024 * 2
    with pytest.raises(ValueError, match="expected one block of the contraction, 384, got 768"):
        _bench_scaled.product_cost((4,), 4, 768, 256, blocks, transposed=transposed, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_scaled_outer_product_masks_where_groups_meet(fp8):
    blocks = scaled_tpu.Blocks(256, 512, 512, 128, 256, unroll=2)
    cost = _bench_scaled.outer_cost((384, 0, 640), 1024, 1024, 512, blocks, fp8=fp8)
    # Tiles of 256 rows: 0 whole and half of 1; one for the group without rows; half of 1, 2 and 3.
    steps, turns = 6, (512 // 128) * (512 // 256)
    assert cost.steps == 2 * steps
    converted = [] if fp8 else [512 / 32, 256 / 32]
    assert [*cost.trips] == pytest.approx([*converted, 3 / 6 * turns / 2, 3 / 6 * turns / 2, turns * 3 / steps])
    assert cost.flops == 2 * 2 * steps * 256 * 512 * 512 and cost.least_flops == 2 * 1024 * 1024 * 512
    assert cost.least_bytes == 1024 * (1024 + 512) + 4 * 8 * (1024 + 512) + 3 * 1024 * 512 * 2


def test_a_peer_s_blocks_below_the_diagonal_run():
    cost = _bench_attention.splash_cost(4096, (1024, 512, 512), _bench_attention.FORWARD, keys_outside=False)
    runs = sum(any(k <= q for k in (512 * j,) for q in (1024 * i + 1023,)) for i in range(4) for j in range(8))
    assert runs == 2 + 4 + 6 + 8 and cost.steps == 128 * 32 and cost.trips == (1 / 8, 20 / 32, 1 / 8)
    assert cost.flops == 128 * 20 * 1024 * 512 * 640
    assert _bench_attention.splash_cost(4096, (1024, 512, 512), 1, keys_outside=True).trips[0] == 1 / 4


def test_decode_s_trips_are_those_of_its_list():
    # Blocks of 256 rows of which 128 are an iteration, copied in pieces of 64, two ahead: lengths of one and a half blocks, of
    # two whole ones, and of none.
    problem = plan.Problem((384, 512, 0, 64), 1, 4, 576, 512, 64, 8)
    blocks = decode_tpu.Blocks(256, 128, 256, 128, depth=3)
    steps, trips = plan.trips(problem, blocks)
    left = [[256, 128, 256, 256], [0, 64]]  # of each core's entries: whole parts, about half of them
    entries = sum(map(len, left))
    pieces = [[-(-n // 64) for n in core] for core in left]
    assert steps == 2 * max(map(len, left))
    counts = [round(n * steps, 6) for n in trips]
    ahead = [divmod(sum(core[place] for core in pieces), 8) for place in range(2)]
    assert counts[0] == 2 and [counts[2], counts[4]] == [ahead[0][1], ahead[1][1]] and counts[5] == entries
    assert counts[7] == pieces[0][2] + pieces[0][3] and counts[9] == sum(map(sum, pieces)) and counts[6] == counts[8] == 0
    assert counts[10:] == [4, 3, 1 + 1, 1, 4]


def test_the_bytes_of_decode_quantise_and_router_are_near_the_least():
    found = [*_bench_kernels._decode("TPU v5", 4096), _bench_kernels._router(), *_bench_kernels.quantisers("pallas_tpu")]
    for case in found:
        assert 1 <= case.cost.bytes / case.cost.least_bytes <= 1.25, case.kernel


def test_a_gpu_s_rows_have_its_tensor_cores():
    good = {"kernel": "a", "shape": "1x1", "entry": "k", "registers": 255, "tensor_instructions": {"HGMMA": 2}}
    rows = bench_kernels.gpu_table([good, {"kernel": "b", "shape": "1x1", "failed": "no"}]).splitlines()
    assert rows[1].split() == ["a", "1x1", "k", "255", "-", "-", "-", "2", "HGMMA"] and rows[2].split()[-1] == "failed"
    assert max(map(len, rows)) <= 121


def measured(kernels):
    sizes = _bench_measure.Sizes(rows=512, hidden=256, width=128, experts=2, heads=2, length=128, batch=2, page=32, dense=128)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # on which JAX's own attention counts
        return list(_bench_measure.lines("reference", sizes, kernels, rounds=2))


def test_measuring_runs_each_kernel_and_its_peer(monkeypatch):
    monkeypatch.setattr(_bench_tokamax, "installed", lambda: False)
    found = measured([])
    assert [line["kernel"] for line in found] == [
        *("grouped_up", "grouped_up_backward", "grouped_swiglu", "grouped_swiglu_backward", "fp8_up", "fp8_outer", "fp8_dense"),
        *("attention", "attention_and_gradients", "decode", "decode_paged", "router"),
        *("quantise_1x128", "quantise_128x1", "quantise_128x128", "quantise_swiglu", "requantise_transposed"),
    ]  # fmt: skip
    for each in found:
        assert "failed" not in each and each["device"] == jax.devices()[0].device_kind and each["peer_over_ours"] > 0
        assert "share_of_roofline" not in each  # of a CPU no peak is known
        assert each["difference"] < 0.01  # bfloat16's rounding, in other orders
    rows = bench_kernels.measured_table(found).splitlines()
    assert len(rows) == 1 + len(found) and max(map(len, rows)) <= 140


IN_TOKAMAX = "grouped_up", "grouped_up_backward", "attention", "attention_and_gradients"


@pytest.mark.skipif(not _bench_tokamax.installed(), reason="tokamax is not installed")
def test_tokamax_s_results_are_ours():
    found = [line for line in measured(IN_TOKAMAX) if line["peer"].startswith("tokamax ")]
    assert [line["kernel"] for line in found] == list(IN_TOKAMAX)
    for each in found:
        assert "failed" not in each and each["peer_over_ours"] > 0 and each["difference"] < 0.01
        assert each["peer_implementation"] == ("RaggedDot" if "ragged" in each["peer"] else "DotProductAttention")  # XLA's


def test_what_tokamax_does_not_take_is_said_of_it_alone(monkeypatch):
    def refuses(*operands):
        raise ExceptionGroup("all implementations failed", [NotImplementedError("no such width")])

    monkeypatch.setattr(_bench_tokamax, "installed", lambda: True)
    monkeypatch.setattr(_bench_tokamax, "ragged_dot", jax.lax.ragged_dot)
    monkeypatch.setattr(_bench_tokamax, "dot_product_attention", refuses)
    monkeypatch.setattr(_bench_tokamax, "chosen", lambda lowered: type(lowered).__name__)
    found = {(line["kernel"], line["peer"]): line for line in measured(IN_TOKAMAX)}
    for kernel in IN_TOKAMAX[:2]:
        assert found[kernel, "tokamax ragged_dot"]["peer_implementation"] == "Lowered"
        assert "peer_implementation" not in found[kernel, "ragged_dot"]
    for kernel in IN_TOKAMAX[2:]:
        assert found[kernel, "tokamax dot_product_attention"]["failed"].startswith("all implementations failed")
        assert found[kernel, "dot_product_attention xla"]["difference"] < 0.01


def test_the_share_of_the_roofline_is_of_the_slower_of_compute_and_memory(monkeypatch):
    times = iter([0.0, 2.0, 2.0, 4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 5.0, 5.0, 7.0, 7.0, 11.0])  # twice to warm up
    monkeypatch.setattr(_bench_measure.time, "perf_counter", times.__next__)
    run = _bench_measure.Run(lambda x: x + 1, (jax.numpy.zeros(10),))
    case = _bench_measure.Case("k", "1", run, {"p": run}, 40)
    (found,) = _bench_measure.measure(case, 2, (40.0, 80.0))
    assert (found["us"], found["peer_us"], found["peer_over_ours"], found["share_of_roofline"]) == (2e6, 2.5e6, 1.25, 0.5)
    assert found["difference"] == 0
    assert _bench_measure.peaks("NVIDIA H100 80GB HBM3") == (989e12, 3352e9) and _bench_measure.peaks("cpu") is None


def test_a_peer_that_fails_leaves_the_others():
    def fails(x):
        raise ValueError("no such kernel")

    run, other = (_bench_measure.Run(call, (jax.numpy.ones(4),)) for call in (lambda x: x, fails))
    found = list(_bench_measure.measure(_bench_measure.Case("k", "1", run, {"bad": other, "good": run}, 0), 1, None))
    assert [(line["peer"], "failed" in line) for line in found] == [("bad", True), ("good", False)]
    (alone,) = _bench_measure.measure(_bench_measure.Case("k", "1", other, {"good": run}, 0), 1, None)
    assert alone["failed"] == "no such kernel"


def test_what_no_query_sees_is_not_counted_as_read():
    sizes = _bench_measure.Sizes(rows=8, hidden=8, width=8, experts=1, heads=2, length=64, batch=2, page=32)
    case = next(case for case in _bench_measure.cases("reference", sizes) if case.kernel == "decode")
    q, out, lse, lengths = 2 * 2 * 576 * 2, 2 * 2 * 512 * 2, 2 * 2 * 4, 8
    assert case.bytes() == q + out + lse + lengths + (32 + 63) * 576 * 2


def test_a_line_has_cycles_beside_the_roofline_s():
    slots = {"MXU": 200, "VALU": 90, "VSTORE": 60, "VSTORE:SPILL": 3, "VLOAD:FILL": 4}
    loop = bundles.Loop(100, bundles.Counter(slots), ())
    body = bundles.Loop(150, loop.slots, (loop,))
    capacity = {"MXU": 4, "VALU": 4, "VSTORE": 1, "VSTORE:SPILL": 1}
    program = bundles.Program("kernel", capacity, body, 40, (bundles.Part("loop", 60),))
    peak = _bench_roofline.peak_of(1e3, 2e12, 1e12, cores=2)  # of 2 GHz
    assert (peak.bytes, peak.ghz) == (500, 2) and peak.roofline(4e6, 1e3) == 2e3 and peak.roofline(1e3, 4e6) == 4e3
    cost = _bench_kernels.Cost(10, (5,), 3000, 2000, 1_100_000, 1_000_000)
    case = _bench_kernels.Case("k", "k", "1x1", lambda: None, (), cost, (8,), parts=True)
    found = bench_kernels.measured(program, 2**20, case, peak)
    cycles = 50 + 10 * (40 + 5 * 60)
    assert found["cycles"] == cycles / 2 and found["roofline_cycles"] == 500 and found["vmem_mib"] == 1
    assert (found["spill_stores"], found["spill_loads"], found["mxu_slots"]) == (3, 4, 0.5)
    assert (found["other_unit"], found["other_slots"]) == ("VSTORE", 0.6)
    assert found["share_of_roofline"] == round(1000 / cycles, 3) and found["cycles_per_gflop"] == cycles * 1e3
    assert (found["bytes_over_least"], found["flops_over_least"]) == (1.5, 1.1)
    rows = bench_kernels.table([found | {"kernel": "k", "chip": "v5p", "shape": "1x1"}]).splitlines()
    assert len(rows) == 2 and max(map(len, rows)) <= 110 and rows[1].split()[:4] == ["k", "1x1", "v5p", "0.5"]


def run(*arguments, **variables):
    gpu = "--chips=h100" in arguments
    path = os.pathsep.join([str(CUDA if gpu else LIBTPU), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "experiments.bench_kernels", *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **variables}, capture_output=True, text=True, timeout=900
    )


def test_an_unknown_chip_is_one_line():
    found = run("--chips=v9")
    assert found.returncode == 2 and found.stderr.splitlines() == [
        "error: --chips: expected some of v5e, v5p, v6e, tpu7x, h100, got 'v9'"
    ]


def test_measuring_without_an_accelerator_is_one_line():
    found = run("--measure", JAX_PLATFORMS="cpu")
    assert found.returncode == 2 and found.stderr.splitlines() == ["error: --measure: expected a TPU or a GPU, got cpu alone"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None and not LIBTPU.is_dir(), reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_every_kernel_compiles_at_the_shapes_of_v3(chip):
    found = run(f"--chips={chip}", "--nopeers")
    assert found.returncode == 0, found.stderr
    lines = [line for line in map(json.loads, found.stdout.splitlines()) if "kernel" in line]
    assert not [line for line in lines if "failed" in line]
    assert {line["kernel"] for line in lines} == {
        *("grouped_up", "grouped_down", "grouped_up_transposed", "grouped_down_transposed", "grouped_swiglu", "grouped_outer"),
        "grouped_swiglu_backward",
        *("attention", "attention_backward", "decode", "decode_paged", "router"),
        *("quantise_1x128", "quantise_128x1", "quantise_128x128", "quantise_swiglu", "requantise_transposed"),
        *("fp8_up", "fp8_up_transposed", "fp8_outer", "fp8_dense"),
    }
    for line in lines:
        assert line["bundles"] > 0 and line["spills"] == line["spill_stores"] + line["spill_loads"]
        assert 0 < line["vmem_mib"] < 128
        assert line["cycles"] > 0 and 0 < line["share_of_roofline"] < 1.5
        if line["kernel"].startswith(("decode", "quantise", "router")):
            assert line["bytes_over_least"] <= 1.25
    for line in (line for line in lines if line["kernel"].startswith(("grouped", "fp8"))):
        assert line["cycles_per_gflop"] > 0 and line["mxu_slots"] > 0.2 and 1 <= line["flops_over_least"] < 1.25


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None and not LIBTPU.is_dir(), reason="libtpu is not installed")
def test_v5p_s_programs_are_as_good_as_they_were():
    """A schedule is the same wherever the same compiler makes it; the limits are a tenth above what the loops spilled."""
    lines = [json.loads(line) for line in run("--chips=v5p", "--kernels=grouped_up,router").stdout.splitlines()]
    lines += [json.loads(line) for line in run("--chips=v5p", "--kernels=attention", "--nopeers").stdout.splitlines()]
    (best, *_) = (line for line in lines if line.get("ratio") == "grouped_up" and not line["peer"].startswith("tokamax"))
    assert best["peer_over_ours"] >= 1
    ours = {(line["kernel"], line["shape"]): line for line in lines if "kernel" in line and line["peer"] is None}
    splash = {4096: 14690, 32768: 10698}  # cycles per 10^9 FLOPs in its best blocks
    for length, cycles in splash.items():
        found = ours["attention", f"128x{length}x(128+64,128)"]
        assert found["cycles_per_gflop"] <= cycles and found["spills"] <= 708
    assert ours["grouped_up", "32768x7168x2048"]["spills"] <= 160 and ours["router", "32768x256"]["spills"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not CUDA.is_dir(), reason="the CUDA plugin is not installed")
def test_every_gpu_kernel_is_assembled_for_sm_90_at_the_shapes_of_v3():
    found = run("--chips=h100", JAX_PLATFORMS="cpu")
    assert found.returncode == 0, found.stderr
    lines = [line for line in map(json.loads, found.stdout.splitlines()) if "kernel" in line]
    assert not [line for line in lines if "failed" in line]
    for line in lines:
        if line["kernel"].endswith("float32"):  # whose programs have to fit shared memory
            continue
        assert line["spill_stores"] == line["spill_loads"] == 0 and line["registers"] <= 255
        if not line["kernel"].startswith(("router", "quantise", "requantise")):
            one = "HMMA" if line["kernel"].startswith("decode") else "HGMMA"  # 32 queries a program are too few for warp groups
            assert one in line["tensor_instructions"]
    assert {line["kernel"] for line in lines} >= {"grouped_swiglu", "attention_backward", "decode_paged", "fp8_outer", "router"}
