"""How good are the kernels' TPU programs, judged by what the compiler made of them, beside those that ship with JAX?

  python -m experiments.bench_kernels [--chips=v5e,v5p,v6e,tpu7x] [--kernels=grouped_up,...]

Nothing runs: libtpu (`pip install 'dsv3_jax[aot]'`) compiles each kernel at DeepSeek-V3's shapes for chips that are not here,
and writes down its bundles, of which one is issued a cycle. JSON lines, a kernel and a chip each: of the loop that keeps the
matrix units busiest its `bundles`, the share of the units' slots in use and the registers that are spilled in it; of grouped
products also the grid's `bytes` and `flops` over the least possible, and `cycles_per_gflop`: all bundles that are issued, over
useful FLOPs. `ratio` lines give the best peer's cycles per useful FLOP over ours: above 1 ours needs fewer. What waits for
memory is not in these figures. Two minutes a chip.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

from dsv3_jax.planner import bundles
from experiments import _bench

CHIPS = {"v5e": "tpu:v5e:2x2", "v5p": "tpu:v5p:2x2x1", "v6e": "tpu:v6e:2x2", "tpu7x": "tpu:tpu7x:2x2x1"}

_CHIPS = flags.DEFINE_list("chips", list(CHIPS), "To compile for.")
_KERNELS = flags.DEFINE_list("kernels", [], "Some of the kernels; none: all.")
_PEERS = flags.DEFINE_bool("peers", True, "The kernels that ship with JAX, too.")
_TIMEOUT = flags.DEFINE_float("timeout", 1800, "Seconds that one chip may take.", lower_bound=0)
_CHILD = flags.DEFINE_bool("child", False, "Compile in this process, for one chip.")


def measured(program: bundles.Program, case: Any) -> dict[str, Any]:
    """The line of a compiled case."""
    loop, cost = program.grid.innermost(), case.cost
    line = {
        "peer": case.program if case.peer else None,
        "blocks": list(case.blocks),
        "bundles": loop.bundles,
        "mxu_slots": round(program.share(loop, "MXU"), 3),
        "spills": loop.spills,
    }
    if cost is None:
        return line
    cycles = program.cycles(cost.steps, cost.trips if program.grid.inner else ())
    return line | {
        "bytes_over_least": None if case.peer else round(cost.bytes / cost.least_bytes, 3),
        "flops_over_least": round(cost.flops / cost.least_flops, 3),
        "cycles_per_gflop": round(1e9 * cycles / cost.least_flops, 1),
    }


def _child(chip: str, folder: Path) -> None:
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {bundles.dump_flags(folder)}"
    import jax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from dsv3_jax.planner.targets import topology
    from experiments._bench_kernels import cases

    target = topology(CHIPS[chip])
    mesh = Mesh([target.devices[0]], ("x",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, PartitionSpec())
    for case in cases(target.kind):
        if (_KERNELS.value and case.kernel not in _KERNELS.value) or (case.peer and not _PEERS.value):
            continue
        operands = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in case.operands]
        line: dict[str, Any] = {"kernel": case.kernel, "chip": chip, "shape": case.shape}
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                lowered = jax.jit(case.run).trace(*operands).lower(lowering_platforms=("tpu",))
                lowered.compile(compiler_options={"xla_tpu_scoped_vmem_limit_kib": "63488"})
            line |= measured(bundles.read(folder, case.program), case)
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            line |= {"peer": case.program if case.peer else None, "blocks": list(case.blocks)}
            line["failed"] = " ".join(str(error).split())[:200]
        _bench.show(line)


def ratios(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel that has peers: the best one's cycles over ours."""
    found = []
    for ours in (line for line in lines if line.get("peer") is None and "cycles_per_gflop" in line):
        same = [line for line in lines if (line["kernel"], line["chip"]) == (ours["kernel"], ours["chip"])]
        peers = [line for line in same if line.get("peer") and "cycles_per_gflop" in line]
        if peers:
            best = min(peers, key=lambda line: line["cycles_per_gflop"])
            ratio = round(best["cycles_per_gflop"] / ours["cycles_per_gflop"], 3)
            found.append({"ratio": ours["kernel"], "chip": ours["chip"], "peer": best["peer"], "peer_blocks": best["blocks"],
                          "peer_over_ours": ratio})  # fmt: skip
    return found


def main(argv: list[str]) -> int:
    unknown = [chip for chip in _CHIPS.value if chip not in CHIPS]
    if unknown or len(argv) > 1:
        print(f"error: --chips: expected some of {', '.join(CHIPS)}, got {(unknown + argv[1:])[0]!r}", file=sys.stderr)
        return 2
    if _CHILD.value:
        with tempfile.TemporaryDirectory(prefix="kernels-", ignore_cleanup_errors=True) as folder:
            _child(_CHIPS.value[0], Path(folder))
        return 0
    chosen = [f"--kernels={','.join(_KERNELS.value)}", f"--peers={str(_PEERS.value).lower()}"]
    for chip in _CHIPS.value:
        command = [sys.executable, "-m", "experiments.bench_kernels", "--child", f"--chips={chip}", *chosen]
        try:
            lines = _bench.run_lines(command, _TIMEOUT.value)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for line in [*lines, *ratios(lines)]:
            _bench.show(line)
    return 0


if __name__ == "__main__":
    app.run(main)
