"""What FP8 costs: every line that is promised, ratios the right way up, mistakes in one line. No timing is asserted."""

import json
import subprocess
import sys

import pytest

from experiments import _bench, _bench_fp8


def test_a_step_that_takes_longer_in_fp8_has_a_step_time_above_one_and_fewer_tokens():
    bf16 = {"size": "mid", "tokens_per_s": 100.0, "tokens_per_cpu_s": 60.0, "peak_rss_mb": 400}
    pairs = [
        ({"size": "mid", "tokens_per_s": ours, "tokens_per_cpu_s": 40.0, "peak_rss_mb": 300}, bf16)
        for ours in (50.0, 80.0, 40.0, 25.0)
    ]
    line = _bench.fp8_ratios(pairs, "report")
    assert line["step_time_pairs"] == [2.0, 1.25, 2.5, 4.0]
    assert line["step_time"] == 2.25 and line["tokens_per_s"] == 0.45  # of an even number of pairs no inverses
    assert line["step_cpu_time"] == 1.5 and line["step_cpu_time_pairs"] == [1.5] * 4
    assert line["peak_rss_mb"] == 0.75 and line["target"] == 1.6
    assert (line["size"], line["what"], line["fp8"]) == ("mid", "train: ratio fp8/bfloat16", "report")


def test_every_fidelity_and_reading_of_a_product_is_set_beside_float32():
    lines = list(_bench_fp8.products((8, 256, 16), rounds=3))
    assert [line["accumulation"] for line in lines] == [
        *("14 bits aligned, f32/128", "14 bits apart, f32/128"),
        *("14 bits aligned", "14 bits apart"),
    ]
    for line in lines:
        assert line["shape"] == "[8, 256] x [256, 16]"
        assert len(line["ratio_rounds"]) == 3 and line["ratio"] == sorted(line["ratio_rounds"])[1] > 0
        assert line["ms"] > 0 and line["float32_ms"] > 0


def test_rounding_packing_and_unpacking_of_both_widths_are_measured():
    lines = {line["what"]: line for line in _bench_fp8.passes((8, 128), rounds=1)}
    for form in ("e4m3", "e5m6"):
        assert {f"quantise {form} 1x128", f"pack {form}", f"unpack {form}", f"quantise and pack {form} 1x128"} <= set(lines)
    assert {"negate", "quantise e4m3 128x128"} <= set(lines)
    assert all(line["gb_per_s"] > 0 and len(line["rounds"]) == 1 for line in lines.values())
    assert lines["unpack e4m3"]["counted"] == "float32 written" and lines["pack e4m3"]["counted"] == "float32 read"


def _run(*arguments):
    command = [sys.executable, "-m", "experiments.bench_fp8", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes=huge"], "unknown preset 'huge'"),
        (["--fp8=reprot"], "fp8: expected JSON or null, got 'reprot'"),
        (["--fp8=null"], "--fp8: expected a recipe"),
        (["--set=expert=4"], "unknown setting 'expert'; nearest:"),
        (["--products=8x8"], "--products: expected positive sizes like 1024x1024x1024, got '8x8'"),
        (["--passes=8x0"], "--passes: expected positive sizes like 4096x2048, got '8x0'"),
        (["--sizes=", "--products=", "--passes="], "expected at least one"),
        (["more"], "unexpected argument 'more'"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_status_2(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_parent_process_never_imports_jax():
    # A child's peak memory starts from its parent's on Linux: importing JAX here would be counted against the smaller side.
    code = "import sys, experiments.bench_fp8; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.slow
def test_steps_with_and_without_fp8_alternate_before_the_parts():
    done = _run("--sizes=tiny", "--pairs=1", "--runs=1", "--steps=1", "--products=4x64x4", "--passes=4x128", "--rounds=1")
    assert done.returncode == 0, done.stderr
    ours, without, ratio, *parts = (json.loads(row) for row in done.stdout.splitlines())
    assert (ours["fp8"], without["fp8"]) == ("report", "null")
    assert ours["dtype"] == without["dtype"] == "bfloat16" and ours["loss"] != without["loss"]
    assert ratio["step_time"] == pytest.approx(without["tokens_per_s"] / ours["tokens_per_s"], abs=1e-3)
    assert ratio["peak_rss_mb"] == pytest.approx(ours["peak_rss_mb"] / without["peak_rss_mb"], abs=1e-3)
    assert sum("accumulation" in part for part in parts) == 4 and sum("gb_per_s" in part for part in parts) == 10
