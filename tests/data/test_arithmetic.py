"""Generated arithmetic is true, line by line, checked by another reader of the text."""

import operator
import re

from dsv3_jax.data.arithmetic import LINES, arithmetic_documents, in_words

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def value_of_words(text: str) -> int:
    small = {in_words(n): n for n in [*range(20), *range(20, 100, 10)]}
    total = 0
    for word in re.split(r"[ -]", text):
        total = total * 100 if word == "hundred" else total + small.get(word, 0)
    return total


def is_true(line: str) -> bool:
    numbers = [int(n) for n in re.findall(r"\d+", line)]
    if match := re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", line):
        return OPERATORS[match[2]](int(match[1]), int(match[3])) == int(match[4])
    if match := re.fullmatch(r"(\d+) divided by (\d+) is (\d+) with remainder (\d+)", line):
        return numbers[0] == numbers[1] * numbers[2] + numbers[3] and numbers[3] < numbers[1]
    if match := re.fullmatch(r"\d+ is (less than|greater than|equal to) \d+", line):
        return {"less than": operator.lt, "greater than": operator.gt, "equal to": operator.eq}[match[1]](*numbers)
    if match := re.fullmatch(r"\d+ is (odd|even), and its last digit is (\d)", line):
        return ("even", "odd")[numbers[0] % 2] == match[1] and numbers[0] % 10 == int(match[2])
    if line.startswith("count from"):
        start, step, *terms = numbers
        return terms == list(range(start, start + 8 * step, step))
    if line.startswith("sort "):
        return sorted(numbers[:5]) == numbers[5:]
    match = re.fullmatch(r"([a-z -]+) plus ([a-z -]+) is ([a-z -]+)", line)
    assert match, line
    return value_of_words(match[1]) + value_of_words(match[2]) == value_of_words(match[3])


def test_every_line_is_true():
    lines = [line for text in arithmetic_documents(150_000) for line in text.splitlines()]
    assert len(lines) > 3000 and all(map(is_true, lines))


def test_the_reader_of_this_test_notices_errors():
    assert not any(
        map(is_true, ["2 + 2 = 5", "3 is less than 2", "sort 3 1 2 5 4: 1 2 3 5 4", "7 is even, and its last digit is 7"])
    )


def test_documents_repeat_and_differ_by_seed():
    first = list(arithmetic_documents(5000))
    assert first == list(arithmetic_documents(5000)) and first != list(arithmetic_documents(5000, seed=1))
    assert len(set(first)) == len(first) and all(text.count("\n") == LINES for text in first)
    assert list(arithmetic_documents(10_000))[: len(first)] == first


def test_number_words():
    assert [in_words(n) for n in (0, 13, 40, 58, 100, 305, 999)] == [
        "zero", "thirteen", "forty", "fifty-eight", "one hundred", "three hundred and five", "nine hundred and ninety-nine",
    ]  # fmt: skip
