"""Two training steps of a fixed model on fixed rows give the stored metrics: a change of them is a decision, no accident.

`DSV3_UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py` writes the file anew; say in the commit why it moved.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.moe.balance import controller_of
from dsv3_jax.training.step import train_step
from oracles.checks_step import DOMAINS, HYPER, RELEASED, cut, rows, state_of, step_config
from oracles.compiling import quick_jit
from oracles.random_checkpoint import random_tensors

GOLDEN = Path(__file__).parent / "golden" / "two_steps.json"


def two_steps():
    """Metrics of both steps; the second sees what the first did to weights, moments and bias."""
    config = step_config(RELEASED)
    run = quick_jit(partial(train_step, config=config, controller=controller_of(config), n_domains=DOMAINS))
    state, metrics = state_of(random_tensors(RELEASED, seed=1), config), []
    for seed in (0, 1):
        state, step = run(state, cut(rows(seed=seed), 2), HYPER)
        metrics.append(jax.tree.map(lambda a: np.asarray(a).tolist(), step))
    return {"steps": metrics, "bias": np.asarray(state.bias).tolist()}


def test_two_steps_give_the_stored_metrics():
    actual = two_steps()
    if os.environ.get("DSV3_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(actual, indent=1) + "\n")
    stored = json.loads(GOLDEN.read_text())
    assert len(stored["steps"]) == 2
    for ours, theirs in zip(actual["steps"], stored["steps"], strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            if np.asarray(value).dtype.kind in "ib":  # counts and flags
                assert ours[name] == value, name
            else:
                # Another compiler adds in another order: 1e-6 after one step, and AdamW's first step is a sign, which
                # turns over where a gradient is next to nothing; 2e-4 leaves room for a few of those.
                np.testing.assert_allclose(ours[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(actual["bias"], stored["bias"], rtol=0, atol=1e-7)


@pytest.mark.slow
def test_the_program_as_users_compile_it_gives_them_too():
    """The other tests lower fusions in XLA's older way, which compiles faster; see conftest.py."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__, here / "smoke"]
    env = os.environ | {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=true"}
    done = subprocess.run([*command, "-k", "not experiment"], cwd=here.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
