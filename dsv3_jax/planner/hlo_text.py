"""The text of an optimised HLO module [§3.1], parsed: instructions, their shapes, and the devices that collectives connect."""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

Groups = tuple[tuple[int, ...], ...]


class Instruction(NamedTuple):
    shape: str
    opcode: str
    operands: str
    attributes: str

    @property
    def names(self) -> list[str]:
        """The operands' names."""
        return _NAME.findall(self.operands)

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under these attributes, in their order."""
        found = (re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes) for key in keys)
        return [name for match in found if match for name in _NAME.findall(match[1])]

    def find(self, pattern: re.Pattern[str]) -> str:
        """What the pattern's first group matches in the attributes, or nothing."""
        match = pattern.search(self.attributes)
        return match[1] if match else ""


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    roots: list[str]  # one

    @property
    def root(self) -> str:
        return self.roots[0]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str
    devices: int


_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_BRACKET = re.compile(r"[][(){},]")


def parse(lines: Iterable[str]) -> Module:
    """Raises ValueError where the lines hold no module."""
    computations: dict[str, Computation] = {}
    current, entry, devices = Computation({}, []), "", 1
    for line in lines:
        if line[:1].isspace():
            if match := _LINE.match(line):
                is_root, name, shape, opcode, rest = match.groups()
                # A parenthesis within a layout is never followed by a comma and a space: here the operands end.
                operands, _, attributes = rest.partition("), ")
                current.instructions[name] = Instruction(shape, opcode, operands.removesuffix(")"), attributes)
                if is_root:
                    current.roots.append(name)
        elif match := _HEAD.match(line):
            current = computations[match[2]] = Computation({}, [])
            entry = match[2] if match[1] else entry
        elif line.startswith("HloModule"):
            devices = math.prod(int(count) for count in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", line))
    if not entry:
        raise ValueError("HLO: expected the text of a module, got text without an ENTRY computation: pass compiled.as_text()")
    return Module(computations, entry, devices)


def dtype_of(shape: str) -> str:
    return _SHAPE.search(shape)[1]  # type: ignore[index]


def dims_of(shape: str) -> tuple[int, ...]:
    """Of an array, or of a tuple's first array."""
    return _sizes(_SHAPE.search(shape)[2])  # type: ignore[index]


def bytes_of(shape: str) -> int:
    """Of an array, or of all arrays in a tuple."""
    total = 0
    for dtype, sizes in _SHAPE.findall(shape):
        digits = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s4 and c64 begin with their bits
        bits = int(digits[0]) if digits else 8 * (dtype == "pred")
        total += -(-bits * math.prod(_sizes(sizes)) // 8)
    return total


def elements_of(shape: str) -> list[str]:
    """The shapes within a tuple, nested ones whole."""
    parts, depth, start = [], 0, 1
    for bracket in _BRACKET.finditer(shape):
        depth += (bracket[0] in "([{") - (bracket[0] in ")]}")
        if depth == 0 or (depth == 1 and bracket[0] == ","):
            parts.append(shape[start : bracket.start()])
            start = bracket.end()
    return parts


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size.removeprefix("<=")) for size in text.split(",") if size)


# Devices. XLA writes a list of lists, an iota that is reshaped and transposed, or the axes of a mesh of its own.

_GROUPS = re.compile(r"\b(?:replica_groups|source_target_pairs)=(.*?)(?:, (?!device_ids)[a-z_]+=|$)")
_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*?)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """A collective's replica groups, or its (source, target) pairs."""
    return _groups(instruction.find(_GROUPS), devices)


@functools.lru_cache(maxsize=1024)
def _groups(text: str, devices: int) -> Groups:
    if match := _MESH.search(text):
        return _tuples(_mesh_groups(*match.groups()))
    if "<=" in text:
        shape, _, iota = text.partition("<=")
        return _tuples(_iota(iota).reshape(_sizes(shape.strip("[]"))))
    listed = tuple(_sizes(group) for group in re.findall(r"\{([\d,]+)\}", text))
    return listed or (tuple(range(devices)),)


def _tuples(groups: np.ndarray) -> Groups:
    return tuple(map(tuple, groups.tolist()))


def _iota(text: str) -> np.ndarray:
    match = _IOTA.match(text)
    assert match, text
    shape = _sizes(match[1])
    return np.arange(math.prod(shape)).reshape(shape).transpose(_sizes(match[2]) if match[2] else None).reshape(-1)


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> np.ndarray:
    """Groups along axes, or along parts of them: 'a':(2)4 are 4 places along 'a', each of 2 blocks apart from the other."""
    sizes = {name.strip("'"): int(size) for name, size in (axis.split("=") for axis in mesh.split(","))}
    ids = _iota(device_ids) if device_ids and device_ids[0] == "[" else np.array(_sizes(device_ids or ""))
    coordinates = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
    digits = []
    for name, blocks, places in _AXIS.findall(axes):
        size = int(places or sizes[name])
        stride = sizes[name] // (int(blocks or 1) * size)
        digits.append(coordinates[name] // stride % size)
        coordinates[name] = coordinates[name] - digits[-1] * stride  # what remains tells the groups apart
    order = np.lexsort([*reversed(digits), *reversed(coordinates.values())])  # the last key sorts first
    members = math.prod(int(digit.max()) + 1 for digit in digits)
    return (ids[order] if len(ids) else order).reshape(-1, members)
