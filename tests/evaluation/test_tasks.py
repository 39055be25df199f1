"""Task files: what they may hold, and one line for everything else."""

import json

import pytest

from dsv3_jax.evaluation.tasks import Choice, Exact, delimiter, joined, read_task

CHOICE = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
EXACT = {"prompt": "2 + 2 =", "answer": "4"}


def written(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_both_kinds_are_read_with_all_their_fields(tmp_path):
    other = {"context": "Sky:\n", "choices": ["blue", "red", "né"], "answer": 2, "category": "colours", "id": 7}
    task = read_task(written(tmp_path / "mine.jsonl", CHOICE, "", other))
    assert task.name == "mine" and task.multiple_choice and len(task.digest) == 64
    assert task.records == (
        Choice(0, "Question: 2 + 2?\nAnswer:", ("3", "4"), 1, None),
        Choice(1, "Sky:\n", ("blue", "red", "né"), 2, "colours"),
    )
    more = EXACT | {"answer": ["4", "four"], "stop": ";", "max_new_tokens": 3, "regex": r"(\d+)", "category": "sums"}
    task = read_task(written(tmp_path / "exact.jsonl", EXACT, more))
    assert not task.multiple_choice
    assert task.records == (
        Exact(0, "2 + 2 =", ("4",), None, None, None, None),
        Exact(1, "2 + 2 =", ("4", "four"), "sums", (";",), 3, r"(\d+)"),
    )


def test_a_space_joins_unless_there_is_white_space():
    assert joined("A:", "b") == "A: b" and joined("A:\n", "b") == "A:\nb" and joined("", "b") == "b"
    assert delimiter("x ") == "" and delimiter("x") == " "


def test_shots_are_the_first_records_which_are_not_asked_themselves(tmp_path):
    path = written(tmp_path / "a.jsonl", *({**EXACT, "prompt": f"{n} + 0 =", "answer": str(n)} for n in range(5)))
    task = read_task(path, shots=2)
    assert [r.number for r in task.records] == [2, 3, 4] and task.shots == 2
    assert task.records[0].context == "0 + 0 = 0\n\n1 + 0 = 1\n\n2 + 0 ="
    assert [r.number for r in read_task(path, shots=2, limit=2).records] == [2, 3]


def test_shots_of_another_file_leave_every_record_to_be_asked(tmp_path):
    path, other = (
        written(tmp_path / "a.jsonl", CHOICE),
        written(tmp_path / "b.jsonl", CHOICE | {"question": "1 + 2?", "answer": 0}),
    )
    task = read_task(path, shots=1, shots_file=other)
    assert [r.context for r in task.records] == ["Question: 1 + 2?\nAnswer: 3\n\nQuestion: 2 + 2?\nAnswer:"]
    assert task.digest != read_task(path).digest


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not JSON: .* at column 2"),
        ("[1]", "line 2: expected an object, got list"),
        (CHOICE | {"answer": 2}, r"line 2: expected answer to be an index of choices, 0\.\.1, got 2"),
        (CHOICE | {"answer": -1}, "index of choices"),
        (CHOICE | {"answer": True}, "index of choices, .* got true"),
        (CHOICE | {"answer": "4"}, 'index of choices, .* got "4"'),
        (CHOICE | {"choices": ["a"]}, "two or more texts"),
        (CHOICE | {"choices": ["a", ""]}, "none empty"),
        (CHOICE | {"context": "x"}, "either question or context"),
        ({"choices": ["a", "b"], "answer": 0}, "either question or context beside choices, got answer, choices"),
        (CHOICE | {"question": 3}, "expected question to be a text, got 3"),
        (CHOICE | {"category": 3}, "expected category to be a text, got 3"),
        (CHOICE | {"question": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "x"}, "expected prompt and answer, or choices, among the fields, got prompt"),
        (EXACT | {"answer": []}, "expected answer to be a text or a list of texts"),
        (EXACT | {"max_new_tokens": 0}, "expected max_new_tokens to be a number from 1 on, got 0"),
        (EXACT | {"regex": "("}, "regex is none"),
        (EXACT | {"regex": "a{99999999999}"}, "regex is none: the repetition number is too large"),
        (EXACT | {"regex": "(" * 10_000}, "line 2: brackets within brackets, too deep to be read"),
        pytest.param('{"answer": ' + "[" * 100_000, "line 2: brackets within brackets, too deep to be read", id="deep"),
        pytest.param('{"answer": ' + "7" * 5_000 + "}", "line 2: expected numbers of at most 4,300 digits", id="long"),
        (EXACT | {"stop": [""]}, "expected stop to be a text or a list of texts"),
        (EXACT, "same kind as the first one"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=message) as error:
        read_task(written(tmp_path / "a.jsonl", CHOICE, record))
    assert "\n" not in str(error.value) and "a.jsonl" in str(error.value)


def test_brackets_of_any_depth_are_one_line_also_where_they_can_be_read_and_not_shown(tmp_path):
    for depth in range(800, 1000):
        record = json.dumps(CHOICE).replace("1}", "[" * depth + "]" * depth + "}")
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: (expected answer|brackets)"):
            read_task(written(tmp_path / "a.jsonl", record))


@pytest.mark.parametrize("records", [[CHOICE, CHOICE], [EXACT, EXACT]])
def test_a_byte_order_mark_before_the_first_record_is_not_of_it(tmp_path, records):
    plain, marked = written(tmp_path / "a.jsonl", *records), tmp_path / "b.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert read_task(marked).records == read_task(plain).records
    marked.write_bytes(b"\xef\xbb\xbf{}\n{\n\xe9\xe8")
    with pytest.raises(ValueError, match="line 3: expected UTF-8, got byte 0xe9"):
        read_task(marked)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(ValueError, match="--tasks: no file .*none.jsonl"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no record"):
        read_task(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"{}\n{\xe9}")
    with pytest.raises(ValueError, match="line 2: expected UTF-8, got byte 0xe9"):
        read_task(tmp_path / "latin.jsonl")


def test_too_few_records_for_the_shots_are_refused(tmp_path):
    path, other = written(tmp_path / "a.jsonl", CHOICE, CHOICE), written(tmp_path / "b.jsonl", EXACT)
    with pytest.raises(ValueError, match="--shots: expected fewer than the 2 records"):
        read_task(path, shots=2)
    with pytest.raises(ValueError, match="--shots: expected at most the 2 records"):
        read_task(path, shots=3, shots_file=path)
    with pytest.raises(ValueError, match="--shots_file: .* same kind"):
        read_task(path, shots=1, shots_file=other)
    with pytest.raises(ValueError, match="--shots_file: no file"):
        read_task(path, shots=1, shots_file=tmp_path / "none.jsonl")
