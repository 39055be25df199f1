"""The kernels' programs for TPUs that are not here: each compiles at V3's shapes, and its lines say what they promise."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bench_kernels

ROOT = Path(__file__).parent.parent.parent
LIBTPU = ROOT / ".venv" / "aot"  # where `make test-slow` puts it


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


def run(*arguments):
    path = os.pathsep.join([str(LIBTPU), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "experiments.bench_kernels", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900)


def test_an_unknown_chip_is_one_line():
    found = run("--chips=v9")
    assert found.returncode == 2 and found.stderr.splitlines() == [
        "error: --chips: expected some of v5e, v5p, v6e, tpu7x, got 'v9'"
    ]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None and not LIBTPU.is_dir(), reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_every_kernel_compiles_at_the_shapes_of_v3(chip):
    found = run(f"--chips={chip}", "--nopeers")
    assert found.returncode == 0, found.stderr
    lines = [json.loads(text) for text in found.stdout.splitlines()]
    assert not [line for line in lines if "failed" in line]
    assert {line["kernel"] for line in lines} == {
        *("grouped_up", "grouped_down", "grouped_up_transposed", "grouped_down_transposed", "grouped_swiglu", "grouped_outer"),
        *("attention", "attention_backward", "decode", "decode_paged", "router"),
        *("quantise_1x128", "quantise_128x1", "quantise_128x128", "quantise_swiglu", "requantise_transposed"),
    }
    for line in lines:
        assert line["bundles"] > 0 and line["spills"] >= 0
    for line in (line for line in lines if line["kernel"].startswith("grouped")):
        assert line["cycles_per_gflop"] > 0 and line["mxu_slots"] > 0.4 and 1 <= line["flops_over_least"] < 1.25
