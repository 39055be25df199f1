"""Quick compilation: tests run each program once or twice, so LLVM's optimisation costs more than it saves."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` whose code is compiled fast and runs slowly. A fresh wrapper each time: nothing compiled earlier is reused."""

    def fresh(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return jax.jit(fresh, compiler_options=QUICK, **options)


def quick_environment(folder: Path) -> dict[str, str]:
    """Of child processes that import what this one does, compile fast, and find in `folder` what another has compiled."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
