"""Shapes beside those that `experiments.bench_kernels` compiles: other widths, float32, few or odd rows, long texts."""

import os
import subprocess
import sys

import pytest
from planner.test_aot import ROOT, has_libtpu, with_libtpu

CASES = {
    "tpu:v5e:2x2": [
        "grouped:4096:7168:2048:8:float32", "attention:768:4:128:64:128:bfloat16",
        "scaled:96:2048:1408:4:float32",
    ],
    "tpu:v5p:2x2x1": ["grouped:4096:7168:2048:8:float32", "attention:131072:2:128:64:128:bfloat16"],
    "tpu:v6e:2x2": [
        "grouped:32752:2048:1408:8:bfloat16", "grouped:4096:7168:2048:8:float32",
        "attention:768:4:128:64:128:bfloat16", "scaled:4096:576:7168:8:bfloat16",
    ],
    "tpu:tpu7x:2x2x1": [
        "grouped:32752:2048:1408:8:bfloat16", "grouped:4096:7168:2048:8:float32",
        "attention:32768:2:192:64:256:bfloat16", "scaled:2048:1408:2048:4:float32",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu: `make test-slow` installs it")
@pytest.mark.parametrize("chip", CASES)
def test_kernels_compile(chip):
    env = with_libtpu()
    env["PYTHONPATH"] = os.pathsep.join([env.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "oracles.kernel_programs", chip, *CASES[chip]]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.split("\n")[:-1] == [f"compiled {case}" for case in CASES[chip]]
