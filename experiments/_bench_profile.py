"""Where a step's time goes: a profiler trace whose operations are assigned to components by the source file they come from.

The tree shows the paper, so the file that wrote an operation names its component; the compiled program remembers the file and
its callers, also for the backward pass, and no annotation in the model is needed.
"""

import glob
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

# The innermost frame that one of these files (or functions) owns decides. layers.py is missing on purpose: its caller decides.
COMPONENTS = {
    "model/transformer.py:forward": "scan over layers (stacked residuals)",
    "moe/router.py": "router + dispatch",
    "moe/balance.py": "router + dispatch",
    "moe/dispatch.py": "router + dispatch",
    "moe/experts.py": "experts",
    "moe/layer.py": "experts",
    "model/mla.py": "attention",
    "model/rope.py": "attention",
    "model/mtp.py": "MTP",
    "model/transformer.py": "norms, residuals, embedding",
    "training/loss.py": "head + loss",
    "training/objective.py": "head + loss",
    "training/optimizer.py": "optimiser",
    "training/step.py": "rest of the step",
}
# A SwiGLU is whose caller it has.
SWIGLU = {"moe/layer.py": "shared expert", "model/transformer.py": "dense MLP"}
UNNAMED, IDLE = "copies without a source", "between operations"


class Event(NamedTuple):
    """One execution of an operation of the compiled program; times in nanoseconds."""

    thread: str
    start: float
    end: float
    operation: str


def component(frames: Iterable[tuple[str, str]]) -> str | None:
    """Of a stack of (file, function), innermost first; None if no frame belongs to the package."""
    names = COMPONENTS
    for file, function in frames:
        if file.endswith("model/layers.py") and function.split(".")[0] == "swiglu":
            names = COMPONENTS | SWIGLU
        for key, name in names.items():
            suffix, _, owner = key.partition(":")
            if file.endswith(suffix) and owner in ("", function):
                return name
    return None


def operations(hlo: str) -> dict[str, str]:
    """Operation name -> component, from the text of a compiled program.

    An operation without a source of its own belongs where most of the operations it calls belong (a fusion), or else most
    of its operands.
    """
    frames = _stack_frames(hlo)
    own: dict[str, str] = {}
    members: dict[str, list[str]] = defaultdict(list)
    sourceless: dict[str, str] = {}  # operation -> the rest of its line
    computation = ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line):
            name, rest = instruction.groups()
            members[computation].append(name)
            frame = re.search(r"stack_frame_id=(\d+)", rest)
            found = component(frames(int(frame[1]))) if frame else None
            if found:
                own[name] = found
            elif re.search(r" (fusion|copy|dot)\(", rest):
                sourceless[name] = rest
    for name, rest in sourceless.items():
        callee = re.search(r"calls=%?([\w.-]+)", rest)
        operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
        for group in (members[callee[1]] if callee else [], operands):
            votes = Counter(own[member] for member in group if member in own)
            if votes:
                own[name] = votes.most_common(1)[0][0]
                break
    return own


def _stack_frames(hlo: str) -> Callable[[int], list[tuple[str, str]]]:
    """Reader of the tables at the head of the text: frame number -> [(file, function)], innermost first."""
    tables: dict[str, dict[int, str]] = defaultdict(dict)
    title = ""
    for line in hlo.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            title = line
        elif title and (row := re.match(r"(\d+) (.+)", line)):
            tables[title][int(row[1])] = row[2].strip('"')
        elif line.startswith(("%", "ENTRY")):
            break

    def field(row: str, name: str) -> int:
        found = re.search(rf"{name}=(\d+)", row)
        return int(found[1]) if found else 0

    locations, stack_frames = tables["FileLocations"], tables["StackFrames"]
    # Frame 1 has no parent: its field says what stands for none, 0 or (where parents are counted from 1) 1.
    root = field(stack_frames.get(1, ""), "parent_frame_id")

    def stack(number: int) -> list[tuple[str, str]]:
        frames: list[tuple[str, str]] = []
        for _ in stack_frames:  # a stack is no deeper than the table is long
            frame = stack_frames.get(number)
            if frame is None:
                break
            location = locations.get(field(frame, "file_location_id"), "")
            file, function = field(location, "file_name_id"), field(location, "function_name_id")
            frames.append((tables["FileNames"].get(file, ""), tables["FunctionNames"].get(function, "")))
            number = field(frame, "parent_frame_id") - root
        return frames

    return stack


def shares(events: Iterable[Event], names: Mapping[str, str]) -> dict[str, float]:
    """Share of the time from the first to the last event, largest first.

    Of nested operations of one thread the innermost counts; operations that run at once on several threads share the time.
    """
    marks = []
    for index, event in enumerate(events):
        if event.end > event.start:
            marks.append((event.start, 1, -event.end, index, event))
            marks.append((event.end, 0, -event.start, index, event))
    if not marks:
        return {}
    marks.sort(key=lambda mark: mark[:4])
    running: dict[str, list[Event]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    previous = marks[0][0]
    for time, opens, _, _, event in marks:
        active = [stack[-1] for stack in running.values() if stack]
        for top in active:
            spent[names.get(top.operation, UNNAMED)] += (time - previous) / len(active)
        if not active:
            spent[IDLE] += time - previous
        previous = time
        if opens:
            running[event.thread].append(event)
        else:
            running[event.thread].remove(event)
    total = marks[-1][0] - marks[0][0]
    return {name: time / total for name, time in sorted(spent.items(), key=lambda item: -item[1]) if time > 0}


def traced(run: Callable[[], Any]) -> list[Event]:
    """Calls `run` under the profiler; its events."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        files = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        assert len(files) == 1, files
        data = jax.profiler.ProfileData.from_file(files[0])
        return [
            Event(f"{plane.name}/{line.name}", event.start_ns, event.start_ns + event.duration_ns, operation)
            for plane in data.planes
            for line in plane.lines
            for event in line.events
            if (operation := dict(event.stats).get("hlo_op"))
        ]
