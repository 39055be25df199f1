"""Machines to compile for without owning one [§3.1]: TPU and GPU topologies, what a program needs of their memory, what fits.

The compilers are libtpu (`pip install 'dsv3_jax[aot]'`) and, for GPUs, JAX's CUDA plugin and ptxas.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30


class Target(NamedTuple):
    spec: str
    platform: str  # as in `lowering_platforms`: tpu or cuda
    kind: str
    devices: tuple[Any, ...]  # jax.Device, to lay out by jax.make_mesh or in a jax.sharding.Mesh
    memory_bytes: int  # of one device, that a program can have
    enforced: bool  # whether the compiler itself refuses what does not fit


class Memory(NamedTuple):
    """Bytes on one device.

    `peak` is XLA's own figure: about arguments and temporaries together on GPUs, less on TPUs, which do not count what
    fragments; on CPUs it has no temporaries.
    """

    arguments: int
    outputs: int
    aliased: int  # outputs that overwrite donated arguments
    temporaries: int
    code: int
    peak: int


# Dimensions of the torus, and GiB a device that libtpu 0.0.42 lets a program have (newer ones: 0.01 less on v6e and tpu7x). Of
# v2, v3, v4 and tpu7x a device is half a chip.
_TPUS = {
    "v2": (2, 7.48),
    "v3": (2, 15.48),
    "v4": (3, 15.25),
    "v5e": (2, 15.75),
    "v5p": (3, 95.74),
    "v6e": (2, 31.25),
    "tpu7x": (3, 94.75),
}

# What the GPU compiler must know of a device that is not there: NVIDIA's numbers for an H100 SXM.
_H100_BYTES = 84_942_979_072
_GPUS = {
    "h100": (
        _H100_BYTES,
        f"""
        gpu_device_info {{
          name: "NVIDIA H100 80GB HBM3" core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
          device_memory_size: {_H100_BYTES} memory_bandwidth: 3352320000000 l2_cache_size: 52428800
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
          device_interconnect_info {{ active_links: 18 }}
          driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "NVIDIA H100 80GB HBM3"
        """,
    )
}

_COMPILERS = {
    "tpu": ("libtpu", ("libtpu",), "'dsv3_jax[aot]'"),
    "gpu": ("JAX's CUDA plugin", ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "jax-cuda13-plugin jax-cuda13-pjrt"),
}
_SPEC = re.compile(r"(tpu|gpu):(\w+):(\d+(?:x\d+)+)")


def topology(spec: str) -> Target:
    """The devices of `tpu:v5p:8x8x16` (chips along each axis) or `gpu:h100:64x8` (hosts x GPUs), none of which need exist.

    For processes that only compile: unless JAX's platforms are set, by `JAX_PLATFORMS` or otherwise, they become the CPU, so
    that planning takes no accelerator from others, and libtpu is told not to look for TPUs nor to lock other processes out.
    Environment variables that are set stay as they are, and a backend that runs already stays what it is.

    Raises ValueError for a spec that names no machine, and where the compiler is not installed.
    """
    platform, chip, sizes = _read(spec)
    compiler, modules, packages = _COMPILERS[platform]
    if not any(map(_installed, modules)):
        raise ValueError(f"target {spec}: expected {compiler}, which is not installed: pip install {packages}")
    _stay_on_cpu()
    options: dict[str, Any] = {}
    if platform == "gpu":
        backend, name = "cuda", chip
        memory, options["target_config"] = _GPUS[chip]
        options["topology"] = "x".join(map(str, (1, *sizes)))  # slices x hosts x GPUs
    else:
        backend, name = "tpu", spec.removeprefix("tpu:")
        memory = int(_TPUS[chip][1] * GIB)
        if math.prod(sizes) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found: Any = topologies.get_topology_desc(name, backend, **options)
    except NotImplementedError as error:  # JAX found the CUDA plugin when it looked for GPUs, and gave it up
        raise ValueError(
            f"target {spec}: expected JAX not to run yet, got a process in which it has looked for GPUs: ask for the target "
            "before anything runs, or set JAX_PLATFORMS=cpu"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"target {spec}: {explain_compile_error(error)}") from error
    return Target(spec, backend, found.devices[0].device_kind, tuple(found.devices), memory, enforced=backend == "tpu")


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """What a compiled program needs of each device."""
    stats = compiled.memory_analysis()
    assert stats is not None
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
        stats.peak_memory_in_bytes,
    )


def require_fits(memory: Memory, target: Target) -> None:
    """Raises ValueError where a program's peak exceeds a device. XLA compiles for GPUs whatever the size."""
    if memory.peak > target.memory_bytes:
        raise ValueError(_too_large(f"{memory.peak / GIB:.2f} GiB", f"{target.memory_bytes / GIB:.2f} GiB ({target.spec})"))


_SIZE = r"([\d.]+)([KMGT])"
_HBM = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|\({_SIZE}\) exceeds available HBM \({_SIZE}\)")


def explain_compile_error(error: BaseException) -> str:
    """One line: of XLA's refusal of a program that is too large for a TPU, the sizes; of anything else, the message's first."""
    text = str(error)
    if match := _HBM.search(text):
        needed, needed_unit, available, available_unit = filter(None, match.groups())
        return _too_large(f"{needed} {needed_unit}iB", f"{available} {available_unit}iB")
    if "No PTX compilation provider" in text:
        return "GPU programs: expected ptxas, found none: install the CUDA toolkit, or pip install nvidia-cuda-nvcc"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _too_large(needed: str, available: str) -> str:
    return f"memory: expected at most {available} a device, got {needed}: use more devices, fewer tokens or more recomputation"


def _read(spec: str) -> tuple[str, str, tuple[int, ...]]:
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ValueError(
            f"target: expected tpu:CHIP:AxB[xC] or gpu:CHIP:HOSTSxGPUS, as in tpu:v5p:8x8x16 or gpu:h100:64x8, got {spec!r}"
        )
    platform, chip, text = match.groups()
    sizes = tuple(map(int, text.split("x")))
    known = _TPUS if platform == "tpu" else _GPUS
    if chip not in known:
        raise ValueError(f"target {spec}: expected a {platform.upper()} among {', '.join(known)}, got {chip!r}")
    dims = _TPUS[chip][0] if platform == "tpu" else 2
    if len(sizes) != dims or 0 in sizes:
        raise ValueError(f"target {spec}: expected {dims} positive sizes for {chip}, got {text}")
    if platform == "tpu" and math.prod(sizes) > 1 and (sizes[0] % 2 or sizes[1] % 2):
        raise ValueError(f"target {spec}: expected one chip or even first sizes, as a host has 2x2 chips, got {text}")
    return platform, chip, sizes


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package around it
        return False


def _stay_on_cpu() -> None:
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not platforms:
        jax.config.update("jax_platforms", "cpu")
    if platforms in (None, "", "cpu"):
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else libtpu serves one process of a machine at a time
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the rest only keeps it from complaining
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
