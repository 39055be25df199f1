"""The most probable choice, by three readings, against log-probabilities in NumPy."""

import numpy as np
import pytest

from dsv3_jax.evaluation import multiple_choice
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.multiple_choice import run_choices, summary
from dsv3_jax.evaluation.tasks import Choice
from oracles.talkative import ANSWER, byte_tokenizer, reference_logprobs

TOKENIZER = byte_tokenizer()
RECORDS = [
    Choice(0, "a", ("b.", ANSWER[1:], "né"), 1, "knows"),
    Choice(1, "so a", ("x", "yy"), 1, None),
    Choice(3, "something much longer: a ", ("né19", "q"), 0, "knows"),
]


def nats(context, continuation):
    ids = [TOKENIZER.bos, *TOKENIZER.encode(context + continuation)]
    logprobs_TV, start = reference_logprobs(ids[:-1]), len(TOKENIZER.encode(context))
    return sum(logprobs_TV[t, ids[t + 1]] for t in range(start, len(ids) - 1))


def run(subject, folder, records=RECORDS, **how):
    with Journal(folder, "task") as journal:
        how = {"window": 48, "batch_tokens": 64, "unconditional": True} | how
        return run_choices(subject.supply, subject.tokenizer, records, journal, **how), journal.finished


def test_three_readings_are_those_of_numpy(subject, tmp_path):
    found, kept = run(subject, tmp_path)
    rights = dict.fromkeys(multiple_choice.READINGS, 0)
    for record in RECORDS:
        context = record.context.rstrip()
        sums = np.array([nats(context, " " + choice) for choice in record.choices])
        without = np.array([nats("", choice if record.context.endswith(" ") else " " + choice) for choice in record.choices])
        own = kept[record.number]
        np.testing.assert_allclose(own["logprobs"], sums, atol=1e-4)  # float32
        np.testing.assert_allclose(own["unconditional_logprobs"], without, atol=1e-4)
        sizes = np.array([len(choice.encode()) for choice in record.choices])
        assert own["bytes"] == sizes.tolist()
        for name, values in zip(multiple_choice.READINGS, (sums, sums / sizes, sums - without), strict=True):
            assert own["chosen"][name] == int(np.argmax(values))
            rights[name] += int(np.argmax(values)) == record.answer
    assert {name: round(found[name]["value"] * 3) for name in rights} == rights and rights["accuracy_per_byte"] >= 2
    assert found["records"] == 3 and found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert found["categories"]["knows"]["records"] == 2 and list(found["categories"]) == ["knows"]
    assert found["cut_records"] == found["cut_tokens"] == 0


def test_a_short_wrong_choice_wins_the_sum_and_loses_per_byte(subject, tmp_path):
    found, kept = run(subject, tmp_path, [Choice(0, "zz", ("x" + ANSWER[1:], "q"), 0, None)], unconditional=False)
    assert kept[0]["chosen"] == {"accuracy": 1, "accuracy_per_byte": 0} and "accuracy_unconditional" not in found


def test_finished_records_are_not_computed_again(subject, tmp_path, monkeypatch):
    found, kept = run(subject, tmp_path)
    monkeypatch.setattr(multiple_choice, "_outcome", None)
    assert run(subject, tmp_path) == (found, kept)
    lines = (tmp_path / "task.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    monkeypatch.undo()
    (tmp_path / "task.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    heard = []
    again, kept_again = run(subject, tmp_path, on_records=heard.append)
    assert sum(heard) == 1 and again == found and kept_again == kept


def test_a_record_that_is_there_is_not_counted_again_when_its_batch_is_run(subject, tmp_path):
    pair, how = [RECORDS[0], Choice(1, "n", ("x", "y"), 0, None)], {"unconditional": False}
    found, kept = run(subject, tmp_path, pair, **how)
    lines = (tmp_path / "task.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "task.jsonl").write_text(lines[0])
    heard = []
    assert run(subject, tmp_path, pair, on_records=heard.append, **how) == (found, kept)
    assert sum(heard) == 1 and len((tmp_path / "task.jsonl").read_text().splitlines()) == 2


def test_a_long_context_is_cut_and_counted_and_a_long_choice_is_an_error(subject, tmp_path):
    record = Choice(0, "x" * 60, ("b", "cc"), 0, None)
    found, kept = run(subject, tmp_path, [record], unconditional=False, window=20)
    # BOS, 60 of context, and `b` or `cc` with the space: all but the last are read
    assert kept[0]["cut_tokens"] == 1 + 60 + 3 - 1 - 20 and (found["cut_records"], found["cut_tokens"]) == (1, 43)
    with pytest.raises(ValueError, match="record 7: a continuation of 22 tokens does not fit the window of 20; set --window"):
        run(subject, tmp_path, [Choice(7, "x", ("b", "c" * 21), 0, None)], window=20)


def test_the_first_of_equal_choices_is_taken():
    outcome = {"record": 0, "answer": 1, "logprobs": [-1.0, -1.0], "chosen": {"accuracy": 0}, "cut_tokens": 0, "category": None}
    assert summary([outcome])["accuracy"]["value"] == 0 and np.argmax([-1.0, -1.0]) == 0
