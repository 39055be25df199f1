"""What the kernels' tests on simulated memory share."""

import faulthandler

import pytest

DEADLOCK_S = 900  # many times what the longest takes; a semaphore that nobody signals is waited for forever


def collected(monkeypatch):
    """The race detectors that the simulator makes from now on: one a kernel, of which it keeps the last alone."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    made, original = [], simulator.RaceDetectionState

    def make(*arguments, **named):
        made.append(original(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(simulator, "RaceDetectionState", make)
    return made


@pytest.fixture
def no_races(monkeypatch):
    """Kernels ran on simulated memory, and in none of them was there a race; a deadlock ends the process."""
    made = collected(monkeypatch)
    faulthandler.dump_traceback_later(DEADLOCK_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert made and not any(detector.races_found for detector in made)
