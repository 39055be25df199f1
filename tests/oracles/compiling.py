"""Quick compilation: tests run each program once or twice, so LLVM's optimisation costs more than it saves."""

from collections.abc import Callable
from typing import Any

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` whose code is compiled fast and runs slowly. A fresh wrapper each time: nothing compiled earlier is reused."""

    def fresh(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return jax.jit(fresh, compiler_options=QUICK, **options)
