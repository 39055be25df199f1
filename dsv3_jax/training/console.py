"""What a run shows a person at the terminal and hears from one: a progress bar, and the wish to stop."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

from dsv3_jax.parallel.arrays import any_of
from dsv3_jax.parallel.collectives import Placement


class Bar:
    """Progress bar: loss, tokens per second, time left; and the clock of a step."""

    def __init__(self, n_steps: int, done: int, show: bool):
        self._bar = tqdm(total=n_steps, initial=done, disable=not show, unit="step", dynamic_ncols=True, smoothing=0.1)
        self._last = time.perf_counter()
        self._rate: float | None = None  # tokens per second, smoothed

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def seconds(self) -> float:
        """Wall time since the last call."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last

    def show(self, record: dict[str, Any]) -> None:
        state = {"loss": "skipped" if record["nonfinite"] else f"{record['loss']:.3f}"}
        if record["skipped"]:
            state["skipped"] = f"{record['skipped']} ({'+'.join(record['nonfinite']) or 'none now'})"
        rate = record["targets"] / max(record["seconds"], 1e-6)
        # the first step's time is compilation, so it starts no average
        self._rate = rate if self._rate is None or self._bar.n < 2 else 0.9 * self._rate + 0.1 * rate
        state["tok/s"] = f"{self._rate:,.0f}"
        self._bar.set_postfix(state, refresh=False)
        self._bar.update()


class Interrupt:
    """Ctrl-C, or SIGTERM, asks for an orderly stop after the step; a second one stops at once. Only the main thread can
    listen."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        for each in self._previous:
            signal.signal(each, signal.default_int_handler)


class Stop:
    """Whether to stop, the same answer in every process at the same step: once any of them has been asked.

    Several processes answer one step late, so that none waits for the others before it hands its device the next step.
    """

    def __init__(self, interrupt: Interrupt, placement: Placement | None, several: bool):
        self._interrupt, self._placement = interrupt, placement if several else None
        self._vote: Any = None

    def vote(self) -> None:
        """Before a step."""
        if self._placement is not None:
            self._vote = any_of(self._interrupt.asked, self._placement)

    def agreed(self) -> bool:
        """After it."""
        return self._interrupt.asked if self._placement is None else self._vote is not None and bool(self._vote)
