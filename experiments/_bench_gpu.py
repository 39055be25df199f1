"""The GPU kernels that `bench_kernels` compiles for an H100 that is not there, and what the assembler says of each."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.kernels.decode.api import decode_attention, paged_decode_attention
from dsv3_jax.kernels.decode.work import splits_for
from dsv3_jax.kernels.grouped.api import grouped_product, grouped_swiglu
from dsv3_jax.kernels.router.api import choose
from dsv3_jax.planner import cubin
from dsv3_jax.planner.targets import topology
from dsv3_jax.presets import preset
from experiments import _bench, _bench_attention
from experiments._bench_kernels import EXPERTS, HIDDEN, ROWS, WIDTH, quantisers, scaled
from experiments._bench_roofline import names_of

GPU = "pallas_gpu"
TOOLS = "nvidia-cuda-nvcc nvidia-cuda-nvdisasm"


def cases() -> list[tuple[str, str, Callable[..., Any], tuple[Any, ...]]]:
    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def product(x: Any, w: Any, count: Any) -> Any:
        return grouped_product(x, w, count, implementation=GPU)

    def product_backward(x: Any, w: Any, count: Any, dy: Any) -> Any:
        return jax.vjp(lambda x, w: product(x, w, count), x, w)[1](dy)

    def swiglu(*operands: Any) -> Any:
        return grouped_swiglu(*operands, implementation=GPU)

    def swiglu_backward(*operands: Any) -> Any:
        *arrays, count = operands
        return jax.vjp(lambda *arrays: swiglu(*arrays, count), *arrays)[1](operands[0])

    def decode(paged: bool, *operands: Any) -> Any:
        run = paged_decode_attention if paged else decode_attention
        splits = splits_for(GPU, 32, 128, 4096)  # as the model has it
        return run(*operands, latent=512, scale=0.1, splits=splits, implementation=GPU)

    def router(logits: Any, bias: Any) -> Any:
        return choose(logits, bias, preset("deepseek_v3_671b").model, implementation=GPU)

    count, x, w = array(EXPERTS, dtype=jnp.int32), array(ROWS, HIDDEN), array(EXPERTS, HIDDEN, WIDTH)
    down, gates = array(EXPERTS, WIDTH, HIDDEN), array(ROWS, dtype=jnp.float32)
    found: list[Any] = [
        ("grouped_up", f"{ROWS}x{HIDDEN}x{WIDTH}", product, (x, w, count)),
        ("grouped_up_backward", f"{ROWS}x{HIDDEN}x{WIDTH}", product_backward, (x, w, count, array(ROWS, WIDTH))),
        ("grouped_swiglu", f"{ROWS}x{HIDDEN}x2x{WIDTH}", swiglu, (x, gates, w, w, down, count)),
        ("grouped_swiglu_backward", f"{ROWS}x{HIDDEN}x2x{WIDTH}", swiglu_backward, (x, gates, w, w, down, count)),
    ]
    for length in (4096, 32768):
        operands, shape = _bench_attention.arrays(length), f"128x{length}x(128+64,128)"
        found.append(("attention", shape, partial(_bench_attention.ours, GPU), operands))
        found.append(("attention_backward", shape, partial(_bench_attention.ours_backward, GPU), operands))
    for length in (4096, 32768):
        q, lengths, table = array(32, 1, 128, 576), array(32, dtype=jnp.int32), array(32, length // 64, dtype=jnp.int32)
        pages = array(32 * length // 64, 64, 576)
        found.append(("decode", f"32x128x{length}", partial(decode, False), (q, array(32, length, 576), lengths)))
        found.append(("decode_paged", f"32x128x{length}", partial(decode, True), (q, pages, table, lengths)))
    found.append(("router", f"{ROWS}x256", router, (array(ROWS, 256, dtype=jnp.float32), array(256, dtype=jnp.float32))))
    found += [(case.kernel, case.shape, case.run, case.operands) for case in (*quantisers(GPU), *scaled(GPU))]
    return found + [
        (f"{name}_float32", shape, run, tuple(_wide(x) for x in operands))
        for name, shape, run, operands in found
        if name in ("grouped_swiglu_backward", "attention_backward", "decode") and "32768x(" not in shape
    ]


def _wide(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32) if x.dtype == jnp.bfloat16 else x


def tool(name: str) -> str:
    """Where NVIDIA's program is: in PATH, or in a package. Raises ValueError if it is nowhere."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(root).glob(f"*/bin/{name}")):
            if os.access(path, os.X_OK):
                return str(path)
    raise ValueError(f"--chips=h100: expected {name}, found none: pip install {TOOLS}")


def lines(chip: str, folder: Path, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Of each case, one line a Triton kernel in it. XLA must have been told to write its PTX to `folder`."""
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    target = topology(f"gpu:{chip}:1x1")
    mesh = Mesh([target.devices[0]], ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    for name, shape, run, arrays in cases():
        if chosen and name not in chosen:
            continue
        head = {"kernel": name, "chip": chip, "shape": shape}
        before = set(folder.iterdir())
        try:
            operands = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in arrays]
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                traced = jax.jit(run).trace(*operands)
                traced.lower(lowering_platforms=("cuda",)).compile()
            kernels = names_of(traced.jaxpr.jaxpr)
            found = _assembled(set(folder.iterdir()) - before, ptxas, nvdisasm)
            said = [head | line for line in found if line["entry"] in kernels]
            if not said:
                raise ValueError(
                    f"expected XLA to write its PTX of {', '.join(kernels)}, found none: jax 0.10 does, 0.11 does not"
                )
            yield from said
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            yield head | _bench.failure(error)


def _assembled(paths: set[Path], ptxas: str, nvdisasm: str) -> Iterator[dict[str, Any]]:
    launches: dict[str, cubin.Launch] = {}
    for path in paths:
        if path.name.endswith("thunk_sequence.txt"):
            launches |= cubin.launches(path.read_text(errors="replace"))
    for path in sorted(path for path in paths if path.suffix == ".ptx" and path.stat().st_size):
        binary = path.with_suffix(".cubin")
        command = [ptxas, "-v", "-arch=sm_90a", str(path), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode:
            continue  # what XLA writes of a program without kernels of its own is no whole file
        code = subprocess.run([nvdisasm, "-c", str(binary)], capture_output=True, text=True, check=True).stdout
        for entry, used in cubin.resources(said.stderr + said.stdout).items():
            if launch := launches.get(entry):
                by_entry = code.split(f".text.{entry}", 1)[-1].split("\n.section", 1)[0]
                yield {
                    "entry": entry,
                    "registers": used.registers,
                    "spill_stores": used.spill_stores,
                    "spill_loads": used.spill_loads,
                    "shared_kib": round((used.shared + launch.shared) / 1024, 1),
                    "threads": launch.threads,
                    "tensor_instructions": cubin.tensor_instructions(by_entry),
                }
