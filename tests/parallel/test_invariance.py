"""The mesh never changes the mathematics: one step, and five, on every mesh against one device, from identical state.

Six cells of the matrix run in `make test`, the others in `make test-slow`. Choices, counts and biases are compared bit for
bit; gradients and losses, sums in another order, to 5e-6 of the norm: some forty float32 roundings.
"""

import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oracles import mesh_cells
from oracles.mesh_cells import LAYOUTS, Cell, Result, cell_config, first_state, skewed

TOLERANCE = 5e-6
MARGIN = 2e-5  # of the searched seed; ten times the largest difference between scores of two cells, asserted below
STEPS = 5

FAST = {("DP 8", 1, "none"), ("EP 8", 4, "report"), ("DP 2 x EP 4", 1, "report"), ("EP 4 x TP 2", 4, "none"),
        ("FSDP 8", 4, "report")}  # and, for the sixth, two processes below  # fmt: skip
MATRIX = [(cell, n_micro, remat) for cell in LAYOUTS for n_micro in (1, 4) for remat in ("none", "report")]


def matrix(also_fast: set[Any] = FAST) -> list[Any]:
    cells = [c for c in MATRIX if c != ("one device", 1, "none")]
    return [pytest.param(*c, id=" ".join(map(str, c)), marks=[] if c in also_fast else [pytest.mark.slow]) for c in cells]


def smallest_margin(result: Result, config: Any) -> float:
    """By how much the closest of all choices, of a group or of an expert, was decided. In float64, from the scores."""
    model, smallest = config.model, np.inf
    biases = np.concatenate([np.zeros_like(result.bias[:1]), result.bias[:-1]])
    for scores, bias in zip(result.scores, biases, strict=True):
        biased = scores.astype(np.float64) + bias[:, None, None, :]
        grouped = np.sort(biased.reshape(*biased.shape[:-1], model.n_group, -1), axis=-1)
        group_scores = grouped[..., -model.group_score_topk :].sum(axis=-1)
        ordered = np.sort(group_scores, axis=-1)
        kept = group_scores >= ordered[..., -model.topk_group, None]
        eligible = np.where(np.repeat(kept, model.n_routed_experts // model.n_group, axis=-1), biased, -np.inf)
        experts = np.sort(eligible, axis=-1)
        for values, k in ((ordered, model.topk_group), (experts, model.num_experts_per_tok)):
            smallest = min(smallest, (values[..., -k] - values[..., -k - 1]).min())
    return float(smallest)


@cache
def reference() -> tuple[int, Result]:
    """The first seed whose every choice in five steps is decided by MARGIN, and what one device computes with it."""
    config = cell_config("one device")
    cell = Cell(config)
    for seed in range(100):
        result = cell.run(start(seed), seeds(seed))
        if smallest_margin(result, config) > MARGIN:
            return seed, result
    raise AssertionError("no seed has the margin")


def start(seed: int) -> Any:
    return first_state(cell_config("one device", seed=seed))


def seeds(seed: int) -> list[int]:
    return [10 * seed + step for step in range(STEPS)]


def relative(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_same(actual: Result, expected: Result) -> None:
    np.testing.assert_array_equal(actual.indices, expected.indices)
    np.testing.assert_array_equal(actual.load, expected.load)
    np.testing.assert_array_equal(actual.bias, expected.bias)
    assert relative(actual.loss[0], expected.loss[0]) <= TOLERANCE
    errors = jax.tree.map(relative, actual.gradients, expected.gradients)
    worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda leaf: leaf[1])
    assert worst[1] <= TOLERANCE, worst
    assert 10 * np.abs(actual.scores - expected.scores).max() < MARGIN


@pytest.mark.parametrize("cell, micro_batches, remat", matrix())
def test_five_steps_are_those_of_one_device(cell, micro_batches, remat):
    seed, expected = reference()
    compiled = Cell(cell_config(cell, micro_batches, remat))
    assert_same(compiled.run(start(seed), seeds(seed)), expected)
    # The smallest possible buffer needs many rounds, a router that sends all to few experts as many again.
    config = cell_config(cell, micro_batches, remat)
    uneven = compiled.run(skewed(start(seed), config), seeds(seed)[:1])
    assert_same(uneven, skewed_reference(seed))
    assert uneven.load[0, 0, 3:6].tolist() == [uneven.load[0, 0].sum() // 4] * 3


@cache
def skewed_reference(seed: int) -> Result:
    config = cell_config("one device")
    return Cell(config).run(skewed(start(seed), config), seeds(seed)[:1])


def run_two_processes(folder: Path, *cell: str) -> dict[str, np.ndarray]:
    """The results that two processes of four devices each agree on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, mesh_cells.__file__, address]
    running = [
        subprocess.Popen([*command, str(i), str(folder), *cell], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(outputs)[-4000:]
    first, second = (dict(np.load(folder / f"{i}.npz")) for i in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first) and int(first.pop("devices")) == 8
    return first


@pytest.mark.parametrize("micro_batches, remat", [
    pytest.param(n, remat, marks=[] if (n, remat) == (1, "none") else [pytest.mark.slow])
    for n in (1, 4) for remat in ("none", "report")
])  # fmt: skip
def test_two_processes_compute_what_one_device_does(micro_batches, remat, tmp_path):
    seed, expected = reference()
    config = cell_config("DP 2 x EP 4", micro_batches, remat, seed=seed)
    names = [str(s) for s in seeds(seed)]
    arrays = run_two_processes(tmp_path, "DP 2 x EP 4", str(micro_batches), remat, str(config.train.seed), *names)
    structure = jax.tree.structure(expected.gradients)
    gradients = jax.tree.unflatten(structure, [arrays.pop(f"gradient{i}") for i in range(structure.num_leaves)])
    assert_same(Result(**arrays, gradients=gradients), expected)
