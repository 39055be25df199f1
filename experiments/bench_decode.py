"""How fast are prompts and decoding, beside another program on this machine and beside what its memory allows?

  python -m experiments.bench_decode                                       # bench and mid; float32, bfloat16, int8, int4
  python -m experiments.bench_decode --dtypes=float32 --pairs=3 --peer='python peer.py --size {size} --what {what}'

One JSON line a measurement, each in a process of its own: `prefill` of 1x1024 tokens, `decode_b1` and `decode_b8` after 512,
`growth` of a step up to 4,096 with the host's share of a token. `share_of_bandwidth`: the bytes that a step must read (all
matrices but experts', the experts chosen, the cache) over its time, to the rate at which the same process reads as many bytes.
A peer is any program that prints JSON lines with the fields size, what, tokens_per_s; it runs alternately with ours, and the
ratios, pair by pair, are printed with their median. Expect two minutes a size and dtype without a peer.
"""

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402

from absl import app, flags  # noqa: E402

from dsv3_jax.config import DTYPES, ModelConfig  # noqa: E402
from dsv3_jax.presets import preset  # noqa: E402
from experiments import _bench  # noqa: E402

KINDS = ("float32", "bfloat16", "int8", "int4")
WHATS = ("prefill", "decode_b1", "decode_b8", "growth")

_SIZES = flags.DEFINE_list("sizes", ["bench", "mid"], "Presets to time.")
_DTYPES = flags.DEFINE_list("dtypes", list(KINDS), "Of weights: int8 and int4 compute in float32. A peer meets the first.")
_WHAT = flags.DEFINE_list("what", list(WHATS), "Which measurements.")
_PEER = flags.DEFINE_string("peer", None, "Command to run alternately with ours; {size} and {what} are filled in.")
_PAIRS = flags.DEFINE_integer("pairs", 3, "Pairs of ours and peer.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs in a process; the median counts.", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout", 900, "Seconds that one process may take.", lower_bound=0)
_CHILD = flags.DEFINE_bool("child", False, "Measure in this process: the first size, dtype and measurement.")


def _config(size: str, kind: str) -> ModelConfig:
    if kind not in KINDS:
        raise ValueError(f"--dtypes: expected some of {', '.join(KINDS)}, got {kind!r}")
    dtype: DTYPES = "bfloat16" if kind == "bfloat16" else "float32"
    return dataclasses.replace(preset(size).model, compute_dtype=dtype, param_dtype=dtype)


def _child(size: str, kind: str, what: str) -> None:
    from experiments import _bench_decode as measure

    config, runs = _config(size, kind), _RUNS.value
    if what == "prefill":
        lines = measure.measure_prefill(size, config, kind, runs, STARTED)
    elif what == "growth":
        lines = measure.measure_growth(size, config, kind, runs)
    else:
        exact = _config(size, "float32")
        batch = int(what.removeprefix("decode_b"))
        lines = measure.measure_decode(
            size, config, kind, batch, runs, STARTED, lambda: (exact, measure.model_of(exact, "float32")[0])
        )
    for line in lines:
        _bench.show(line)


def _ours(size: str, kind: str, what: str) -> _bench.Line:
    options = [f"--sizes={size}", f"--dtypes={kind}", f"--what={what}", f"--runs={_RUNS.value}"]
    lines = _bench.run_lines([sys.executable, "-m", "experiments.bench_decode", "--child", *options], _TIMEOUT.value)
    for line in lines:
        _bench.show(line)
    return lines[0]


def _peer(command: str, size: str, what: str) -> _bench.Line:
    lines = _bench.run_lines(_bench.peer_command(command, size, what), _TIMEOUT.value)
    line = _bench.best_line(lines, size, what)
    _bench.show({"peer": True, **line})
    return line


def _compare(size: str) -> None:
    first, *others = _DTYPES.value
    for what in _WHAT.value:
        ours = partial(_ours, size, first, what)
        if _PEER.value is not None and what != "growth":
            _bench.show(_bench.ratios(_bench.alternate(ours, partial(_peer, _PEER.value, size, what), _PAIRS.value)))
        else:
            ours()
        for kind in others if what != "growth" else ():
            _ours(size, kind, what)


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        if not (_SIZES.value and _DTYPES.value and _WHAT.value):
            raise ValueError("--sizes, --dtypes and --what: expected at least one each")
        for what in _WHAT.value:
            if what not in WHATS:
                raise ValueError(f"--what: expected some of {', '.join(WHATS)}, got {what!r}")
        for size in _SIZES.value:  # every mistake in the flags before the first minute is spent
            for kind in _DTYPES.value:
                _config(size, kind)
            if _PEER.value is not None:
                _bench.peer_command(_PEER.value, size)
        if _CHILD.value:
            _child(_SIZES.value[0], _DTYPES.value[0], _WHAT.value[0])
            return
        for size in _SIZES.value:
            _compare(size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
