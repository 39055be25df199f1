"""Signs of life of a job's processes, as small files in a folder that all of them see.

Each process replaces its own file every second, with a counter in it, and watches the others' by its own clock: no two hosts'
clocks are ever compared, and what an earlier job left behind never changes, so it never counts as life. A process that stops
on purpose leaves its reason.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

INTERVAL = 1.0  # seconds between two signs of life

Record = dict[str, Any]


class Gone(NamedTuple):
    """A process that is no longer there. `last` is what it last said of itself, None if nothing was ever seen."""

    process: int
    last: Record | None
    why: str

    def __str__(self) -> str:
        who = f" (host {self.last['host']}, pid {self.last['pid']})" if self.last else ""
        return f"process {self.process}{who} {self.why}"


class Heartbeats:
    """This process' file, and what it makes of the others'. One round is `beat` and `look`; `start` repeats it in a thread."""

    def __init__(self, folder: str | Path, process: int, n_processes: int, timeout: float):
        self.folder, self.process, self.timeout = Path(folder), process, timeout
        self.others = [number for number in range(n_processes) if number != process]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own: Record = {"host": socket.gethostname(), "pid": os.getpid(), "count": 0, "ended": None, "gone": []}
        self._stale = {number: self._read(number) for number in self.others}  # an earlier job's, unless it changes
        self._last: dict[int, Record | None] = dict.fromkeys(self.others)
        self._since: dict[int, float] = {}
        self._looked = 0.0
        self._write = threading.Lock()
        self._quiet = threading.Event()
        self.beat()

    def beat(self) -> None:
        with self._write:
            self._own["count"] += 1
            path, beside = self._path(self.process), self.folder / f"{self.process}.json.tmp"
            try:
                beside.write_text(json.dumps(self._own))
                os.replace(beside, path)
            except OSError:  # a full disk is no death: the file's time is a sign of life as well
                try:
                    os.utime(path)
                except OSError:
                    pass  # if that lasts, the others will say so

    def end(self, reason: str, gone: list[int] | None = None) -> None:
        """The last word of this process, for the others to read."""
        self._own["ended"], self._own["gone"] = reason, gone or []
        self.beat()

    def look(self, now: float) -> list[Gone]:
        """Who has gone, by a clock of this process that reads `now`; the first look starts it."""
        asleep = max(0.0, now - self._looked - 2 * INTERVAL) if self._looked else 0.0
        self._looked = now
        gone: dict[int, Gone] = {}
        for number in self.others:
            record = self._read(number)
            if record is not None and record != self._stale[number]:
                if record != self._last[number]:
                    self._last[number], self._since[number] = record, now
            # while this process itself was suspended, it could not see anybody
            self._since[number] = min(now, self._since.get(number, now) + asleep)
            silent = now - self._since[number]
            last = self._last[number]
            if last is not None and last["ended"] is not None:
                gone |= self._named_by(number, last)
            elif silent > self.timeout:
                gone.setdefault(number, Gone(number, last, self._silence(last)))
        return [gone[number] for number in sorted(gone)]

    def _named_by(self, number: int, last: Record) -> dict[int, Gone]:
        """Whoever a stopped process names as the cause; else itself."""
        named = [cause for cause in last["gone"] if cause in self.others]
        causes = {cause: Gone(cause, self._last[cause], f"has gone, as process {number} saw") for cause in named}
        return causes or {number: Gone(number, last, f"has stopped: {last['ended']}")}

    def _silence(self, last: Record | None) -> str:
        if last is None:
            return (
                f"was never seen in {self.folder} for {self.timeout:g} s: it has gone, or that disk is not one that all share"
            )
        return f"has gone: no sign of life for {self.timeout:g} s"

    def start(self, when_gone: Callable[[list[Gone]], None]) -> None:
        """Beats and looks from now on, in a thread; calls `when_gone` once somebody has."""

        def run() -> None:
            while not self._quiet.wait(INTERVAL):
                self.beat()
                gone = self.look(time.monotonic())
                if gone:
                    self.end("another process has gone", [each.process for each in gone])
                    when_gone(gone)
                    return

        threading.Thread(target=run, name="heartbeats", daemon=True).start()

    def stop(self) -> None:
        """Nobody is watched any more."""
        self._quiet.set()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _read(self, number: int) -> Record | None:
        """With the file's time; None if there is none, or one that cannot be read."""
        path = self._path(number)
        try:
            record = json.loads(path.read_text())
            return {**record, "time": path.stat().st_mtime_ns}
        except (OSError, ValueError):
            return None
