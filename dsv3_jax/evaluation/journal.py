"""What an evaluation leaves: `TASK.jsonl`, one finished record a line as it comes, and `results.json` with every summary.

A record that is in the file is not computed again. `results.json` says what a file's records were computed with; a folder of
another model, or a task with other settings, is refused, so that no file mixes two.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv3_jax.training.journal import write_json, write_text

RESULTS = "results.json"
TASKS = "tasks"


class Results:
    """`results.json` of a folder. `about` says of which model: JSON-able.

    Raises ValueError, one line, for a folder of another model or a file that is damaged.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self._path = folder / RESULTS
        self._content: dict[str, Any] = {**about, TASKS: {}}
        if not self._path.exists():
            return
        try:
            content = json.loads(self._path.read_text())
            tasks, before = content[TASKS], {name: content.get(name) for name in about}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{self._path}: not what an evaluation wrote; remove it or name another folder in --out") from None
        _check_same(before, about, f"{self._path} is of another evaluation", "name another folder in --out")
        self._content[TASKS] = tasks

    @property
    def tasks(self) -> dict[str, Any]:
        """By name: `settings`, and `summary` of those that are finished."""
        return self._content[TASKS]

    def begin(self, task: str, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the folder holds the task with other settings, or records of it whose settings nobody knows."""
        if task in self.tasks:
            message = f"{self._path} has {task} with other settings"
            _check_same(self.tasks[task]["settings"], settings, message, "name another folder in --out")
        else:
            records = self._path.with_name(f"{task}.jsonl")
            if records.exists():
                raise ValueError(
                    f"{records}: {RESULTS} does not say what it was computed with; remove it or name another --out"
                )
            self.tasks[task] = {"settings": dict(settings), "summary": None}
        write_json(self._path, self._content)

    def finish(self, task: str, summary: Mapping[str, Any]) -> None:
        self.tasks[task]["summary"] = dict(summary)
        write_json(self._path, self._content)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], message: str, remedy: str) -> None:
    old, new = json.loads(json.dumps(before)), json.loads(json.dumps(dict(now)))
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if differing:
        said = "; ".join(f"{name} {old.get(name)!r}, not {new.get(name)!r}" for name in differing[:3])
        raise ValueError(f"{message}: {said}; {remedy}")


class Journal:
    """`TASK.jsonl`: what is finished, and a place to write more. A context manager.

    A torn last line, of a process that was killed, is dropped. Raises ValueError for another line that is no record.
    """

    def __init__(self, folder: Path, task: str):
        path = folder / f"{task}.jsonl"
        self.finished: dict[int, dict[str, Any]] = {}  # by number
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        for number, line in enumerate(whole, 1):
            try:
                record = json.loads(line)
                self.finished[int(record["record"])] = record
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise ValueError(f"{path}, line {number}: not a finished record; remove the line or the file") from None
        if len(whole) < len(lines):
            write_text(path, "".join(whole))
        self._file = path.open("a")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Records with their numbers under `record`; those that are there already are left out. At once: on return the
        operating system has them."""
        new = [dict(r) for r in records if r["record"] not in self.finished]
        self._file.write("".join(json.dumps(r, allow_nan=False) + "\n" for r in new))
        self._file.flush()
        self.finished |= {r["record"]: r for r in new}

    def in_order(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        return [self.finished[number] for number in numbers]
