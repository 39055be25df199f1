"""Programs with known costs, and a command that compiles them for 8 devices and writes their optimised HLO.

`data` has the texts for TPUs and for H100s, from JAX 0.10.2. With `pip install -e '.[aot]'`, these commands write them anew:

    python tests/planner/hlo_programs.py tpu:v5p:2x2x2 tests/planner/data
    python tests/planner/hlo_programs.py tpu:v5e:2x4 tests/planner/data
    python tests/planner/hlo_programs.py gpu:h100:1x8 tests/planner/data
"""

import gzip
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.planner.targets import topology

DATA = Path(__file__).parent / "data"
MESH = {"data": 2, "expert": 4}
BOTH = ("data", "expert")
BF16, F32 = jnp.bfloat16, jnp.float32


def _programs(mesh: Mesh, chip: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Functions with the shapes of their arguments and compiler options. All sizes in the comments are a device's."""

    def array(shape: tuple[int, ...], *spec: Any, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def mapped(f: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
        return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=True)

    def summed(x: jax.Array, w: jax.Array) -> jax.Array:  # five times [32, 256] @ [256, 256]
        def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return lax.pcast(lax.psum(x @ w, "expert"), "expert", to="varying"), None

        return lax.scan(step, x, w)[0]

    def exchanged(
        x: jax.Array,
    ) -> jax.Array:  # [1024, 4096] -> [4096, 1024] -> [4096, 512] -> [4096, 2048], sent to a neighbour
        x = lax.all_to_all(x, "expert", 1, 0, tiled=True)
        x = lax.psum_scatter(jnp.sin(x), "data", scatter_dimension=1, tiled=True)
        x = lax.all_gather(jnp.cos(x), "expert", axis=1, tiled=True)
        return lax.ppermute(jnp.sin(x), "data", [(0, 1), (1, 0)])

    def nested(x: jax.Array, w: jax.Array) -> jax.Array:  # 3 x 7 times [32, 128] @ [128, 128]
        def inner(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w), None

        return lax.scan(lambda x, w: (lax.scan(inner, x, w)[0], None), x, w)[0]

    def searching(x: jax.Array, w: jax.Array) -> jax.Array:  # [32, 128] @ [128, 128] thrice, until the sum over "data" is large
        def step(x: jax.Array) -> jax.Array:
            return lax.scan(lambda x, w: (x @ w, None), x, w)[0]

        return lax.while_loop(lambda x: jnp.sum(x.astype(F32)) < 100, step, x)

    def branching(x: jax.Array, w: jax.Array) -> jax.Array:  # two products or one
        return lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    def batched(a: jax.Array, b: jax.Array) -> jax.Array:  # [4, 4] x [256, 192] @ [192, 256]
        return jnp.einsum("bhqd,bhkd->bhqk", a, b)

    def experts(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:  # [512, 256] @ [8, 256, 128]
        return lax.ragged_dot(x, w, sizes)

    def experts_gradients(x: jax.Array, w: jax.Array, sizes: jax.Array) -> Any:
        return jax.grad(lambda x, w: jnp.sum(experts(x, w, sizes).astype(F32)), argnums=(0, 1))(x, w)

    def ragged(x: jax.Array, out: jax.Array, *tables: jax.Array) -> jax.Array:  # [64, 256] into [128, 256], three times
        starts, sizes, outputs, received = (table[0] for table in tables)

        def step(_: int, x: jax.Array) -> jax.Array:
            return lax.ragged_all_to_all(x, out, starts, sizes, outputs, received, axis_name="expert")[:64]

        return lax.fori_loop(0, 3, step, x)

    def ragged_search(x: jax.Array, out: jax.Array, *tables: jax.Array) -> jax.Array:
        starts, sizes, outputs, received = (table[0] for table in tables)

        def unsettled(x: jax.Array) -> jax.Array:
            return lax.pmax(jnp.max(x.astype(F32)), BOTH) > 1

        def step(x: jax.Array) -> jax.Array:
            return lax.ragged_all_to_all(x, out, starts, sizes, outputs, received, axis_name="expert")[:64] * jnp.asarray(
                0.5, BF16
            )

        return lax.while_loop(unsettled, step, x)

    def gathering(x: jax.Array, w: jax.Array) -> jax.Array:  # [1, 2048, 2048] @ [2048, 2048], of which each device has 256 rows
        return jnp.einsum("btd,df->btf", x, w)

    def overlapping(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:  # the gather of v runs beside the first product
        def local(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.tanh(x @ w) @ lax.all_gather(v, "data", axis=0, tiled=True)

        return mapped(local, (P(BOTH), P(), P("data")), P(BOTH))(x, w, v)

    x = array((64, 1024), "data", "expert")
    w_nested, x_nested = array((3, 7, 128, 128)), array((64, 128), "data")
    rows = (array((8 * 64, 256), BOTH), array((8 * 128, 256), BOTH), *(array((8, 4), BOTH, dtype=jnp.int32),) * 4)
    experts_arrays = (array((512, 256)), array((8, 256, 128)), array((8,), dtype=jnp.int32))
    split = P("data", "expert")
    if chip == "v5e":  # the one that has this fusion, by option
        fusion = "xla_tpu_enable_async_collective_fusion"
        flags = (fusion, f"{fusion}_fuse_all_gather", f"{fusion}_multiple_steps", "xla_enable_async_all_gather")
        arrays = array((8 * 1024, 2048), BOTH), array((2048, 2048)), array((2048, 2048), "data")
        return {"overlapping": (overlapping, arrays, dict.fromkeys(flags, True))}
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "summed": (mapped(summed, (split, P(None, "expert")), split), (x, array((5, 1024, 256), None, "expert"))),
        "exchanged": (mapped(exchanged, P(BOTH), P(BOTH)), (array((8192, 4096), BOTH),)),
        "nested": (nested, (x_nested, w_nested)),
        "searching": (searching, (x_nested, array((3, 128, 128)))),
        "branching": (branching, (array((128, 256)), array((256, 256)))),
        "batched": (batched, (array((8, 16, 256, 192), "data", "expert"),) * 2),
        "experts": (experts, experts_arrays),
        "experts_gradients": (experts_gradients, experts_arrays),
        "gathering": (gathering, (array((8, 2048, 2048), BOTH), array((2048, 2048), BOTH))),
    }
    if chip != "cpu":  # which has no ragged exchange
        programs["ragged"] = (mapped(ragged, (P(BOTH),) * 6, P(BOTH)), rows)
        programs["ragged_search"] = (mapped(ragged_search, (P(BOTH),) * 6, P(BOTH)), rows)
    return {name: (*program, {}) for name, program in programs.items()}


# Tables of files and lines, which would change with this file's own lines.
_LOCATIONS = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d+ .*\n)*\n", re.MULTILINE)


def _compile(spec: str, folder: Path) -> None:
    """Writes the text of each program for a target, or for this machine's CPU."""
    target = None if spec == "cpu" else topology(spec)
    chip = spec.split(":")[1] if target else spec
    devices = np.array(target.devices if target else jax.devices())
    if chip != "h100":  # GPUs are taken as they come; elsewhere a text that named chips by their ids would show
        devices = np.roll(devices, 1)
    mesh = Mesh(devices.reshape(tuple(MESH.values())), tuple(MESH))
    for name, (function, arrays, options) in _programs(mesh, chip).items():
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(target.platform if target else "cpu",))
        text = lowered.compile(compiler_options=options).as_text()
        assert text
        text = _LOCATIONS.sub("", text)
        with gzip.GzipFile(folder / f"{chip}_{name}.txt.gz", "wb", mtime=0) as file:  # equal texts, equal files
            file.write(text.encode())


if __name__ == "__main__":
    _compile(sys.argv[1], Path(sys.argv[2]).resolve())
