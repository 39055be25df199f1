"""The stored cases of `tests/oracles/data`: a tiny checkpoint and the outputs that belong to it."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oracles.released_folder import multiplied_out
from oracles.safetensors_reader import read_safetensors

DATA = Path(__file__).parent / "data"
CASES = ("base", "yarn", "noqlora", "wide", "fp8", "mtp")


class Case(NamedTuple):
    config: dict[str, Any]  # config.json as it stands
    tensors: dict[str, np.ndarray]  # checkpoint name -> weight, (out, in); FP8 multiplied out
    expected: dict[str, np.ndarray]  # oracle.npz; data/README.md names the arrays


@functools.cache
def load_case(name: str) -> Case:
    """One of CASES. Cached and shared between tests: do not write into it."""
    with np.load(DATA / name / "oracle.npz") as stored:
        expected = {key: stored[key] for key in stored.files}
    files = [read_safetensors(path) for path in sorted((DATA / name).glob("*.safetensors"))]
    return Case(
        config=json.loads((DATA / name / "config.json").read_text()),
        tensors=multiplied_out({name: tensor for file in files for name, tensor in file.items()}),
        expected=expected,
    )
