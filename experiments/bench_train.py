"""How fast is a whole training step (forward, backward, AdamW), and how fast beside another program on this machine?

  python -m experiments.bench_train --profile                                  # both sizes, float32 and bfloat16
  python -m experiments.bench_train --peer='python peer.py --size {size}' --pairs=3

One JSON line a measurement, each in a process of its own. A peer is any program that prints JSON lines with the fields size,
what, tokens_per_s, and where it knows them first_call_s and peak_rss_mb. It runs alternately with ours, and the last line holds
the ratios ours/peer, pair by pair, with their median: on a shared machine only these mean something. The peer's fastest
training line counts. Expect about a minute a size and dtype without a peer.
"""

import time

STARTED = time.perf_counter()  # before the imports: they belong to the time to the first step

import sys  # noqa: E402

from absl import app, flags  # noqa: E402

from dsv3_jax.config import Config  # noqa: E402
from dsv3_jax.settings import parse_settings  # noqa: E402
from experiments import _bench  # noqa: E402

_SIZES = flags.DEFINE_list("sizes", ["bench", "mid"], "Presets to time, at 8x256 tokens.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute dtypes; a peer is compared with the first.")
_PEER = flags.DEFINE_string("peer", None, "Command to run alternately with ours; {size} becomes the size.")
_PAIRS = flags.DEFINE_integer("pairs", 3, "Pairs of ours and peer.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs in a process; the median counts.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 0, "Steps in a timed run; 0: 3 for bench, 1 otherwise.", lower_bound=0)
_TIMEOUT = flags.DEFINE_float("timeout", 900, "Seconds that one process may take.", lower_bound=0)
_PROFILE = flags.DEFINE_bool("profile", False, "Also print the share of each component in a step's time.")
_SET = flags.DEFINE_multi_string("set", [], "name=value: a field of the config, as in experiments.train.")
_CHILD = flags.DEFINE_bool("child", False, "Measure in this process: the first size and dtype.")


def _config(size: str, dtype: str) -> Config:
    return _bench.bench_config(size, dtype, parse_settings(_SET.value))


def _child(size: str, dtype: str) -> None:
    from experiments import _bench_step

    config = _config(size, dtype)
    lines = _bench_step.measure(size, config, runs=_RUNS.value, steps=_STEPS.value, profile=_PROFILE.value, started=STARTED)
    for line in lines:
        _bench.show(line)


def _ours(size: str, dtype: str) -> _bench.Line:
    """Runs and prints our measurement in a child process; returns its training line."""
    options = [f"--runs={_RUNS.value}", f"--steps={_STEPS.value}", f"--profile={_PROFILE.value}"]
    options += [f"--set={setting}" for setting in _SET.value]
    command = [sys.executable, "-m", "experiments.bench_train", "--child", f"--sizes={size}", f"--dtypes={dtype}", *options]
    lines = _bench.run_lines(command, _TIMEOUT.value)
    for line in lines:
        _bench.show(line)
    return _bench.best_line(lines, size)


def _peer(command: str, size: str) -> _bench.Line:
    lines = _bench.run_lines(_bench.peer_command(command, size), _TIMEOUT.value)
    line = _bench.best_line(lines, size)
    _bench.show({"peer": True, **line})
    return line


def _compare(size: str) -> None:
    first, *others = _DTYPES.value
    if (command := _PEER.value) is None:
        _ours(size, first)
    else:
        pairs = _bench.alternate(lambda: _ours(size, first), lambda: _peer(command, size), _PAIRS.value)
        _bench.show(_bench.ratios(pairs))
    for dtype in others:
        _ours(size, dtype)


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        if not (_SIZES.value and _DTYPES.value):
            raise ValueError("--sizes and --dtypes: expected at least one each")
        if _CHILD.value:
            _child(_SIZES.value[0], _DTYPES.value[0])
            return
        for size in _SIZES.value:  # every mistake in the flags before the first minute is spent
            for dtype in _DTYPES.value:
                _config(size, dtype)
            if _PEER.value is not None:
                _bench.peer_command(_PEER.value, size)
        for size in _SIZES.value:
            _compare(size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
