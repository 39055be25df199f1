"""Who has gone: found by one's own clock, named once, and never mistaken for what an earlier job left behind."""

import json
import shutil
from pathlib import Path

import pytest

from dsv3_jax.parallel.heartbeats import Heartbeats

TIMEOUT = 10.0


@pytest.fixture
def pair(tmp_path):
    return [Heartbeats(tmp_path, i, 2, TIMEOUT) for i in range(2)]


def watched(watcher, times, before=lambda now: None):
    """The first look of those at `times` that finds somebody gone, and what it finds."""
    for now in times:
        before(now)
        gone = watcher.look(float(now))
        if gone:
            return now, [str(each) for each in gone]
    return None


def test_nobody_is_missed_while_all_beat(pair):
    assert watched(pair[0], range(1, 100), lambda now: pair[1].beat()) is None


def test_whoever_falls_silent_is_named_with_host_and_pid_once_the_bound_is_over(pair):
    now, gone = watched(pair[0], range(1, 100), lambda now: pair[1].beat() if now <= 20 else None)
    assert now == 31 and len(gone) == 1
    own = json.loads((pair[0].folder / "1.json").read_text())
    assert gone[0] == f"process 1 (host {own['host']}, pid {own['pid']}) has gone: no sign of life for 10 s"


def test_a_process_that_stops_on_purpose_is_named_at_once_with_its_reason(pair):
    assert watched(pair[0], [1, 2], lambda now: pair[1].beat()) is None
    pair[1].end("error: No space left on device")
    now, gone = watched(pair[0], [3])
    assert gone[0].endswith("has stopped: error: No space left on device")


def test_the_cause_is_named_and_not_who_stopped_because_of_it(tmp_path):
    beats = [Heartbeats(tmp_path, i, 3, TIMEOUT) for i in range(3)]
    assert watched(beats[0], [1, 2], lambda now: [b.beat() for b in beats[1:]]) is None
    beats[2].end("another process has gone", [1])
    beats[1].beat()
    _, gone = watched(beats[0], [3])
    assert len(gone) == 1 and gone[0].startswith("process 1 (host ") and gone[0].endswith("has gone, as process 2 saw")


def test_what_an_earlier_job_left_behind_is_neither_life_nor_its_end(tmp_path):
    for i in range(2):
        Heartbeats(tmp_path, i, 2, TIMEOUT).end("finished")
    new = Heartbeats(tmp_path, 0, 2, TIMEOUT)
    now, gone = watched(new, range(1, 100))
    assert now == 12 and "was never seen" in gone[0]
    # and once the other one is there, the same files are no hindrance
    new, other = Heartbeats(tmp_path, 0, 2, TIMEOUT), Heartbeats(tmp_path, 1, 2, TIMEOUT)
    assert watched(new, range(1, 50), lambda now: other.beat()) is None


def test_a_disk_that_is_not_shared_is_said_to_be_one(tmp_path):
    alone = Heartbeats(tmp_path / "mine", 1, 2, TIMEOUT)
    now, gone = watched(alone, range(1, 100))
    assert now == 12 and gone[0].startswith(f"process 0 was never seen in {tmp_path / 'mine'} for 10 s: it has gone, or")


def test_time_in_which_one_was_suspended_oneself_is_nobodys_silence(pair):
    assert watched(pair[0], range(1, 5), lambda now: pair[1].beat()) is None
    assert watched(pair[0], [500.0, 501.0]) is None
    assert watched(pair[0], range(502, 600)) is not None


def test_a_full_disk_is_no_death(pair, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    assert watched(pair[0], [1, 2], lambda now: pair[1].beat()) is None
    monkeypatch.setattr(Path, "write_text", full)
    assert watched(pair[0], range(3, 50), lambda now: pair[1].beat()) is None


def test_a_folder_that_vanishes_stops_nobody_by_itself(pair):
    shutil.rmtree(pair[0].folder)
    pair[0].beat()
    assert pair[0].look(1.0) == []
