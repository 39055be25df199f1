"""What NVIDIA's tools say of a kernel's machine code, read from their text: registers, spills, shared memory, tensor cores.

`ptxas -v` has the first two and shared memory that is of a fixed size, XLA's list of thunks what a launch asks for besides, and
`nvdisasm -c` the instructions.
"""

import re
from collections import Counter
from typing import NamedTuple

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_FIXED = re.compile(r"(\d+) bytes smem")
_LAUNCH = re.compile(r"kCustomKernel.*\] (\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\] +shared_memory: (\d+) bytes")
_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)")
TENSOR = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA")  # of warp groups, then of warps; half precision, FP8, integers


class Resources(NamedTuple):
    registers: int  # of a thread
    spill_stores: int  # bytes of a thread
    spill_loads: int
    shared: int  # bytes of a block, those of fixed size


class Launch(NamedTuple):
    blocks: int
    threads: int  # of a block
    shared: int  # bytes of a block


def resources(text: str) -> dict[str, Resources]:
    """By entry function, from what `ptxas -v` prints. Raises ValueError where it says less of one."""
    found = {}
    _, *parts = _ENTRY.split(text)
    for name, said in zip(parts[::2], parts[1::2], strict=True):
        spills, used, fixed = _SPILLS.search(said), _USED.search(said), _FIXED.search(said)
        if not spills or not used:
            raise ValueError(f"ptxas: expected registers and spills of {name}, got {said.strip()[:100]!r}")
        found[name] = Resources(int(used[1]), int(spills[1]), int(spills[2]), int(fixed[1]) if fixed else 0)
    return found


def launches(text: str) -> dict[str, Launch]:
    """Of the kernels that a program brings along, from XLA's list of thunks."""
    found = {}
    for name, grid, threads, shared in _LAUNCH.findall(text):
        blocks, each = 1, 1
        for n in grid.split(","):
            blocks *= int(n)
        for n in threads.split(","):
            each *= int(n)
        found[name] = Launch(blocks, each, int(shared))
    return found


def tensor_instructions(text: str) -> dict[str, int]:
    """How many of each there are in what `nvdisasm -c` prints."""
    counts = Counter(_CODE.findall(text))
    return {name: counts[name] for name in TENSOR if counts[name]}
