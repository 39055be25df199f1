"""What does FP8 cost, simulated: a whole training step beside BF16's, its products, its rounding?

  python -m experiments.bench_fp8 [--sizes=bench,mid] [--pairs=3]
  python -m experiments.bench_fp8 --sizes= --products=1024x1024x1024,512x4096x512     # no training steps

JSON lines. First the training step of each size at 8x256 tokens with `--fp8` (the report's recipe, float32 accumulation) and
without, both in BF16, alternately in processes of their own; `step_time` is FP8's over BF16's, the median of pairs, to be at
most `target`; `step_cpu_time` is the same of processor time, which other programs disturb less, and `peak_rss_mb` the ratio of
peak memory. Then, in one process and in turn, products with the tensor core's accumulation beside float32's, and the GB/s at
which values are rounded, packed and unpacked. Two to four minutes a pair, on two cores.
"""

import sys

from absl import app, flags

from dsv3_jax.settings import parse_settings
from experiments import _bench

_SIZES = flags.DEFINE_list("sizes", ["bench", "mid"], "Presets whose training step is timed; may be empty.")
_FP8 = flags.DEFINE_string("fp8", "report", "The recipe, as in --set=fp8=: report, or JSON.")
_SET = flags.DEFINE_multi_string("set", [], "name=value: a field of the config, with FP8 and without.")
_PAIRS = flags.DEFINE_integer("pairs", 3, "Pairs of FP8 and BF16.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs in a process; the median counts.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 0, "Steps in a timed run; 0: 3 for bench, 1 otherwise.", lower_bound=0)
_PRODUCTS = flags.DEFINE_list("products", ["1024x1024x1024"], "M x K x N of products to time; may be empty.")
_PASSES = flags.DEFINE_list("passes", ["4096x2048"], "Shapes to round, pack and unpack; may be empty.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timings of each product and pass; the median counts.", lower_bound=1)
_TIMEOUT = flags.DEFINE_float("timeout", 900, "Seconds that one process may take.", lower_bound=0)
_CHILD = flags.DEFINE_bool("child", False, "Measure products and passes in this process.")


def sides(name: str, text: str, example: str) -> tuple[int, ...]:
    """`2x3x4` as (2, 3, 4), as many as the example's. Raises ValueError unless all are positive."""
    try:
        found = tuple(map(int, text.split("x")))
    except ValueError:
        found = ()
    if len(found) != example.count("x") + 1 or min(found) < 1:
        raise ValueError(f"--{name}: expected positive sizes like {example}, got {text!r}")
    return found


def _settings(fp8: str) -> list[str]:
    return [*_SET.value, f"fp8={fp8}"]


def _step(size: str, fp8: str) -> _bench.Line:
    """Runs bench_train's measurement in a child process, prints and returns its training line."""
    options = [f"--runs={_RUNS.value}", f"--steps={_STEPS.value}", *(f"--set={setting}" for setting in _settings(fp8))]
    command = [sys.executable, "-m", "experiments.bench_train", "--child", f"--sizes={size}", "--dtypes=bfloat16", *options]
    line = _bench.best_line(_bench.run_lines(command, _TIMEOUT.value), size)
    _bench.show({"fp8": fp8, **line})
    return line


def _child(products: list[tuple[int, ...]], passes: list[tuple[int, ...]]) -> None:
    from experiments import _bench_fp8

    for m, k, n in products:
        for line in _bench_fp8.products((m, k, n), _ROUNDS.value):
            _bench.show(line)
    for rows, columns in passes:
        for line in _bench_fp8.passes((rows, columns), _ROUNDS.value):
            _bench.show(line)


def _parts() -> None:
    """Products and passes, in a child process: this one stays small, for its memory counts against its children."""
    options = [f"--products={','.join(_PRODUCTS.value)}", f"--passes={','.join(_PASSES.value)}", f"--rounds={_ROUNDS.value}"]
    for line in _bench.run_lines([sys.executable, "-m", "experiments.bench_fp8", "--child", *options], _TIMEOUT.value):
        _bench.show(line)


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        products = [sides("products", text, "1024x1024x1024") for text in _PRODUCTS.value]
        passes = [sides("passes", text, "4096x2048") for text in _PASSES.value]
        if _CHILD.value:
            _child(products, passes)
            return
        if not (_SIZES.value or products or passes):
            raise ValueError("--sizes, --products and --passes: expected at least one in one of them")
        for size in _SIZES.value:  # every mistake in the flags before the first minute is spent
            if _bench.bench_config(size, "bfloat16", parse_settings(_settings(_FP8.value))).model.fp8 is None:
                raise ValueError(f"--fp8: expected a recipe, got {_FP8.value!r}; without one is the other side of the pair")
        for size in _SIZES.value:
            pairs = _bench.alternate(lambda: _step(size, _FP8.value), lambda: _step(size, "null"), _PAIRS.value)  # noqa: B023
            _bench.show(_bench.fp8_ratios(pairs, _FP8.value))
        if products or passes:
            _parts()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
