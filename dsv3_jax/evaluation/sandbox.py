"""Runs a generated program in a process of its own, with limits on time, memory, files and processes, and without a network.

What it is: protection from a model's mistakes, such as endless loops, floods of memory, output or processes, and stray
deletions. The process is a new session in an empty temporary folder with an empty environment; where the system permits it
has its own user, network and process namespaces, so that there is no network to reach and nothing outlives it. Besides, an
audit hook refuses sockets, new processes, signals, foreign libraries, databases, and changing anything outside of the folder,
before the program's first line runs; what the hook would not hear, such as `os.mkfifo`, is taken away. No function takes a
folder's descriptor (`dir_fd`).

What it is not: a security boundary. The program may read what this user may read, and code that is written to get out of a
Python process gets out. Run models that you do not trust in a virtual machine.
"""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

CHILD = Path(__file__).with_name("sandbox_child.py")
MOST_SAID = 4096  # bytes of a verdict


@dataclass(frozen=True)
class Limits:
    """Of one program. Raises ValueError, one line, for seconds that never end."""

    seconds: float = 5.0  # by the clock; of processor time the same, rounded up
    memory_mb: int = 1024  # of address space
    file_mb: int = 1  # largest file
    open_files: int = 64
    namespaces: bool = True  # where the system permits

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"a program's timeout: expected finite seconds > 0, got {self.seconds}")


class Verdict(NamedTuple):
    """`passed`: the program ran to its end and said so. `result`: `passed`, `timed out`, or `failed: ` and why.

    `isolation`: which namespaces of its own the process had.
    """

    passed: bool
    result: str
    isolation: tuple[str, ...]


def run_program(program: str, limits: Limits = Limits()) -> Verdict:  # noqa: B008  frozen
    """Runs Python source to its end. Leaving early, by `sys.exit(0)` or in any other way, is no pass."""
    # Whoever ends before the last line does not know it; the program gets it on its standard input, before the first.
    word = secrets.token_hex(16)
    order = json.dumps({"program": program, "word": word, **asdict(limits)}).encode()
    reading, writing = os.pipe()
    timed_out = False
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(writing)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=folder, env={}, pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        try:
            process.communicate(order, timeout=limits.seconds + 1.0)  # the child's own start is not the program's time
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_group(process)
    try:
        # What is there: a process that lives on, if one could, would keep the pipe open for ever.
        os.set_blocking(reading, False)
        said = os.read(reading, MOST_SAID)
    except BlockingIOError:
        said = b""
    finally:
        os.close(reading)
    return _verdict(said, word, process.returncode, timed_out)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """All of the session that did not leave it, also what a program that has ended left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _verdict(said: bytes, word: str, status: int, timed_out: bool) -> Verdict:
    start, *rest = said.decode(errors="replace").split("\n")
    isolation = tuple(start.split()) if rest else ()
    try:
        last = json.loads(rest[0]) if rest and rest[0] else None
    except ValueError:
        last = None
    if isinstance(last, dict) and last.get("word") == word:
        result = str(last.get("result"))
        return Verdict(result == "passed", result, isolation)
    if timed_out or status in (-signal.SIGALRM, -signal.SIGXCPU):
        return Verdict(False, "timed out", isolation)
    return Verdict(False, f"failed: the process ended early with status {status}", isolation)
