"""What one device executes, read from the text of an optimised HLO module [§3.1, §3.2]: collectives, FLOPs, estimated cycles.

XLA's own analysis counts a loop's body once; here everything is multiplied by the trip counts of the loops around it.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.planner.hlo_loops import Scope
from dsv3_jax.planner.hlo_text import Groups, Instruction, bytes_of, dims_of, dtype_of, elements_of, groups_of, parse

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """A collective instruction that runs `times` times; bytes are those of one device and one run.

    `groups` holds positions in the program's device assignment; a permute's are its (source, target) pairs. A ragged exchange
    has the bytes of its buffers, the most that it can move. `dynamic`: a loop around it has a trip count that depends on data,
    and counts once.
    """

    kind: str
    dtype: str
    operand_bytes: int
    result_bytes: int
    groups: Groups
    times: int
    dynamic: bool
    op_name: str


class Product(NamedTuple):
    """A matrix product that runs `times` times: a dot, a convolution, or a custom call, whose `kind` is its target."""

    kind: str
    dtype: str  # of the left operand, or of a custom call's result
    flops: int  # of one run, two a multiply-add
    times: int
    dynamic: bool
    op_name: str


class Cost(NamedTuple):
    """A program on one device. Of a conditional, each field has the branch that costs most."""

    collectives: tuple[Collective, ...]
    products: tuple[Product, ...]
    cycles: dict[str, int]  # estimated for TPUs, but for kernels: by fusion, custom-call, collective and other
    opaque: dict[str, int]  # runs of custom calls whose FLOPs are not stated, by target
    kernels: dict[str, int]  # runs of Pallas kernels, by name

    @property
    def flops(self) -> int:
        return sum(product.flops * product.times for product in self.products)

    @property
    def dynamic(self) -> bool:
        """Whether a loop with an unknown trip count holds a product or collective: totals are then lower bounds."""
        return any(p.dynamic for p in self.products) or any(c.dynamic for c in self.collectives)


def cost_of(text: str | Iterable[str]) -> Cost:
    """The cost of a program from `compiled.as_text()`, or from that text's lines. Raises ValueError if it is no HLO module."""
    module = parse(text.splitlines() if isinstance(text, str) else text)
    tally = _walk(Scope(module, module.computations[module.entry]), _Around(1, False, None))
    return Cost(tuple(tally.collectives), tuple(tally.products), dict(tally.cycles), dict(tally.opaque), dict(tally.kernels))


def axes_of(groups: Groups, mesh_shape: Mapping[str, int], device_ids: Sequence[int] | None = None) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ; none for groups of one.

    HLO names a device by its position in the program's device assignment, also under `use_global_device_ids`, and a jitted
    program's assignment is its mesh's devices in row-major order: the chips' own ids appear nowhere in the text. So the default
    suits `Collective.groups`, whatever the order of the chips in the mesh. For groups of other ids, `device_ids` lists them in
    the mesh's order.
    """
    sizes = tuple(mesh_shape.values())
    ids = range(math.prod(sizes)) if device_ids is None else device_ids
    position = {device: index for index, device in enumerate(ids)}
    unknown = {device for group in groups for device in group} - position.keys()
    if unknown or len(position) != math.prod(sizes):
        raise ValueError(
            f"groups: expected ids of a mesh {dict(mesh_shape)}, got {len(position)} ids and groups with {sorted(unknown)[:8]} "
            "besides: pass the mesh that the program was compiled for"
        )
    varies = np.zeros(len(sizes), bool)
    for group in groups:
        coordinates = np.array(np.unravel_index([position[device] for device in group], sizes))
        varies |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(axis for axis, differs in zip(mesh_shape, varies, strict=True) if differs)


# The walk.


class _Around(NamedTuple):
    """What surrounds an instruction."""

    times: int
    dynamic: bool
    fusion: Instruction | None  # the outermost one


class _Tally(NamedTuple):
    collectives: list[Collective]
    products: list[Product]
    cycles: Counter[str]
    opaque: Counter[str]
    kernels: Counter[str]

    def add(self, other: "_Tally") -> None:
        self.collectives.extend(other.collectives)
        self.products.extend(other.products)
        self.cycles.update(other.cycles)
        self.opaque.update(other.opaque)
        self.kernels.update(other.kernels)


_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_KERNEL = re.compile(r'\bop_name="(?:[^"]*[/(])?(\w+)\)*/pallas_call"')  # transpose(jvp(name))/pallas_call, if differentiated
_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,12})"')  # a longer number stands for an unknown one


def _walk(scope: Scope, around: _Around) -> _Tally:
    tally = _Tally([], [], Counter(), Counter(), Counter())
    for instruction in scope.inside.instructions.values():
        opcode = instruction.opcode.removesuffix("-start")  # and what ends in -done is nothing
        if opcode in COLLECTIVES:
            tally.collectives.extend(_collective(scope, instruction, opcode, around))
        elif opcode == "while":
            _add_loop(tally, scope, instruction, around)
        elif opcode == "conditional":
            _add_branch(tally, scope, instruction, around)
        elif opcode == "fusion" and "AllReduceScatterFusion" in instruction.attributes:  # the name of its emitter
            tally.collectives.append(_reduce_scatter(scope, instruction, around))
        elif opcode in ("fusion", "call", "async"):
            outermost = around.fusion or (instruction if opcode == "fusion" else None)
            tally.add(_walk(scope.called(instruction), around._replace(fusion=outermost)))
        elif flops := _flops(scope, instruction, around.fusion):
            dtype = dtype_of(instruction.shape if opcode == "custom-call" else _operand(scope, instruction, 0))
            kind, op_name = instruction.find(_TARGET) or opcode, instruction.find(_OP_NAME)
            tally.products.append(Product(kind, dtype, flops, around.times, around.dynamic, op_name))
        elif opcode == "custom-call" and instruction.find(_OP_NAME) != "ragged-dot-metadata":  # that one counts group sizes
            tally.opaque[instruction.find(_TARGET)] += around.times
        if opcode == "custom-call" and (kernel := instruction.find(_KERNEL)):
            tally.kernels[kernel] += around.times
        if not around.fusion and (cycles := instruction.find(_CYCLES)):
            kind = "collective" if opcode in COLLECTIVES else opcode if opcode in ("fusion", "custom-call") else "other"
            tally.cycles[kind] += int(cycles) * around.times
    return tally


def _operand(scope: Scope, instruction: Instruction, index: int) -> str:
    return scope.inside.instructions[instruction.names[index]].shape


def _collective(scope: Scope, instruction: Instruction, kind: str, around: _Around) -> Iterator[Collective]:
    if '"async_collective_fusion_config"' in instruction.attributes and not any(
        '"AsyncCollectiveStart"' in other.attributes for other in scope.inside.instructions.values()
    ):
        return  # TPU: fusions that run beside a transfer, and the one that awaits it, repeat the instruction that started it
    operands = [_operand(scope, instruction, index) for index in range(len(instruction.names))]
    if kind == "ragged-all-to-all":
        operands = operands[:1]  # the others are the buffer that it writes into, offsets and sizes
    starts = instruction.opcode.endswith("-start") and kind != "all-reduce"
    result = elements_of(instruction.shape)[1] if starts else instruction.shape  # a start returns (operands, results, ...)
    yield Collective(
        kind, dtype_of(operands[0]), sum(map(bytes_of, operands)), bytes_of(result),
        groups_of(instruction, scope.module.devices), around.times, around.dynamic, instruction.find(_OP_NAME),
    )  # fmt: skip


def _reduce_scatter(scope: Scope, fusion: Instruction, around: _Around) -> Collective:
    """TPU: a reduce-scatter of pieces that do not fill tiles is written as all-reduce and slice, fused, and runs as one."""
    inner = _walk(scope.called(fusion), around).collectives
    operands = sum(bytes_of(_operand(scope, fusion, index)) for index in range(len(fusion.names)))
    return inner[0]._replace(kind="reduce-scatter", operand_bytes=operands, result_bytes=bytes_of(fusion.shape))


def _add_loop(tally: _Tally, scope: Scope, loop: Instruction, around: _Around) -> None:
    trips, body, condition = scope.loop(loop)
    dynamic = around.dynamic or trips is None
    tally.add(_walk(body, around._replace(times=around.times * (1 if trips is None else trips), dynamic=dynamic)))
    tally.add(_walk(condition, around._replace(times=around.times * (1 if trips is None else trips + 1), dynamic=dynamic)))


def _add_branch(tally: _Tally, scope: Scope, conditional: Instruction, around: _Around) -> None:
    names = conditional.called("branch_computations", "true_computation", "false_computation")
    branches = [  # operand 0 is the choice
        _walk(scope.enter(name, [operand]), around) for name, operand in zip(names, conditional.names[1:], strict=True)
    ]
    tally.add(
        _Tally(
            max(
                (b.collectives for b in branches),
                key=lambda found: sum(c.times * (c.operand_bytes + c.result_bytes) for c in found),
            ),
            max((b.products for b in branches), key=lambda found: sum(p.times * p.flops for p in found)),
            max((b.cycles for b in branches), key=Counter.total),
            max((b.opaque for b in branches), key=Counter.total),
            max((b.kernels for b in branches), key=Counter.total),
        )
    )


# FLOPs.

_CONTRACTED = re.compile(r'\blhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
_RAGGED = re.compile(r"\blhs_ragged_dims=\{(\d+)\}")
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_LABELS = re.compile(r"\bdim_labels=(\w+_\w+->\w+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_BATCH_GROUPS = re.compile(r"\bbatch_group_count=(\d+)")
_SKIPS = re.compile(r'"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_(ITERATION_INDICES|GROUP_STARTS)"')


def _flops(scope: Scope, instruction: Instruction, fusion: Instruction | None) -> int:
    if instruction.opcode == "convolution":
        return 2 * _multiply_adds(scope, instruction) // _skipped(scope, instruction, fusion)
    if instruction.opcode == "custom-call" and not instruction.find(_TARGET).startswith("__cublas"):
        return int(instruction.find(_STATED) or 0)
    if instruction.opcode not in ("dot", "ragged-dot", "custom-call"):
        return 0
    contracted = re.findall(r"\d+", instruction.find(_CONTRACTED))
    left, result = dims_of(_operand(scope, instruction, 0)), dims_of(instruction.shape)
    flops = 2 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted)
    # A ragged dot that contracts the ragged axis has one result a group, each from the group's own rows.
    return flops // result[0] if instruction.find(_RAGGED) in contracted else flops


def _multiply_adds(scope: Scope, convolution: Instruction) -> int:
    """A matrix product is a convolution on TPUs: its batch axes are spatial ones, dilated until only equal indices meet."""
    labels = re.split("_|->", convolution.find(_LABELS))
    shapes = _operand(scope, convolution, 0), _operand(scope, convolution, 1), convolution.shape
    left, kernel, result = (dict(zip(names, dims_of(shape), strict=True)) for names, shape in zip(labels, shapes, strict=True))
    window = {key: text.split("x") for key, text in re.findall(r"(\w+)=([\dx_-]+)", convolution.find(_WINDOW))}
    total = left["b"] // int(convolution.find(_BATCH_GROUPS) or 1) * kernel["i"] * kernel["o"]
    for axis in sorted(kernel.keys() - {"i", "o"}):
        steps = [int(window[key][int(axis)]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")]
        pad = int(window["pad"][int(axis)].split("_")[0]) if "pad" in window else 0
        total *= _meetings(kernel[axis], result[axis], left[axis], pad, *steps)
    return total


@functools.lru_cache(maxsize=1024)
def _meetings(kernel: int, result: int, left: int, pad: int, stride: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of a kernel's and a result's places along one axis that meet an element, not padding or the hole of a dilation."""
    origin = stride * np.arange(result) - pad
    places = (origin + rhs_dilate * place for place in range(kernel))
    return sum(int(((p >= 0) & (p <= (left - 1) * lhs_dilate) & (p % lhs_dilate == 0)).sum()) for p in places)


def _skipped(scope: Scope, convolution: Instruction, fusion: Instruction | None) -> int:
    """One in how many multiply-adds runs.

    To contract a ragged axis, XLA multiplies every row for every group with the rows of other groups masked out; TPUs skip the
    blocks that are masked whole. Both operands then repeat the rows they were made from, once a group.
    """
    if fusion is None or not fusion.find(_SKIPS):
        return 1
    return min(_repeats(scope, name) for name in convolution.names)


def _repeats(scope: Scope, name: str) -> int:
    instruction = scope.inside.instructions[name]
    if instruction.opcode == "fusion":
        inner = scope.called(instruction)
        return _repeats(inner, inner.inside.root)
    if instruction.opcode == "broadcast":
        return math.prod(dims_of(instruction.shape)) // math.prod(dims_of(_operand(scope, instruction, 0)))
    source = {"select": 1, "copy": 0, "bitcast": 0, "convert": 0, "transpose": 0}.get(instruction.opcode)
    return 1 if source is None else _repeats(scope, instruction.names[source])
