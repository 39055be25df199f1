"""metrics.jsonl and routing.bin: whole records, cut back to a step, torn ends tolerated."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.training.journal import METRICS, ROUTING, Journal, finite, read_metrics, read_routing

LAYERS, EXPERTS = 2, 3


def write(folder, steps, start=0):
    with Journal(folder, LAYERS, EXPERTS, start) as journal:
        for step in steps:
            load = np.full((LAYERS, EXPERTS), step, np.int32)
            journal.write({"step": step, "loss": step / 7}, load, load.astype(np.float32) / 3)


def test_records_come_back_as_written(tmp_path):
    write(tmp_path, range(1, 6))
    assert read_metrics(tmp_path) == [{"step": s, "loss": s / 7} for s in range(1, 6)]
    rows = read_routing(tmp_path, LAYERS, EXPERTS)
    np.testing.assert_array_equal(rows["step"], range(1, 6))
    np.testing.assert_array_equal(rows["load"][:, 1, 2], range(1, 6))
    np.testing.assert_array_equal(rows["bias"][3], np.full((LAYERS, EXPERTS), np.float32(4) / np.float32(3)))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.integers(0, 8), kept=st.integers(0, 8), torn=st.integers(0, 60))
def test_a_resumed_journal_equals_one_that_was_never_torn(tmp_path_factory, written, kept, torn):
    folder, clean = tmp_path_factory.mktemp("torn"), tmp_path_factory.mktemp("clean")
    kept = min(kept, written)
    write(folder, range(1, written + 1))
    for name, tail in ((METRICS, b'{"step": 999, "loss": 0.123456789, "max_vio": [1, 2, 3]}'), (ROUTING, bytes(range(60)))):
        with open(folder / name, "ab") as file:
            file.write(tail[:torn])  # what a kill in the middle of a write leaves
    assert len(read_metrics(folder)) == written
    if torn < 56:  # the record's size: a whole one is not torn
        assert len(read_routing(folder, LAYERS, EXPERTS)) == written
    write(folder, range(kept + 1, 10), start=kept)
    write(clean, range(1, 10))
    for name in (METRICS, ROUTING):
        assert (folder / name).read_bytes() == (clean / name).read_bytes()


def test_what_is_not_finite_is_null_and_the_lines_are_strict_json(tmp_path):
    assert [finite(np.float32(x)) for x in (np.nan, np.inf, -np.inf, 0.5)] == [None, None, None, 0.5]
    with pytest.raises(ValueError), Journal(tmp_path, LAYERS, EXPERTS, 0) as journal:
        zeros = np.zeros((LAYERS, EXPERTS), np.int32)
        journal.write({"step": 1, "loss": float("nan")}, zeros, zeros.astype(np.float32))
    assert json.loads(json.dumps(finite(1))) == 1.0
