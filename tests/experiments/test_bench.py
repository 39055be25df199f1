"""The benchmarks' protocol against peers that behave and peers that do not."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import _bench


def _peer(tmp_path, body):
    path = tmp_path / "peer.py"
    path.write_text("import json, os, sys, time\n" + body)
    return [sys.executable, str(path)]


def test_lines_of_a_peer_that_are_not_json_objects_are_ignored(tmp_path):
    command = _peer(tmp_path, "print('warming up'); print('[1]'); print('{broken'); print(json.dumps(dict(size='bench')))")
    assert _bench.run_lines(command, 20) == [{"size": "bench"}]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no such model')", "exited with status 1: no such model"),
        ("print('hello')", "printed no JSON line"),
        ("time.sleep(60)", "took longer than 1 s"),
    ],
)
def test_a_failing_peer_is_reported_in_one_line(tmp_path, body, message):
    with pytest.raises(ValueError, match=message) as caught:
        _bench.run_lines(_peer(tmp_path, body), 1)
    assert "\n" not in str(caught.value)


def test_a_peer_that_does_not_exist_is_reported_in_one_line():
    with pytest.raises(ValueError, match="cannot start '/no/such/program'.*No such file"):
        _bench.run_lines(["/no/such/program"], 1)


def test_a_peer_that_takes_too_long_ends_with_the_processes_it_started(tmp_path):
    pid = tmp_path / "pid"
    body = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    with pytest.raises(ValueError, match="took longer"):
        _bench.run_lines(_peer(tmp_path, body), 2)
    stat = Path(f"/proc/{pid.read_text()}/stat")
    # A killed grandchild may stay a zombie until its new parent collects it.
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the peer's own child is still running"
        time.sleep(0.05)


def test_the_size_is_filled_into_the_peers_command():
    assert _bench.peer_command("python peer.py --size {size} --note 'a b'", "mid") == [
        *("python", "peer.py", "--size", "mid", "--note", "a b")
    ]
    for wrong in ("", "python 'peer"):
        with pytest.raises(ValueError, match="--peer"):
            _bench.peer_command(wrong, "mid")


def test_the_fastest_training_line_of_the_size_counts():
    lines = [
        {"size": "bench", "what": "train", "tokens_per_s": 10.0},
        {"size": "bench", "what": "train_compile", "tokens_per_s": 12.0},
        {"size": "bench", "what": "prefill", "tokens_per_s": 99.0},
        {"size": "mid", "what": "train", "tokens_per_s": 50.0},
        {"size": "bench", "what": "train", "error": "out of memory"},
    ]
    assert _bench.best_line(lines, "bench")["tokens_per_s"] == 12.0


def test_a_peer_whose_lines_hold_only_an_error_is_a_failure():
    with pytest.raises(ValueError, match="no line on train.*'mid': out of memory"):
        _bench.best_line([{"size": "mid", "what": "train", "error": "out of memory"}], "mid")


def test_ours_and_the_peer_run_alternately():
    order = []
    pairs = _bench.alternate(lambda: order.append("A") or {"n": len(order)}, lambda: order.append("B") or {"n": len(order)}, 3)
    assert order == list("ABABAB")
    assert pairs == [({"n": 1}, {"n": 2}), ({"n": 3}, {"n": 4}), ({"n": 5}, {"n": 6})]


def test_the_result_is_the_median_of_paired_ratios_and_not_the_ratio_of_medians():
    # A machine that slows down fivefold between pairs: each pair says 2, while the medians, 40 and 5, say 8.
    pairs = [({"size": "mid", "tokens_per_s": a}, {"tokens_per_s": b}) for a, b in [(100.0, 50.0), (40.0, 20.0), (2.0, 1.0)]]
    assert _bench.ratios(pairs)["tokens_per_s"] == 2.0
    uneven = [({"tokens_per_s": a}, {"tokens_per_s": b}) for a, b in [(100.0, 5.0), (40.0, 20.0), (2.0, 1.0)]]
    assert _bench.ratios(uneven)["tokens_per_s"] == 2.0
    assert _bench.ratios(uneven)["tokens_per_s_pairs"] == [20.0, 2.0, 2.0]


def test_a_quantity_that_one_side_does_not_report_has_no_ratio():
    line = _bench.ratios([({"tokens_per_s": 4.0, "peak_rss_mb": 10}, {"tokens_per_s": 2.0})])
    assert line["tokens_per_s"] == 2.0
    assert "peak_rss_mb" not in line


def _run(*arguments):
    command = [sys.executable, "-m", "experiments.bench_train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes=huge"], "unknown preset 'huge'"),
        (["--dtypes=float8"], "expected one of float32, bfloat16"),
        (["--set=expert=4"], "unknown setting 'expert'; nearest:"),
        (["--peer="], "--peer: expected a command"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_status_2(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_parent_process_never_imports_jax():
    # A child's peak memory starts from its parent's on Linux: importing JAX here would be counted against a peer.
    code = "import sys, experiments.bench_train; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.slow
def test_ours_and_a_fake_peer_give_measurements_a_profile_and_ratios(tmp_path):
    line = {"size": "tiny", "what": "train", "tokens_per_s": 1.0, "peak_rss_mb": 100, "first_call_s": 10.0}
    peer = " ".join(_peer(tmp_path, f"print('noise'); print(json.dumps({line!r}))"))
    done = _run("--sizes=tiny", "--dtypes=float32", "--pairs=1", "--runs=2", "--profile", f"--peer={peer} {{size}}")
    assert done.returncode == 0, done.stderr
    ours, profile, theirs, ratio = (json.loads(row) for row in done.stdout.splitlines())
    assert theirs == {"peer": True, **line}
    assert ratio["tokens_per_s"] == pytest.approx(ours["tokens_per_s"], abs=1e-3)
    assert ratio["first_call_s"] == pytest.approx(ours["first_call_s"] / 10, abs=1e-3)
    assert 0 < ours["compile_s"] < ours["first_call_s"]
    assert ours["peak_rss_mb"] > 100 and len(ours["runs"]) == 2
    assert 0 < ours["share_of_peak"] < 1
    assert sum(profile["share_of_time"].values()) == pytest.approx(1, abs=0.01)
    assert {"attention", "experts", "head + loss"} <= set(profile["share_of_time"])
