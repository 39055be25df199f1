import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.planner import targets
from dsv3_jax.planner.targets import GIB, Memory, Target, explain_compile_error, memory_of, require_fits, topology

H100S = Target("gpu:h100:64x8", "cuda", "NVIDIA H100 80GB HBM3", (), 84_942_979_072, enforced=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("v5p:2x2x1", r"expected tpu:CHIP:AxB\[xC\] or gpu:CHIP:HOSTSxGPUS, as in .*, got 'v5p:2x2x1'"),
        ("tpu:v5p", "as in tpu:v5p:8x8x16"),
        ("tpu:v5e:4x4x", "as in tpu:v5p:8x8x16"),
        ("tpu:v5e:4x-4", "as in tpu:v5p:8x8x16"),
        ("gpu:h100:8", "as in tpu:v5p:8x8x16"),
        ("tpu:v7:2x2x1", "expected a TPU among v2, v3, v4, v5e, v5p, v6e, tpu7x, got 'v7'"),
        ("tpu:h100:2x2x1", "expected a TPU among"),
        ("gpu:a100:1x8", "expected a GPU among h100, got 'a100'"),
        ("tpu:v5p:4x4", "expected 3 positive sizes for v5p, got 4x4"),
        ("tpu:v6e:4x4x4", "expected 2 positive sizes for v6e, got 4x4x4"),
        ("tpu:v5p:2x2x0", "expected 3 positive sizes for v5p, got 2x2x0"),
        ("gpu:h100:1x64x8", "expected 2 positive sizes for h100, got 1x64x8"),
        ("tpu:v5e:3x5", "expected one chip or even first sizes, as a host has 2x2 chips, got 3x5"),
        ("tpu:v5p:2x1x4", "expected one chip or even first sizes"),
    ],
)
def test_specs_that_name_no_machine_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        topology(spec)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "compiler"), [("tpu:v5p:8x8x16", "libtpu"), ("tpu:v5e:1x1", "libtpu"), ("gpu:h100:64x8", "JAX's CUDA plugin")]
)
def test_a_missing_compiler_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, spec: str, compiler: str) -> None:
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    with pytest.raises(ValueError, match=rf"expected {compiler}, which is not installed: pip install "):
        topology(spec)


def test_modules_are_looked_up_without_being_imported() -> None:
    assert targets._installed("jax") and not targets._installed("jax_plugins_of_nobody.xla")


@pytest.mark.parametrize(
    ("before", "platforms", "lock"),
    [({}, "cpu", "1"), ({"ALLOW_MULTIPLE_LIBTPU_LOAD": "0"}, "cpu", "0"), ({"JAX_PLATFORMS": "tpu,cpu"}, "tpu,cpu", None)],
)
def test_the_process_stays_on_the_cpu_unless_told_otherwise(before: dict[str, str], platforms: str, lock: str | None) -> None:
    code = (
        "import os, jax; from dsv3_jax.planner.targets import _stay_on_cpu; _stay_on_cpu();"
        "print(jax.config.jax_platforms, os.environ.get('ALLOW_MULTIPLE_LIBTPU_LOAD'))"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "ALLOW_MULTIPLE_LIBTPU_LOAD")}
    done = subprocess.run([sys.executable, "-c", code], env={**env, **before}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [platforms, str(lock)]


def test_memory_is_what_the_compiled_program_holds() -> None:
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    plain = memory_of(jax.jit(lambda x: x + 1).lower(x).compile())
    donated = memory_of(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    size = 1024 * 256 * 4
    assert (plain.arguments, plain.outputs, plain.aliased) == (size, size, 0)
    assert (donated.arguments, donated.outputs, donated.aliased) == (size, size, size)
    product = memory_of(jax.jit(lambda x: jnp.sum(jnp.sort(x @ x.T, axis=0))).lower(x).compile())
    assert product.outputs == 4 and product.temporaries >= 1024 * 1024 * 4 and product.peak >= size


def test_a_peak_beyond_the_device_is_refused_with_both_sizes() -> None:
    fitting = Memory(arguments=0, outputs=0, aliased=0, temporaries=0, code=0, peak=H100S.memory_bytes)
    require_fits(fitting, H100S)
    with pytest.raises(ValueError, match=r"expected at most 79.11 GiB \(gpu:h100:64x8\) a device, got 855.25 GiB: use more"):
        require_fits(fitting._replace(peak=85525 * GIB // 100), H100S)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (128.00G) exceeds "
            "available HBM (15.75G).",
            "memory: expected at most 15.75 GiB a device, got 128.00 GiB: use more devices, fewer tokens or more recomputation",
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory space "
            "hbm. Used 43.51G of 31.24G hbm. Exceeded hbm capacity by 12.27G.\n\nTotal hbm usage >= 43.76G:\n",
            "memory: expected at most 31.24 GiB a device, got 43.51 GiB: use more devices, fewer tokens or more recomputation",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 75.91M of 63.94M vmem.\nMore.",
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 75.91M of 63.94M vmem.",
        ),
        (
            "UNAVAILABLE: No PTX compilation provider is available.",
            "GPU programs: expected ptxas, found none: install the CUDA toolkit, or pip install nvidia-cuda-nvcc",
        ),
        ("\n  INTERNAL: something else\nand its trace", "INTERNAL: something else"),
        ("", "RuntimeError"),
    ],
)
def test_errors_of_the_compiler_become_one_line(message: str, line: str) -> None:
    assert explain_compile_error(RuntimeError(message)) == line


# The rest needs the compilers.


def _compile(target: Target, elements: int) -> jax.stages.Compiled:
    sharding = jax.sharding.SingleDeviceSharding(target.devices[0])
    x = jax.ShapeDtypeStruct((elements,), jnp.float32, sharding=sharding)
    return jax.jit(jnp.sin).trace(x).lower(lowering_platforms=(target.platform,)).compile()


@pytest.mark.parametrize(
    ("spec", "devices", "kind"),
    [
        ("tpu:v5p:8x8x16", 1024, "TPU v5"),
        ("tpu:v6e:16x16", 256, "TPU v6 lite"),
        ("tpu:v5e:1x1", 1, "TPU v5 lite"),
        ("tpu:tpu7x:4x4x4", 128, "TPU7x"),  # two a chip
    ],
)
def test_tpus_are_described(spec: str, devices: int, kind: str) -> None:
    pytest.importorskip("libtpu")
    target = topology(spec)
    assert (target.platform, len(target.devices), target.kind, target.enforced) == ("tpu", devices, kind, True)
    assert len({device.id for device in target.devices}) == devices


@pytest.mark.parametrize("chip", sorted(targets._TPUS))
def test_the_limit_of_a_tpu_is_where_its_compiler_refuses(chip: str) -> None:
    pytest.importorskip("libtpu")
    target = topology(f"tpu:{chip}:2x2" + "x1" * (targets._TPUS[chip][0] - 2))
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        _compile(target, target.memory_bytes // 4)
    # libtpus differ in the last digit
    stated = re.search(r"expected at most ([\d.]+) GiB", explain_compile_error(refusal.value))
    assert stated and float(stated[1]) == pytest.approx(target.memory_bytes / GIB, abs=0.011)


@pytest.mark.skipif(not targets._installed("jax_plugins.xla_cuda13"), reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("", "cuda 32 NVIDIA H100 80GB HBM3 False 84942979072 refused"),
        ("jax.devices()", "target gpu:h100:4x8: expected JAX not to run yet"),
    ],
)
def test_gpus_are_described_and_compile_whatever_the_size(first: str, expected: str) -> None:
    code = f"""
import jax, jax.numpy as jnp
from dsv3_jax.planner.targets import memory_of, require_fits, topology
{first}
try:
    t = topology("gpu:h100:4x8")
    x = jax.ShapeDtypeStruct((t.memory_bytes // 4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(t.devices[0]))
    compiled = jax.jit(jnp.sin).trace(x).lower(lowering_platforms=(t.platform,)).compile()
    print(t.platform, len(t.devices), t.kind, t.enforced, t.memory_bytes, end=" ")
    require_fits(memory_of(compiled), t)
except ValueError as error:
    print("refused" if "expected at most 79.11 GiB" in str(error) else error)
"""
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected)
