"""What a run leaves behind, one record a step: `metrics.jsonl` for the numbers, `routing.bin` for the router's arrays.

Both are append-only, so memory stays bounded; a resumed run first cuts them back to the step of its checkpoint.
"""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

METRICS, ROUTING = "metrics.jsonl", "routing.bin"


def routing_dtype(n_layers: int, n_experts: int) -> np.dtype[Any]:
    """One record of `routing.bin`: the step, its expert counts, and the router bias that it left behind."""
    shape = (n_layers, n_experts)
    return np.dtype([("step", "<i8"), ("load", "<i4", shape), ("bias", "<f4", shape)])


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in order; a torn last line (the process was killed) is left out."""
    path = Path(workdir) / METRICS
    records = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            break
        records.append(json.loads(line))
    return records


def read_routing(workdir: str | Path, n_layers: int, n_experts: int) -> np.ndarray:
    """Structured array of `routing_dtype`, one row a step, mapped from the file. A torn last record is left out."""
    path, dtype = Path(workdir) / ROUTING, routing_dtype(n_layers, n_experts)
    rows = path.stat().st_size // dtype.itemsize if path.exists() else 0
    return np.memmap(path, dtype, "r", shape=(rows,)) if rows else np.empty(0, dtype)


def finite(value: Any) -> float | None:
    """`value` as JSON can write it: None for what is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None


class Journal:
    """Writes the two files of the run in `workdir` from the step after `step` on. A context manager."""

    def __init__(self, workdir: str | Path, n_layers: int, n_experts: int, step: int):
        self._dtype = routing_dtype(n_layers, n_experts)
        workdir = Path(workdir)
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        _replace(workdir / METRICS, "".join(json.dumps(record) + "\n" for record in kept).encode())
        rows = read_routing(workdir, n_layers, n_experts)
        _replace(workdir / ROUTING, rows[rows["step"] <= step].tobytes())
        self._metrics, self._routing = open(workdir / METRICS, "a"), open(workdir / ROUTING, "ab")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()
        self._routing.close()

    def write(self, record: dict[str, Any], load: Int[np.ndarray, "L E"], bias: Float[np.ndarray, "L E"]) -> None:
        """Append step `record["step"]`; on return the operating system has it, so that a kill loses nothing."""
        row = np.zeros((), self._dtype)
        row["step"], row["load"], row["bias"] = record["step"], load, bias
        self._routing.write(row.tobytes())
        self._routing.flush()
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        self._metrics.flush()


def _replace(path: Path, content: bytes) -> None:
    """Write beside and rename: a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_text(path: str | Path, text: str) -> None:
    """`text` under `path`, whole or not at all."""
    _replace(Path(path), text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON under `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
