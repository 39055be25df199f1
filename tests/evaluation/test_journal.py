"""What is finished stays, and a folder holds one model's results."""

import json

import pytest

from dsv3_jax.evaluation.journal import Journal, Results

ABOUT = {"model": "m", "window": 8}


def test_a_torn_last_line_is_dropped_and_the_rest_is_kept(tmp_path):
    with Journal(tmp_path, "t") as journal:
        journal.write([{"record": 3, "x": 1}, {"record": 0, "x": 2}])
        journal.write([{"record": 3, "x": 9}])  # known
    path = tmp_path / "t.jsonl"
    path.write_text(path.read_text() + '{"record": 4, "x"')
    with Journal(tmp_path, "t") as journal:
        assert journal.finished == {3: {"record": 3, "x": 1}, 0: {"record": 0, "x": 2}}
        journal.write([{"record": 4, "x": 5}])
        assert [each["x"] for each in journal.in_order([0, 3, 4])] == [2, 1, 5]
    assert [json.loads(line)["record"] for line in path.read_text().splitlines()] == [3, 0, 4]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "x", '{"record": null}', '{"record": Infinity}', pytest.param("[" * 10**5, id="deep")]
)
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"record": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2: not a finished record"):
        Journal(tmp_path, "t")


def test_summaries_of_several_calls_come_together(tmp_path):
    first = Results(tmp_path, ABOUT)
    first.begin("a", {"shots": 1})
    assert json.loads((tmp_path / "results.json").read_text())["tasks"] == {"a": {"settings": {"shots": 1}, "summary": None}}
    first.finish("a", {"records": 3})
    second = Results(tmp_path, ABOUT)
    second.begin("b", {"shots": 2})
    second.begin("a", {"shots": 1})
    assert (
        second.tasks["a"]["summary"] == {"records": 3} and json.loads((tmp_path / "results.json").read_text())["model"] == "m"
    )


def test_another_model_and_other_settings_are_refused(tmp_path):
    results = Results(tmp_path, ABOUT)
    results.begin("a", {"shots": 1})
    with pytest.raises(ValueError, match="of another evaluation: model 'm', not 'n'; name another folder in --out"):
        Results(tmp_path, ABOUT | {"model": "n"})
    with pytest.raises(ValueError, match="has a with other settings: shots 1, not 2"):
        Results(tmp_path, ABOUT).begin("a", {"shots": 2})
    for text in ("[]", "[" * 10**5):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="not what an evaluation wrote"):
            Results(tmp_path, ABOUT)


def test_records_of_unknown_settings_are_not_taken_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"record": 0}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: results\.json does not say what it was computed with"):
        Results(tmp_path, ABOUT).begin("a", {})
