"""Greedy answers: what counts of them, how they are compared, and which are continued together."""

import pytest

from dsv3_jax.evaluation import exact_match
from dsv3_jax.evaluation.exact_match import (
    Prompt,
    batches,
    check_normalisers,
    extracted,
    normalised,
    outcome,
    prompt_of,
    run_exact,
)
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.tasks import Exact
from oracles.talkative import ANSWER, byte_tokenizer

HOW = {"window": 48, "batch_size": 3, "max_new_tokens": 12, "stop": ["\n"], "normalise": ["whitespace"]}


def record(number, context, *answers, category=None, stop=None, most=None, regex=None):
    return Exact(number, context, answers, category, stop, most, regex)


RECORDS = [
    record(0, "a", ANSWER.strip(), category="x"),
    record(1, "xa", "no", "né19b.", category="x"),
    record(2, "a", "né", stop=("19",), category="y"),
    record(3, "a", "n", most=2, category="y"),
    record(4, "a", "19", regex=r"(\d+)b"),
    record(5, "xxn", "é19b.", category="y"),
]


def run(subject, folder, records=RECORDS, **how):
    with Journal(folder, "task") as journal:
        return run_exact(subject.speaker, records, journal, **HOW | how), journal.finished


def test_stop_length_and_regex_decide_what_is_compared(subject, tmp_path):
    found, kept = run(subject, tmp_path)
    assert [kept[i]["continuation"] for i in range(6)] == [ANSWER, ANSWER, " né", " n", ANSWER, "é19b."]
    assert kept[4]["extracted"] == "19" and all(kept[i]["correct"] for i in range(6))
    assert found["exact_match"]["value"] == 1 and found["records"] == 6
    assert {name: own["records"] for name, own in found["categories"].items()} == {"x": 2, "y": 3}
    (tmp_path / "task.jsonl").write_text("".join((tmp_path / "task.jsonl").read_text().splitlines(keepends=True)[:-1]))
    heard = []
    assert run(subject, tmp_path, on_records=heard.append) == (found, kept) and sum(heard) == 1


def test_a_finished_task_generates_nothing(tmp_path, monkeypatch, subject):
    with Journal(tmp_path, "task") as journal:
        journal.write([outcome(r, "né", 0, []) for r in RECORDS])
    monkeypatch.setattr(exact_match, "continued", None)
    assert run(subject, tmp_path)[0]["exact_match"]["value"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("text", "names", "wanted"),
    [
        (" The  Cat.\n", [], " The  Cat.\n"),
        (" The  Cat.\n", ["whitespace"], "The Cat."),
        (" The  Cat.\n", ["case", "whitespace"], "the cat."),
        (" The  Cat.\n", ["punctuation", "whitespace"], "The Cat"),
        (" The  Cat.\n", ["whitespace", "articles", "case", "punctuation"], "cat"),
        ("$1,000 «né»", ["punctuation"], "1000 né"),
        ("Straße", ["case"], "strasse"),
    ],
)
def test_normalisers(text, names, wanted):
    assert normalised(text, names) == wanted


def test_both_sides_are_normalised():
    given = record(0, "a", "The Cat")
    assert outcome(given, " the cat.", 0, ["case", "punctuation", "whitespace"])["correct"]
    assert not outcome(given, " the cat.", 0, ["whitespace"])["correct"]


def test_no_match_of_the_regex_is_no_answer():
    assert extracted("abc", None) == "abc" and extracted("a12", r"\d+") == "12" and extracted("a12", r"a(\d)") == "1"
    assert extracted("abc", r"\d") is None
    assert not outcome(record(0, "a", "x", regex=r"\d"), "x", 0, [])["correct"]


def test_prompts_are_cut_from_the_left_and_leave_room():
    tokenizer = byte_tokenizer()
    whole = prompt_of(tokenizer, "abcdef", 20, 5, ["\n"])
    assert whole == Prompt((tokenizer.bos, *tokenizer.encode("abcdef")), 0, 5, ("\n",))
    short = prompt_of(tokenizer, "abcdef", 10, 6, [])
    assert short.ids == tuple(tokenizer.encode("cdef")) and short.cut == 3
    with pytest.raises(ValueError, match="fewer than the window of 10 tokens, got 10"):
        prompt_of(tokenizer, "abcdef", 10, 10, [])


def test_prompts_that_end_alike_are_continued_together_by_length():
    prompts = [
        Prompt((0,) * n, 0, most, stop) for n, most, stop in ((5, 8, ()), (2, 8, ()), (3, 8, ("x",)), (4, 8, ()), (1, 9, ()))
    ]
    assert batches(prompts, 2) == [(1, 3), (0,), (2,), (4,)]


def test_a_normaliser_that_is_none_is_named():
    check_normalisers(["case"])
    with pytest.raises(ValueError, match="--normalise: expected some of case, punctuation, articles, whitespace, got 'stem'"):
        check_normalisers(["case", "stem"])
