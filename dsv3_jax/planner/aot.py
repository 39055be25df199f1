"""Our own training step compiled ahead of time for machines that are not here [§3.1, §3.2], and what XLA says of it.

Nothing is allocated: shapes and shardings go in, a program for every chip of the target comes out, or the compiler's refusal.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config import Config
from dsv3_jax.parallel.arrays import check_batch
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import EXPERT, make_mesh
from dsv3_jax.planner.hlo import Collective, Cost, axes_of, cost_of
from dsv3_jax.planner.rows import Number, Plan, Row, Section, figure
from dsv3_jax.planner.share import FLOAT32, Share
from dsv3_jax.planner.table import scaled
from dsv3_jax.planner.targets import Memory, Target, explain_compile_error, memory_of, require_fits
from dsv3_jax.planner.timing import step_tokens
from dsv3_jax.planner.work import executed, padding
from dsv3_jax.training.placed import abstract_placed, micro_rows
from dsv3_jax.training.step import Hyper, make_train_step

DOMAINS = 8  # of the data: a handful of sums, whatever their number
EXCHANGES = ("all-to-all", "ragged-all-to-all")
APART = 0.10  # differences between the planner and XLA beyond this are explained


class Compiled(NamedTuple):
    target: Target
    sizes: dict[str, int]  # of the mesh's axes
    memory: Memory
    cost: Cost
    seconds: float  # of compilation


def compile_step(config: Config, target: Target) -> Compiled:
    """The training step of `config` for all of the target's devices.

    Raises ValueError, one line, if mesh or batch do not divide, and if the program does not fit a device's memory.
    """
    placement = Placement(make_mesh(config, target.devices), config.parallel)
    check_batch(placement, micro_rows(config), "micro_batch_size" if config.train.micro_batch_size else "batch_size")
    state = abstract_placed(config, placement)
    shape = (config.train.n_micro_batches, micro_rows(config), config.data.seq_len + 1)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement.sharding(placement.batch_spec))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=placement.sharding(PartitionSpec()))
    batch = dict.fromkeys(("tokens", "segment_ids", "domain_ids"), rows)
    started = time.perf_counter()
    step: Any = make_train_step(config, DOMAINS, placement)
    compiled = compiled_quickly(lambda: step.trace(state, batch, Hyper(scalar, scalar, scalar)), target)
    memory = memory_of(compiled)
    if not target.enforced:
        require_fits(memory, target)
    sizes = dict(placement.sizes)
    return Compiled(target, sizes, memory, cost_of(compiled.as_text()), time.perf_counter() - started)


def compiled_quickly(trace: Callable[[], Any], target: Target) -> Any:
    """What `trace` returns, compiled for the target. Raises ValueError, one line, where the compiler refuses."""
    level = jax.config.jax_optimization_level  # type: ignore[attr-defined]
    jax.config.update("jax_optimization_level", "O1")  # half the time of the default, and the same sharding and memory
    try:
        return trace().lower(lowering_platforms=(target.platform,)).compile()
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and "XLA" not in type(error).__name__ and "\n" not in str(error):
            raise
        raise ValueError(f"{target.spec}: {explain_compile_error(error)}") from error
    finally:
        jax.config.update("jax_optimization_level", level)


def on_the_wire(found: Collective) -> float:
    """Bytes that one device sends in one run, as a ring moves them; of a ragged exchange, its balanced share."""
    members = max((len(group) for group in found.groups), default=1)
    share = (members - 1) / members
    if found.kind == "all-reduce":
        return 2 * found.operand_bytes * share
    if found.kind in ("all-gather", "collective-broadcast"):
        return found.result_bytes * share
    if found.kind == "ragged-all-to-all":
        return min(found.operand_bytes, found.result_bytes) * share
    return found.operand_bytes * (1.0 if found.kind == "collective-permute" else share)


def sent(compiled: Compiled, *, exchange: bool) -> float:
    """Bytes that a device sends in a step: by the experts' exchange, or by everything else."""
    return sum(on_the_wire(c) * c.times for c in compiled.cost.collectives if (c.kind in EXCHANGES) == exchange)


def sections(plan: Plan, compiled: Compiled) -> tuple[Section, ...]:
    """The planner's figures beside XLA's, with a reason where they are more than a tenth apart; kernels; every collective."""
    memory = compiled.memory
    pairs: dict[str, tuple[str, Number, Number, str]] = {
        "arguments": ("state and batch", plan.value("memory", "arguments"), memory.arguments, "B"),
        "temporaries": ("all else at the peak", plan.value("memory", "temporaries"), memory.peak - memory.arguments, "B"),
        "peak": ("peak of a device", plan.value("memory", "peak"), memory.peak, "B"),
        "flops": ("matrix products of a device", plan.value("flops", "device_step"), compiled.cost.flops, "FLOP"),
        "exchange": ("sent: experts' exchange", _planned(plan, exchange=True), sent(compiled, exchange=True), "B"),
        "others": ("sent: weights and gradients", _planned(plan, exchange=False), sent(compiled, exchange=False), "B"),
    }
    rows = [
        Row(key, label, (ours, theirs, theirs / ours - 1 if ours else None), (unit, unit, "%"))
        for key, (label, ours, theirs, unit) in pairs.items()
    ]
    compared = Section("aot", f"Compiled for {compiled.target.spec}", tuple(rows), ("planner", "XLA", "apart"))
    limit = compiled.target.memory_bytes
    facts = [
        figure("devices", "devices", len(compiled.target.devices), "", "input"),
        figure("limit", "memory that a program may have", limit, "B", "input"),
        figure("peak_share", "  peak of it", memory.peak / limit, "%"),
        figure("xla_temporaries", "XLA's temporaries, fragmentation included", memory.temporaries, "B"),
        figure("outputs", "outputs", memory.outputs, "B"),
        figure("aliased", "  of which overwrite the state", memory.aliased, "B"),
        figure("code", "program", memory.code, "B"),
        figure("compile_seconds", "compile time", compiled.seconds, "s"),
        figure("cycles", "cycles of the compiler's estimate, without kernels", sum(compiled.cost.cycles.values())),
    ]
    return compared, Section("compiled", "XLA's figures", tuple(facts)), kernels(compiled), collectives(compiled)


def _planned(plan: Plan, *, exchange: bool) -> Number:
    rows = plan.section("communication").rows
    return sum(float(row.values[0] or 0) for row in rows if row.key.startswith(("dispatch", "combine")) == exchange)


def kernels(compiled: Compiled) -> Section:
    """Of Pallas kernels, runs on a device in a step; those in a loop over rounds count once."""
    runs = compiled.cost.kernels
    rows = tuple(figure(name, name, runs[name], "runs") for name in sorted(runs))
    return Section("kernels", "Kernels of a device in a step", rows)


def collectives(compiled: Compiled) -> Section:
    """By kind, axes and format: the buffer's bytes of one run, runs in a step, and bytes that the device sends by them."""
    runs: Counter[tuple[str, str, int]] = Counter()
    total: Counter[tuple[str, str, int]] = Counter()
    for found in compiled.cost.collectives:
        axes = "x".join(axes_of(found.groups, compiled.sizes)) or "none"
        key = f"{found.kind}.{axes}.{found.dtype}", f"{found.kind} {found.dtype} over {axes}", found.result_bytes
        runs[key] += found.times
        total[key] += int(on_the_wire(found) * found.times)
    rows = tuple(
        Row(f"{name}.{size}", label, (size, runs[name, label, size], total[name, label, size]), ("B", "", "B"))
        for name, label, size in sorted(runs, key=lambda key: -total[key])
    )
    return Section("collectives", "Collectives of a device in a step", rows, ("result", "runs", "sent"))


def shortened(added: tuple[Section, ...], most: int = 16) -> tuple[Section, ...]:
    """For a terminal: the collectives that send most, and the sum of the others; the plan's JSON has them all."""
    *others, found = added
    if len(found.rows) <= most:
        return added
    runs, bytes_ = (sum(int(row.values[i] or 0) for row in found.rows[most:]) for i in (1, 2))
    rest = Row("smaller", f"{len(found.rows) - most} others, smaller", (None, runs, bytes_), ("B", "", "B"))
    return *others, found._replace(rows=(*found.rows[:most], rest))


REASONS = {
    "temporaries": "temporaries: the planner adds up the buffers that it knows by name at the fullest of four moments; XLA "
    "orders the work itself, keeps copies, and repeats work of its own accord where memory is short{masked}.",
    "peak": "peak: as the temporaries, from which it differs by the arguments.",
    "flops": "FLOPs: {multiplied}, with which the planner counts {counted} too; a loop over rounds counts once; where "
    "memory is short XLA repeats products.",
    "exchange": "exchange: XLA moves each round's buffers; the planner counts balanced rows.",
    "others": "weights and gradients: XLA pads pieces that do not fill its tiles, and runs a reduce-scatter as an all-reduce, "
    "twice the bytes, where it takes that to be faster; where memory is short it repeats gathers.",
    "arguments": "state and batch: TPU layouts pad the last two dimensions of a piece to their tiles.",
}


def reasons(share: Share, compiled: Compiled, compared: Section) -> list[str]:
    """Of every figure of `sections`' first section that is more than a tenth apart, why.

    TPUs have a grouped product of rows and experts. Elsewhere XLA writes the rows once for each expert, others' masked out.
    """
    grouped, model = compiled.target.platform == "tpu", share.config.model
    work = executed(share).total + padding(share, every_expert=not grouped)
    rows = share.received_rows * model.n_routed_experts // share.sizes[EXPERT]
    masked = rows * (2 * model.hidden_size + 3 * model.moe_intermediate_size // share.tensor) * FLOAT32
    known = {
        "masked": "" if grouped else f"; rows masked for each expert, of both products' operands, take {_text(masked, 'B')}",
        "multiplied": "XLA's experts multiply every row that a round has room for"
        if grouped
        else "without a grouped product, each of a device's experts multiplies every row that a round has room for",
        "counted": _text(work * step_tokens(share) / share.devices, "FLOP"),
    }
    apart = [row.key for row in compared.rows if isinstance(row.values[2], float) and abs(row.values[2]) > APART]
    return [REASONS[key].format(**known) for key in apart]


def _text(value: Number, unit: str) -> str:
    return " ".join(scaled(value, unit))
