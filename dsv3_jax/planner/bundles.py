"""A compiled TPU kernel's final program, read bundle by bundle: what can be said of its speed without the hardware.

libtpu writes the program's VLIW bundles as text, with the slots that each one uses, if it is asked to before it is loaded:
`dump_flags`. A bundle takes a cycle unless it waits. A kernel is a loop over its grid with further loops inside, and branches
that are jumped over; how often they run is for the kernel's author to say, and `cycles` or `cycles_of_parts` then adds up.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{\s*(\}?)")
_FILE = re.compile(r"\d+-(.+?)(?:\.\d+)?-\d+-final_hlo-static-per-bundle-utilization\.txt")
_WITHIN = re.compile(r"^(?:(?:jvp|transpose|vmap)_)+")  # what a kernel is called with in front of its name, if differentiated
_JUMP = re.compile(r"\bsbr\.rel (?:\(!?%\w+\) )?target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_INSTRUCTION = re.compile(r"\n(?=\s*(?:ROOT )?%\S+ = )")  # some have lines of metadata
_KERNEL = re.compile(r'\s*(?:ROOT )?%(\S+?)(?:\.\d+)* = .*custom_call_target="tpu_custom_call"')
_USED = re.compile(r'"used_scoped_memory_configs":\[(.*?)\]')
_VMEM = re.compile(r'"memory_space":"1",(?:"offset":"\d+",)?"size":"(\d+)"')
_LEAST = 56  # bundles of a branch that is worth counting apart
SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")


class Loop(NamedTuple):
    """A loop, or for depth 0 the whole kernel. `slots` are those in use, of all of its bundles, inner loops included."""

    bundles: int
    slots: Counter[str]
    inner: tuple["Loop", ...]

    @property
    def own(self) -> int:
        """Bundles outside of inner loops."""
        return self.bundles - sum(loop.bundles for loop in self.inner)

    @property
    def spills(self) -> int:
        """Vector registers that are put aside or fetched again."""
        return sum(self.slots[name] for name in SPILLS)

    def innermost(self) -> "Loop":
        """The inner loop that keeps the matrix units busiest, or this one, if it does more by itself."""
        busiest = max(self.inner, key=lambda loop: loop.slots["MXU"], default=self)
        own = self.slots["MXU"] - sum(loop.slots["MXU"] for loop in self.inner)
        return self if busiest is self or own >= busiest.slots["MXU"] else busiest.innermost()


class Part(NamedTuple):
    """A loop of a grid step, or a branch in it that is jumped over, without the parts inside of it."""

    kind: str  # loop | branch
    own: int  # bundles


class Program(NamedTuple):
    name: str
    capacity: dict[str, int]  # slots of a bundle
    body: Loop
    step: int = 0  # bundles that every grid step runs: those of none of its parts
    parts: tuple[Part, ...] = ()  # of a grid step, in order, each before those inside of it

    @property
    def grid(self) -> Loop:
        """One step of the kernel's grid."""
        return max(self.body.inner, key=lambda loop: loop.bundles, default=self.body)

    def share(self, loop: Loop, slot: str) -> float:
        return loop.slots[slot] / (self.capacity[slot] * max(loop.bundles, 1))

    def busiest(self, loop: Loop, *, apart: str) -> str:
        """The unit, `apart` from one, most of whose slots are in use."""
        units = [name for name in self.capacity if name != apart and name not in SPILLS]  # these are loads and stores
        return max(units, key=lambda name: self.share(loop, name))

    def cycles(self, steps: float | int, trips: Sequence[float | int], *, copies: bool = False) -> float:
        """Bundles of a whole run: so many grid steps, with `trips` of each loop inside of one, on average.

        `copies`: some chips have more loops, without vectors' work, which count once a step.
        Raises ValueError if the kernel has another number of loops than `trips`.
        """
        loops = self.grid.inner
        if copies and len(trips) < len(loops):
            loops = tuple(loop for loop in loops if loop.slots["MXU"] or loop.slots["VALU"])
        if len(trips) != len(loops):
            raise ValueError(f"{self.name}: expected trips of {len(loops)} loops, got {len(trips)}")
        inner = sum(n * loop.bundles for n, loop in zip(trips, loops, strict=True))
        rest = self.grid.bundles - sum(loop.bundles for loop in loops)
        return float(self.body.own + steps * (rest + inner))

    def cycles_of_parts(
        self, steps: float | int, trips: Sequence[float | int], *, small: Sequence[int] = (), copies: bool = False
    ) -> float:
        """Bundles of a whole run, where `trips` says of each part how often a grid step runs it, on average.

        `small`: which of them on some chips have too few bundles to be told apart, so that all steps have those. `copies`: some
        chips have loops behind those parts, for copies of a few rows; they count once a step.
        Raises ValueError if the kernel has another number of parts than `trips`.
        """
        if len(self.parts) == len(trips) - len(small):
            trips = [n for i, n in enumerate(trips) if i not in small]
        if copies:
            trips = [*trips, *[1] * (len(self.parts) - len(trips))]
        if len(trips) != len(self.parts):
            kinds = ", ".join(f"{part.kind} of {part.own}" for part in self.parts)
            raise ValueError(f"{self.name}: expected trips of {len(self.parts)} parts ({kinds}), got {len(trips)}")
        parts = sum(n * part.own for n, part in zip(trips, self.parts, strict=True))
        return float(self.body.own + steps * (self.step + parts))


def dump_flags(folder: Path) -> str:
    """Of LIBTPU_INIT_ARGS."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_"


def read(folder: Path, name: str) -> Program:
    """The kernel `name`, the last that was compiled. Raises ValueError if there is none, or its files say something else."""
    paths = sorted(folder.glob("*per-bundle-utilization.txt"))
    found = [path for path in paths if (match := _FILE.match(path.name)) and _WITHIN.sub("", match[1]).rstrip("_") == name]
    if not found:
        raise ValueError(f"{folder}: expected the program of a kernel {name}, found none")
    stem = found[-1].name.split("-00-final_hlo")[0]
    (text,) = (path for path in folder.glob(f"{stem}-*final_bundles.txt") if "schedule" not in path.name)
    return program(name, found[-1].read_text(), text.read_text())


def vmem_bytes(hlo: str, name: str) -> int:
    """What the kernel `name` holds in VMEM, from the text of the optimised module: blocks, scratch, and registers put aside.

    Raises ValueError if it is not there, or the text does not say.
    """
    kernels = filter(None, map(_KERNEL.match, _INSTRUCTION.split(hlo)))
    found = [match.string for match in kernels if _WITHIN.sub("", match[1]).rstrip("_") == name]
    if not found:
        raise ValueError(f"expected a kernel {name} in the program, found none")
    if not (used := _USED.search(found[-1])):
        raise ValueError(f"{name}: expected used_scoped_memory_configs in its backend_config, found none")
    return sum(map(int, _VMEM.findall(used[1])))


def program(name: str, utilisation: str, bundles: str) -> Program:
    """From the two files' text."""
    lines = utilisation.splitlines()
    slots = [column.strip() for column in lines[1].split(",")]
    used = [[int(n) for n in line.split()] for line in lines[3:] if re.fullmatch(r"\s*\d+(?: \d+)+\s*", line)]
    marks: list[tuple[str | None, int]] = []
    jumps: list[tuple[int, str]] = []
    regions: dict[str, int] = {}
    for line in bundles.splitlines():
        if match := _BUNDLE.match(line):
            empty = not match[2] and match[3] == "}"  # whose depth is not printed
            marks.append((match[1], marks[-1][1] if empty and marks else len(match[2])))
        jumps += [(len(marks) - 1, region) for region in _JUMP.findall(line)]
        for region in _REGION.findall(line):
            regions.setdefault(region, len(marks) - 1)
    if len(marks) > len(used):
        raise ValueError(f"{name}: expected the slots of {len(marks)} bundles, got {len(used)}")
    capacity = dict(zip(slots, map(int, lines[2].split()), strict=True))
    counts = [Counter(dict(zip(slots, row, strict=True))) for row in used[: len(marks)]]
    step, parts = _parts([(at, regions[region]) for at, region in jumps if region in regions])
    return Program(name, capacity, _loop(marks, counts, 0, len(marks), 0), step, parts)


def _parts(jumps: Sequence[tuple[int, int]]) -> tuple[int, tuple[Part, ...]]:
    """From where each jump is and where it goes: what a grid step always runs, and its parts.

    Jumps back end loops, of which the longest is the grid's; others leave out a branch. One around nearly nothing but loops or
    other branches is none, nor is the longest, around most of a step: it leaves the step out where the grid fills or drains.
    """
    runs = [("loop", to, at + 1) for at, to in jumps if to <= at]
    if not runs:
        return 0, ()
    grid = max(runs, key=lambda run: run[2] - run[1])
    _, first, last = grid
    branches = sorted((("branch", at + 1, to) for at, to in jumps if first <= at < to <= last), key=lambda run: run[1] - run[2])
    whole = [run for run in branches[:1] if 2 * (run[2] - run[1]) > last - first]
    runs = [run for run in runs if run != grid and first <= run[1] and run[2] <= last]
    inside = sorted([*runs, *branches[len(whole) :]], key=lambda run: (run[1], run[1] - run[2]))

    def own(run: tuple[str, int, int], others: Sequence[tuple[str, int, int]]) -> int:
        left, at = run[2] - run[1], run[1]
        for _, start, end in others:
            if start >= at and end <= run[2]:
                left, at = left - (end - start), end
        return left

    def within(run: tuple[str, int, int]) -> list[tuple[str, int, int]]:
        return [other for other in inside if other != run and run[1] <= other[1] and other[2] <= run[2]]

    for run in reversed(inside):  # from the innermost on
        if run[0] == "branch" and own(run, within(run)) < _LEAST:
            inside.remove(run)
    return own(grid, inside), tuple(Part(run[0], own(run, within(run))) for run in inside)


def _loop(marks: Sequence[tuple[str | None, int]], counts: Sequence[Counter[str]], start: int, end: int, depth: int) -> Loop:
    """Bundles start to end at this depth; deeper runs of them are loops, each of which begins with its label."""
    runs: list[tuple[int, int]] = []
    at = start
    while at < end:
        if marks[at][1] <= depth:
            at += 1
            continue
        stop = at + 1
        while stop < end and marks[stop][1] > depth and marks[stop] != ("LB", depth + 1):
            stop += 1
        if runs and marks[at][0] != "LB":  # the branch back is printed as if outside, what still runs behind it is not
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((at, stop))
        at = stop
    total = sum((counts[i] for i in range(start, end)), start=Counter())
    return Loop(end - start, total, tuple(_loop(marks, counts, *run, depth + 1) for run in runs))
