"""What the kernels' tests on simulated memory share."""

import faulthandler

import pytest

from oracles.simulated import collected

DEADLOCK_S = 900  # many times what the longest takes; a semaphore that nobody signals is waited for forever


@pytest.fixture
def no_races(monkeypatch):
    """Kernels ran on simulated memory, and in none of them was there a race; a deadlock ends the process."""
    made = collected(monkeypatch)
    faulthandler.dump_traceback_later(DEADLOCK_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert made and not any(detector.races_found for detector in made)
