"""The benchmarks' protocol: programs that print JSON lines run alternately, and the median of paired ratios is the result.

Nothing here imports JAX: Linux hands a parent's peak memory on to the children that it starts, so the parent stays small.
"""

import json
import os
import shlex
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dsv3_jax.config import Config
from dsv3_jax.presets import preset
from dsv3_jax.settings import override

Line = dict[str, Any]
BATCH, WINDOW = 8, 256  # sequences and tokens of one step


def bench_config(size: str, dtype: str, settings: Mapping[str, str]) -> Config:
    """The preset of that size at 8 x 256 tokens in `dtype`. Raises ValueError for an unknown preset, dtype or setting."""
    shape = {"batch_size": BATCH, "batch_size_start": BATCH, "micro_batch_size": None, "seq_len": WINDOW}
    return override(preset(size), {**shape, "compute_dtype": dtype, **settings})


def peer_command(template: str, size: str, what: str = "train") -> list[str]:
    """The words of `template`, `{size}` and `{what}` filled in. Raises ValueError if it is empty or its quotes do not match."""
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ValueError(f"--peer: cannot read {template!r} as a command: {error}") from None
    if not words:
        raise ValueError("--peer: expected a command, got an empty string")
    return [word.replace("{size}", size).replace("{what}", what) for word in words]


def show(line: Line) -> None:
    """A measurement, as soon as it is made."""
    print(json.dumps(line), flush=True)


def failure(error: Exception) -> Line:
    """What stands in a line in the place of figures."""
    return {"failed": " ".join(str(error).split())[:200]}


def run_lines(command: Sequence[str], timeout: float) -> list[Line]:
    """The JSON objects that `command` prints, one a line; its other lines are ignored.

    Raises ValueError, one line, if it cannot start, fails, outlasts `timeout` seconds or prints no JSON object.
    """
    name = shlex.join(command)
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
    except OSError as error:
        raise ValueError(f"cannot start {name!r}: {error.strerror}") from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:  # also Ctrl-C: whatever the program has started must end with it
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise ValueError(f"{name!r} took longer than {timeout:g} s") from None
            raise
    if process.returncode:
        said = (err.strip().splitlines() or ["nothing on stderr"])[-1]
        raise ValueError(f"{name!r} exited with status {process.returncode}: {said}")
    lines = list(_json_objects(out))
    if not lines:
        raise ValueError(f"{name!r} printed no JSON line")
    return lines


def _json_objects(text: str) -> Iterator[Line]:
    for row in text.splitlines():
        try:
            value = json.loads(row)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value


def best_line(lines: Sequence[Line], size: str, what: str = "train") -> Line:
    """The fastest line of `size` on `what` (a program may print one for each of its modes: train, train_compile, ...).

    Raises ValueError, with the program's own error where its lines hold one, if there is none.
    """
    ours = [line for line in lines if line.get("size") == size and str(line.get("what", "train")).startswith(what)]
    timed = [line for line in ours if isinstance(line.get("tokens_per_s"), int | float) and line["tokens_per_s"] > 0]
    if timed:
        return max(timed, key=lambda line: line["tokens_per_s"])
    errors = [str(line["error"]) for line in ours if "error" in line]
    raise ValueError(f"no line on {what} with tokens_per_s for size {size!r}" + (f": {errors[0]}" if errors else ""))


def alternate(ours: Callable[[], Line], peer: Callable[[], Line], pairs: int) -> list[tuple[Line, Line]]:
    """A B A B ...: what else the machine does then falls on both sides of a pair alike."""
    return [(ours(), peer()) for _ in range(pairs)]


def ratios(pairs: Sequence[tuple[Line, Line]]) -> Line:
    """Ours over the peer's, pair by pair, and the median; only quantities that every line holds."""
    first = pairs[0][0]
    what = f"{first.get('what', 'train')}: ratio ours/peer"
    line: Line = {"size": first.get("size"), "what": what, "dtype": first.get("dtype"), "pairs": len(pairs)}
    for quantity in ("tokens_per_s", "tokens_per_cpu_s", "first_call_s", "peak_rss_mb"):
        if all(side.get(quantity) for pair in pairs for side in pair):
            each = [ours[quantity] / peer[quantity] for ours, peer in pairs]
            line[quantity] = round(statistics.median(each), 3)
            line[f"{quantity}_pairs"] = [round(value, 3) for value in each]
    return line


FP8_TARGET = 1.6  # of step_time


def fp8_ratios(pairs: Sequence[tuple[Line, Line]], fp8: str) -> Line:
    """FP8 over BF16; times are the inverse of the tokens' a second, pair by pair."""
    line = {**ratios(pairs), "what": "train: ratio fp8/bfloat16", "fp8": fp8}
    for name, speed in (("step_time", "tokens_per_s"), ("step_cpu_time", "tokens_per_cpu_s")):
        each = [without[speed] / ours[speed] for ours, without in pairs]
        line |= {name: round(statistics.median(each), 3), f"{name}_pairs": [round(value, 3) for value in each]}
    return line | {"target": FP8_TARGET}
