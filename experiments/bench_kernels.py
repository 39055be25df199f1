"""How good are the kernels' TPU programs, judged by what the compiler made of them, beside those that ship with JAX?

  python -m experiments.bench_kernels [--chips=v5e,v5p,v6e,tpu7x] [--kernels=grouped_up,...] [--notable]

Nothing runs: libtpu (`pip install 'dsv3_jax[aot]'`) compiles each kernel at DeepSeek-V3's shapes for chips that are not here,
and writes down its bundles, of which one is issued a cycle. JSON lines, a kernel and a chip each:

- of the loop that keeps the matrix units busiest its `bundles`, the share of the units' slots in use, beside them the unit with
  the largest share, `other_unit` and `other_slots` (what limits a loop that the matrix units do not), and the registers that
  are spilled in it, as stores and as loads; `vmem_mib`: what the kernel holds in VMEM, as the compiler allocates it;
- of the whole grid `bytes` and `flops` over the least possible, and `cycles`: its bundles, as often as each is issued, shared
  by a device's cores; `cycles_per_gflop`: those of all cores over useful FLOPs, of attention half the square;
- `roofline_cycles`: the least FLOPs, or bytes, at the chip's peak, and their share of ours. A chip's first line says how long a
  cycle is in it: a bundle's, if full matrix units of a plain product run at the chip's peak. Where the compiler schedules more
  than the units can take, bundles wait: a share above 1 is no kernel that beats its chip.

`ratio` lines give each peer's cycles per useful FLOP, of its best blocks, over ours, the best one first: above 1 ours needs
fewer. Peers ship with JAX, or are tokamax's (`pip install 'dsv3_jax[tokamax]'`, Python 3.12). What waits for memory is not in
these figures. A table of them, with the best peers, ends up on stderr. Five minutes a chip, ten with tokamax.

`--chips=h100` (`pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-nvdisasm`): of each kernel its
registers, bytes of spills a thread, shared memory a block, and tensor-core instructions in its code, as the assembler has it.

`--measure`, where there is an accelerator: times of each kernel and of its peers (XLA's own, cuDNN's attention, for FP8
bfloat16's products, where it is installed tokamax's, in the implementation that it chooses) for the same operands, medians of
alternating runs, how far results differ, and the share of the roofline.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from dsv3_jax.planner import bundles
from experiments import _bench

if TYPE_CHECKING:
    from experiments._bench_roofline import Peak

GPU = "h100"
CHIPS = {"v5e": "tpu:v5e:2x2", "v5p": "tpu:v5p:2x2x1", "v6e": "tpu:v6e:2x2", "tpu7x": "tpu:tpu7x:2x2x1"}

_CHIPS = flags.DEFINE_list("chips", list(CHIPS), "To compile for; also h100.")
_KERNELS = flags.DEFINE_list("kernels", [], "Some of the kernels; none: all.")
_PEERS = flags.DEFINE_bool("peers", True, "The kernels that ship with JAX, too.")
_TABLE = flags.DEFINE_bool("table", True, "A table of all lines, on stderr.")
_MEASURE = flags.DEFINE_bool("measure", False, "Time them on the accelerator that is here, and compile for no other.")
_TIMEOUT = flags.DEFINE_float("timeout", 1800, "Seconds that one chip may take.", lower_bound=0)
_CHILD = flags.DEFINE_bool("child", False, "Compile in this process, for one chip.")


def measured(program: bundles.Program, vmem: int, case: Any, peak: "Peak") -> dict[str, Any]:
    """The line of a compiled case."""
    loop, cost = program.grid.innermost(), case.cost
    other = program.busiest(loop, apart="MXU")
    line = {
        "peer": case.peer or None,
        "blocks": list(case.blocks),
        "bundles": loop.bundles,
        "mxu_slots": round(program.share(loop, "MXU"), 3),
        "other_unit": other,
        "other_slots": round(program.share(loop, other), 3),
        "spills": loop.spills,
        "spill_stores": loop.slots["VSTORE:SPILL"],
        "spill_loads": loop.slots["VLOAD:FILL"],
        "vmem_mib": round(vmem / 2**20, 1),
    }
    if cost is None:
        return line
    if case.parts:
        cycles = program.cycles_of_parts(cost.steps, cost.trips, small=case.small, copies=case.copies)
    else:
        cycles = program.cycles(cost.steps, cost.trips if program.grid.inner else (), copies=case.copies)
    least = peak.roofline(cost.least_flops, cost.least_bytes)
    line |= {"cycles": round(cycles / peak.cores), "roofline_cycles": round(least)}
    line["share_of_roofline"] = round(least * peak.cores / cycles, 3)
    if not case.peer:
        line["bytes_over_least"] = round(cost.bytes / cost.least_bytes, 3)
    if cost.least_flops:
        line["flops_over_least"] = round(cost.flops / cost.least_flops, 3)
        line["cycles_per_gflop"] = round(1e9 * cycles / cost.least_flops, 1)
    return line


def _child(chip: str, folder: Path) -> None:
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {bundles.dump_flags(folder)}"
    import jax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from dsv3_jax.planner.targets import topology
    from experiments._bench_kernels import cases
    from experiments._bench_roofline import COLUMNS, NAME, calibration, flops_per_cycle, of_device

    target = topology(CHIPS[chip])
    mesh = Mesh([target.devices[0]], ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())

    def compiled(run: Any, arrays: Any, name: str) -> tuple[bundles.Program, int]:
        """The kernel's program, and bytes in VMEM."""
        operands = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in arrays]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(run).trace(*operands).lower(lowering_platforms=("tpu",))
            found = lowered.compile(compiler_options={"xla_tpu_scoped_vmem_limit_kib": "63488"})
        return bundles.read(folder, name), bundles.vmem_bytes(found.as_text(), name)

    flops = max(flops_per_cycle(compiled(*calibration(columns), NAME)[0], columns) for columns in COLUMNS)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        peak = of_device(flops)
    figures = {"flops_per_cycle": peak.flops, "bytes_per_cycle": peak.bytes, "cores": peak.cores, "ghz": peak.ghz}
    _bench.show({"chip": chip} | {name: round(value, 3) for name, value in figures.items()})
    for case in cases(target.kind):
        if (_KERNELS.value and case.kernel not in _KERNELS.value) or (case.peer and not _PEERS.value):
            continue
        line: dict[str, Any] = {"kernel": case.kernel, "chip": chip, "shape": case.shape}
        try:
            line |= measured(*compiled(case.run, case.operands, case.program), case, peak)
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            line |= {"peer": case.peer or None, "blocks": list(case.blocks)} | _bench.failure(error)
        _bench.show(line)


def _measured_here() -> int:
    import jax

    from experiments import _bench_measure

    implementation = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(jax.default_backend())
    if implementation is None:
        print(f"error: --measure: expected a TPU or a GPU, got {jax.default_backend()} alone", file=sys.stderr)
        return 2
    found = []
    for line in _bench_measure.lines(implementation, _bench_measure.Sizes(), _KERNELS.value):
        _bench.show(line)
        found.append(line)
    if _TABLE.value:
        print(measured_table(found), file=sys.stderr)
    return 0


def _gpu_child(folder: Path) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text=false"
    from experiments import _bench_gpu

    for line in _bench_gpu.lines(GPU, folder, _KERNELS.value):
        _bench.show(line)


def ratios(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel that has peers: the cycles of each, with its best blocks, over ours, the best peer first."""
    found = []
    for ours in (line for line in lines if line.get("peer") is None and "cycles_per_gflop" in line):
        key = ("kernel", "chip", "shape")
        same = [line for line in lines if all(line.get(name) == ours.get(name) for name in key)]
        best: dict[str, dict[str, Any]] = {}
        peers = (line for line in same if line.get("peer") and "cycles_per_gflop" in line)
        for peer in sorted(peers, key=lambda line: line["cycles_per_gflop"]):
            best.setdefault(peer["peer"], peer)
        for name, peer in best.items():
            ratio = round(peer["cycles_per_gflop"] / ours["cycles_per_gflop"], 3)
            line = {"ratio": ours["kernel"], "chip": ours["chip"], "shape": ours.get("shape"), "peer": name}
            found.append(line | {"peer_blocks": peer["blocks"], "peer_over_ours": ratio})
    return found


TABLE = {"chip": 6, "mxu_slots": 6, "spill_stores": 7, "spill_loads": 7, "vmem_mib": 6, "bytes_over_least": 6,
         "flops_over_least": 6, "cycles_per_gflop": 9, "share_of_roofline": 6, "peer_over_ours": 6}  # fmt: skip
HEADS = "chip", "MXU", "spilled", "filled", "MiB", "bytes", "FLOPs", "cyc/GF", "roof", "ratio"


def table(lines: list[dict[str, Any]]) -> str:
    """Our kernels, a row each, with the best peer's cycles over ours; within 110 columns."""
    best: dict[tuple[str, str, str], float] = {}
    for line in (line for line in lines if "ratio" in line):
        best.setdefault((line["ratio"], line["chip"], line["shape"]), line["peer_over_ours"])
    rows = [" ".join(["kernel".ljust(32), *(head.rjust(n) for head, n in zip(HEADS, TABLE.values(), strict=True))])]
    for line in (line for line in lines if "kernel" in line and line.get("peer") is None):
        ratio = best.get((line["kernel"], line["chip"], line["shape"]))
        name = f"{line['kernel']} {line['shape']}"[:32]
        cells = line | {"peer_over_ours": ratio}
        texts = [str("-" if cells.get(field) is None else cells[field]).rjust(n) for field, n in TABLE.items()]
        rows.append(" ".join([name.ljust(32), *texts]) + (" failed" if "failed" in line else ""))
    return "\n".join(rows)


GPU_TABLE = {"entry": 26, "registers": 9, "spill_stores": 7, "spill_loads": 7, "shared_kib": 7, "tensor_instructions": 20}
GPU_HEADS = "entry", "registers", "spilled", "filled", "KiB", "tensor cores"


def gpu_table(lines: list[dict[str, Any]]) -> str:
    """A compiled kernel a row, with bytes that a thread spills, and what a block has in shared memory."""
    rows = [" ".join(["kernel".ljust(32), *(head.rjust(n) for head, n in zip(GPU_HEADS, GPU_TABLE.values(), strict=True))])]
    for line in lines:
        counts = " ".join(f"{n} {name}" for name, n in line.get("tensor_instructions", {}).items())
        cells = line | {"tensor_instructions": counts or "-"}
        texts = [str(cells.get(field, "-")).rjust(n) for field, n in GPU_TABLE.items()]
        failed = " failed" if "failed" in line else ""
        rows.append(" ".join([f"{line['kernel']} {line['shape']}"[:32].ljust(32), *texts]) + failed)
    return "\n".join(rows)


MEASURED = {"us": 9, "tflops": 8, "gbs": 7, "share_of_roofline": 6, "peer_us": 9, "peer_over_ours": 6, "difference": 10}
MEASURED_HEADS = "us", "TFLOP/s", "GB/s", "roof", "peer's", "ratio", "difference"


def measured_table(lines: list[dict[str, Any]]) -> str:
    """A kernel and peer a row: times in microseconds, and the peer's over ours."""
    names = ["kernel".ljust(48), *(head.rjust(n) for head, n in zip(MEASURED_HEADS, MEASURED.values(), strict=True)), "peer"]
    rows = [" ".join(names)]
    for line in lines:
        texts = [str("-" if line.get(field) is None else line[field]).rjust(n) for field, n in MEASURED.items()]
        name = f"{line['kernel']} {line['shape']}"[:48].ljust(48)
        rows.append(" ".join([name, *texts, line.get("peer", "")]) + (f" failed: {line['failed']}" if "failed" in line else ""))
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    known = [*CHIPS, GPU]
    unknown = [chip for chip in _CHIPS.value if chip not in known]
    if unknown or len(argv) > 1:
        print(f"error: --chips: expected some of {', '.join(known)}, got {(unknown + argv[1:])[0]!r}", file=sys.stderr)
        return 2
    if _MEASURE.value:
        return _measured_here()
    if _CHILD.value:
        with tempfile.TemporaryDirectory(prefix="kernels-", ignore_cleanup_errors=True) as folder:
            if _CHIPS.value[0] != GPU:
                _child(_CHIPS.value[0], Path(folder))
                return 0
            try:
                _gpu_child(Path(folder))
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
        return 0
    chosen = [f"--kernels={','.join(_KERNELS.value)}", f"--peers={str(_PEERS.value).lower()}"]
    shown = []
    for chip in _CHIPS.value:
        command = [sys.executable, "-m", "experiments.bench_kernels", "--child", f"--chips={chip}", *chosen]
        try:
            lines = _bench.run_lines(command, _TIMEOUT.value)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for line in [*lines, *ratios(lines)]:
            _bench.show(line)
            shown.append(line)
    if _TABLE.value:
        of_gpu = [line for line in shown if line.get("chip") == GPU]
        if len(of_gpu) < len(shown):
            print(table([line for line in shown if line.get("chip") != GPU]), file=sys.stderr)
        if of_gpu:
            print(gpu_table(of_gpu), file=sys.stderr)
    return 0


if __name__ == "__main__":
    app.run(main)
