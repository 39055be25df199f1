"""Settings of every test: `oracles` importable, JAX refuses implicit promotion, hypothesis is repeatable."""

import gc
import os
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# Compilation is most of the tests' time, and lowering fusions through MLIR two thirds of that. Read when the first array is
# made, by child processes too; a later JAX may not know the flag, and XLA ends the process that names one it does not know.
if jax.__version_info__ < (0, 11) and "xla_cpu_use_fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

# Tracing allocates much that lives on; searching all of it for cycles every 700 objects takes a quarter of the tracing.
gc.set_threshold(50_000, 10, 10)

# A mesh to test on. What names no layout runs on the first of them, as it does where there is one.
jax.config.update("jax_num_cpu_devices", 8)

# What promotes silently also rounds silently: make code say which dtype and which axes it means.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow, so no deadline; the same examples on every machine, so a failure can be repeated.
settings.register_profile("dsv3_jax", deadline=None, derandomize=True)
settings.load_profile("dsv3_jax")


# Each compiled program takes dozens of a process's memory maps, of which Linux allows 65,530; without one more, it dies.
MAPS, MANY_MAPS = Path("/proc/self/maps"), 20_000


@pytest.fixture(autouse=True)
def room_for_programs():
    """Before a test, programs of earlier ones are dropped where there are many."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run a few times each: compiling them thoroughly would cost more than it saves."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
