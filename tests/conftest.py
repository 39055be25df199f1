"""Settings of every test: `oracles` importable, JAX refuses implicit promotion, hypothesis is repeatable."""

import sys
from pathlib import Path

import jax
import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A mesh to test on. What names no layout runs on the first of them, as it does where there is one.
jax.config.update("jax_num_cpu_devices", 8)

# What promotes silently also rounds silently: make code say which dtype and which axes it means.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow, so no deadline; the same examples on every machine, so a failure can be repeated.
settings.register_profile("dsv3_jax", deadline=None, derandomize=True)
settings.load_profile("dsv3_jax")


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run a few times each: compiling them thoroughly would cost more than it saves."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
