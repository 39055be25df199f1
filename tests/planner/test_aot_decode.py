"""A decoding step compiled ahead of time: for this machine's devices and (slow, where libtpu is) all of 671B for 320 chips."""

import json
import subprocess
import sys

import jax
import pytest
from planner.test_aot import ROOT, has_libtpu, with_libtpu

from dsv3_jax.planner import aot, aot_decode
from dsv3_jax.planner.targets import Target
from dsv3_jax.presets import preset
from dsv3_jax.settings import override


def values(section):
    return {row.key: row.values[0] for row in section.rows}


def test_what_a_device_holds_is_counted_as_xla_lays_it_out():
    config = override(preset("tiny"), {"mesh_tensor": 2, "num_nextn_predict_layers": 0})
    target = Target("cpu:8", "cpu", "cpu", tuple(jax.devices()), 10**11, True)
    batch = aot_decode.Batch(requests=2, context=64)
    compiled, model = aot_decode.compile_decode(config, target, batch)
    held, kernels, collectives = aot_decode.sections(config, compiled, model, batch)
    found = values(held)
    assert not kernels.rows  # on CPU
    assert (found["mesh_expert"], found["mesh_tensor"], found["slots"]) == (4, 2, 3)
    row = config.model.kv_lora_rank + config.model.qk_rope_head_dim
    assert found["cache"] == 2 * 2 * 64 * row * 4 * config.model.num_hidden_layers  # two sequences of each of two tensor ranks
    parts = sum(found[name] for name in ("experts", "attention", "tables", "other", "cache"))
    small = 3 * config.model.n_main_moe_layers * 1000  # norm, bias, replicas, tokens and positions
    assert parts < found["arguments"] < parts + small + 20_000
    assert aot.sent(compiled, exchange=True) > 0 and any("all-to-all" in row.key for row in collectives.rows)


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu: `make test-slow` installs it")
def test_a_step_of_671b_compiles_for_the_reports_320_devices_and_copies_no_cache(tmp_path):
    command = [sys.executable, "-m", "experiments.plan", "--aot=tpu:v5p:8x8x5", "--decode", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=with_libtpu())
    assert done.returncode == 0, done.stderr[-2000:]
    sections = json.loads((tmp_path / "plan.json").read_text())["sections"]
    found = {name: row["value"] for name, row in sections["decode"]["rows"].items()}
    assert (found["mesh_expert"], found["mesh_tensor"], found["slots"], found["copies"]) == (80, 4, 1, 63)
    assert found["experts"] == 58 * 3 * 7168 * 2048 * 2  # one expert of each layer
    assert found["cache"] == 32 * 4 * 4096 * 640 * 2 * 61  # rows of 576 in whole lanes
    assert found["temporaries"] < found["cache"] / 10 and found["peak"] < 95.74 * 2**30
    kinds = " ".join(sections["collectives"]["rows"])
    assert "ragged-all-to-all.expertxtensor.bf16" in kinds and "reduce-scatter.tensor.bf16" in kinds
    assert "decoding step" in done.stdout and "ragged-all-to-all" in done.stdout


@pytest.mark.parametrize("flags, said", [
    (["--decode"], "--aot"), (["--decode", "--aot=tpu:v9:2x2"], "v9"),
    pytest.param(["--decode", "--aot=tpu:v5p:2x2x1", "--set=mesh_tensor=3"], "tensor", marks=pytest.mark.slow),
    pytest.param(["--decode", "--aot=tpu:v5p:2x2x1", "--requests=0"], "--requests", marks=pytest.mark.slow),
    pytest.param(["--decode", "--aot=tpu:v5p:2x2x1"], "memory: expected at most", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_cannot_be_compiled_is_one_line(flags, said):
    if "v5p" in " ".join(flags) and not has_libtpu():
        pytest.skip("needs libtpu: `make test-slow` installs it")
    command = [sys.executable, "-m", "experiments.plan", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=with_libtpu())
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
