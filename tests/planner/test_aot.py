"""The step compiled ahead of time: the arithmetic around it, and (slow, where libtpu is) the 671B step for 512 chips."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.planner import aot
from dsv3_jax.planner.chips import chip_named
from dsv3_jax.planner.hlo import Collective, Cost
from dsv3_jax.planner.plan import make_plan
from dsv3_jax.planner.question import Question
from dsv3_jax.planner.share import make_share
from dsv3_jax.planner.table import scaled
from dsv3_jax.planner.targets import Memory, Target
from dsv3_jax.presets import preset
from dsv3_jax.settings import override

GROUPS = ((0, 1, 2, 3), (4, 5, 6, 7))
ROOT = Path(__file__).parent.parent.parent
KERNELS = {"mla_attention", "mla_attention_backward", "router"}
BF16_KERNELS = KERNELS | {
    "grouped_swiglu", "grouped_product", "grouped_swiglu_backward", "grouped_product_transposed", "grouped_outer",
}  # fmt: skip
FP8_KERNELS = KERNELS | {
    "grouped_scaled_product", "grouped_scaled_product_transposed", "grouped_scaled_outer", "scaled_product",
    "scaled_product_transposed", "quantise", "requantise_transposed", "swiglu_quantise",
}  # fmt: skip
XLA_ALONE = {
    "experts_implementation": "ragged_dot", "attention_implementation": "blockwise", "router_implementation": "top_k",
}  # fmt: skip
LIBTPU = ROOT / ".venv" / "aot"  # where `make test-slow` puts it, so that no other program of the environment meets it


def collective(kind, operand, result, groups=GROUPS, times=1):
    return Collective(kind, "bf16", operand, result, groups, times, False, "")


@pytest.mark.parametrize("kind, operand, result, sent", [
    ("all-gather", 100, 400, 300), ("reduce-scatter", 400, 100, 300), ("all-reduce", 400, 400, 600),
    ("all-to-all", 400, 400, 300), ("ragged-all-to-all", 400, 500, 300), ("collective-permute", 80, 80, 80),
])  # fmt: skip
def test_a_device_of_four_sends_what_a_ring_moves(kind, operand, result, sent):
    assert aot.on_the_wire(collective(kind, operand, result)) == sent
    assert aot.on_the_wire(collective("all-reduce", 8, 8, ((0,), (1,)))) == 0


def test_the_planners_figures_stand_beside_xlas_with_a_reason_where_they_are_apart():
    config = override(preset("tiny"), {"layout": "report", "mesh_data": 2, "mesh_expert": 4})
    plan = make_plan(config, chip_named("v5p"), Question(chips=8))
    ours = plan.value("memory", "arguments")
    target = Target("tpu:v5p:2x2x2", "tpu", "TPU v5", tuple(range(8)), 10**11, True)
    found = (collective("all-gather", 10, 40, times=3), collective("all-to-all", 40, 40, times=2))
    compiled = aot.Compiled(
        target, {"pipe": 1, "data": 2, "expert": 4, "tensor": 1}, Memory(int(ours), 0, 0, 0, 0, int(2 * ours)),
        Cost(found, (), {}, {}, {"router": 3, "grouped_outer": 6}), 1.0,
    )  # fmt: skip
    compared, facts, kernels, collectives = aot.sections(plan, compiled)
    assert [(row.key, *row.values) for row in kernels.rows] == [("grouped_outer", 6), ("router", 3)]
    assert {row.key for row in compared.rows} == set(aot.REASONS)
    apart = {row.key: row.values[2] for row in compared.rows}
    assert abs(apart["arguments"]) < 0.01 and apart["others"] < -0.9
    share = make_share(config, 8, "tpu")
    reasons = aot.reasons(share, compiled, compared)
    assert aot.REASONS["others"] in reasons and aot.REASONS["arguments"] not in reasons
    counted = " ".join(scaled(plan.value("flops", "buffers"), "FLOP"))
    assert any(f"multiply every row that a round has room for, with which the planner counts {counted}" in r for r in reasons)
    on_gpu = aot.reasons(make_share(config, 8), compiled._replace(target=target._replace(platform="cuda")), compared)
    rows = 4 * share.received_rows * (2 * 64 + 3 * 32) * 4 / 2**20  # four experts a rank
    assert any(f"rows masked for each expert, of both products' operands, take {rows:.3f} MiB" in r for r in on_gpu)
    assert {row.key: row.values[1:] for row in collectives.rows} == {
        "all-gather.expert.bf16.40": (3, 90), "all-to-all.expert.bf16.40": (2, 60),
    }  # fmt: skip
    cut = aot.shortened((compared, facts, kernels, collectives), most=1)[-1]
    assert [row.values for row in cut.rows] == [(40, 3, 90), (None, 2, 60)]


def test_what_does_not_divide_is_said_before_anything_is_compiled():
    config = override(preset("tiny"), {"layout": "report", "batch_size": 9, "batch_size_start": 9})
    import jax

    with pytest.raises(ValueError, match="batch_size: expected a multiple of 8, .* got 9"):
        aot.compile_step(config, Target("cpu", "cpu", "cpu", tuple(jax.devices()), 10**11, True))


def test_a_step_compiles_for_devices_that_are_given():
    """Of this machine, for want of others: the same path as for a topology."""
    import jax

    small = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "seq_len": 16}
    config = override(preset("tiny"), {"layout": "fully_sharded", "mesh_expert": 4} | small)
    compiled = aot.compile_step(config, Target("cpu:8", "cpu", "cpu", tuple(jax.devices()), 10**11, True))
    assert compiled.cost.flops > 0 and aot.sent(compiled, exchange=True) > 0 and compiled.sizes["expert"] == 4
    assert compiled.cost.dynamic  # rounds of the exchange count once


def has_libtpu():
    return LIBTPU.exists() or importlib.util.find_spec("libtpu") is not None


def with_libtpu():
    """The environment of a program that may find it."""
    path = os.pathsep.join([str(LIBTPU), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def kernel_runs(sections):
    return {name: row["value"] for name, row in sections["kernels"]["rows"].items()}


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu: `make test-slow` installs it")
def test_the_671b_step_compiles_for_512_chips_and_fits(tmp_path):
    command = [
        sys.executable, "-m", "experiments.plan", "--aot=tpu:v5p:8x8x8", f"--out={tmp_path}", "--set=layout=fully_sharded",
        "--set=mesh_expert=64", "--set=batch_size=512", "--set=batch_size_start=512",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env=with_libtpu())
    assert done.returncode == 0, done.stderr[-2000:]
    sections = json.loads((tmp_path / "plan.json").read_text())["sections"]
    compared, found = sections["aot"]["rows"], sections["collectives"]["rows"]
    assert compared["peak"]["XLA"] < 95.74 * 2**30
    for name in ("arguments", "exchange", "others"):
        assert abs(compared[name]["apart"]) < 0.05, compared[name]
    for name in ("peak", "temporaries"):
        assert abs(compared[name]["apart"]) < 0.1, compared[name]
    whole_buffers = sections["flops"]["rows"]["buffers"]["value"]
    assert abs(compared["flops"]["XLA"] / whole_buffers - 1) < 0.01, compared["flops"]
    assert "ragged-all-to-all" in " ".join(found)
    # A layer's experts lie whole on 64 ranks: 352 MB a rank is gathered over the data axis, never more.
    assert not any(".dataxexpert." in name and row["result"] > 2**26 for name, row in found.items())
    layers, experts = 62, 59  # with the MTP module's
    runs = kernel_runs(sections)
    assert experts <= runs.pop("router") <= 2 * experts  # repeated where XLA does not see that it is the same
    assert runs == {
        "mla_attention": layers, "mla_attention_backward": layers,
        "grouped_swiglu": 2 * experts,  # repeated: its inputs are kept
        "grouped_product": experts, "grouped_swiglu_backward": experts, "grouped_product_transposed": 2 * experts,
        "grouped_outer": 3 * experts,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu: `make test-slow` installs it")
def test_the_671b_step_in_fp8_compiles_for_512_chips_and_sends_the_dispatch_as_bytes(tmp_path):
    """Of its three kinds of layers that with experts alone: each has its own copies of all FP8 kernels, minutes to compile."""
    command = [
        sys.executable, "-m", "experiments.plan", "--aot=tpu:v5p:8x8x8", f"--out={tmp_path}", "--set=layout=fully_sharded",
        "--set=mesh_expert=64", "--set=batch_size=512", "--set=batch_size_start=512", "--set=fp8=report",
        "--set=first_k_dense_replace=0", "--set=num_nextn_predict_layers=0",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env=with_libtpu())
    assert done.returncode == 0, done.stderr[-2000:]
    sections = json.loads((tmp_path / "plan.json").read_text())["sections"]
    compared, found = sections["aot"]["rows"], sections["collectives"]["rows"]
    assert compared["peak"]["XLA"] < 45 * 2**30  # of 95.74; found 36.2
    assert abs(compared["arguments"]["apart"]) < 0.05 and abs(compared["others"]["apart"]) < 0.05
    assert abs(compared["exchange"]["apart"]) < 0.1, compared["exchange"]
    assert any("ragged-all-to-all" in name and "u8" in name for name in found), list(found)
    assert set(kernel_runs(sections)) == FP8_KERNELS


def test_a_target_that_does_not_exist_is_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.plan", "--aot=tpu:v9:2x2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu: `make test-slow` installs it")
@pytest.mark.parametrize(("chip", "settings", "kernels"), [
    ("tpu:v6e:2x2", {"fp8": "report"}, FP8_KERNELS), ("tpu:tpu7x:2x2x1", {}, BF16_KERNELS),
    ("tpu:v5p:2x2x1", XLA_ALONE, set()),
])  # fmt: skip
def test_a_small_model_s_step_compiles_with_the_kernels_that_it_asks_for(tmp_path, chip, settings, kernels):
    """Sides that are no multiples of a block, or of a register: 16 experts in 4 groups."""
    command = [
        sys.executable, "-m", "experiments.plan", "--preset=tiny", f"--aot={chip}", f"--out={tmp_path}",
        *(f"--set={name}={value}" for name, value in settings.items()),
        "--set=layout=fully_sharded", "--set=batch_size=8", "--set=batch_size_start=8", "--set=n_routed_experts=16",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=with_libtpu())
    assert done.returncode == 0, done.stderr[-2000:]
    runs = kernel_runs(json.loads((tmp_path / "plan.json").read_text())["sections"])
    assert set(runs) == kernels
    assert ("Kernels of a device in a step" in done.stdout) == bool(kernels)
