"""Generated arithmetic for the embedded corpus: every line is true and follows from its left side."""

from collections.abc import Callable, Iterator

import numpy as np

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_ONES_WORDS = (_ONES + " eighteen nineteen").split()
_TENS_WORDS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
LINES = 40  # lines a document


def in_words(n: int) -> str:
    """English for 0 <= n < 1000."""
    if n < 20:
        return _ONES_WORDS[n]
    if n < 100:
        return _TENS_WORDS[n // 10] + (f"-{_ONES_WORDS[n % 10]}" if n % 10 else "")
    return f"{_ONES_WORDS[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")


def _addition(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}"


def _subtraction(a: int, b: int) -> str:
    return f"{a} - {b} = {a - b}"


def _multiplication(a: int, b: int) -> str:
    return f"{a % 100} * {b % 13} = {(a % 100) * (b % 13)}"


def _division(a: int, b: int) -> str:
    divisor = b % 12 + 1
    return f"{a} divided by {divisor} is {a // divisor} with remainder {a % divisor}"


def _comparison(a: int, b: int) -> str:
    return f"{a} is {'less than' if a < b else 'greater than' if a > b else 'equal to'} {b}"


def _parity(a: int, b: int) -> str:
    return f"{a} is {'odd' if a % 2 else 'even'}, and its last digit is {a % 10}"


def _sum_in_words(a: int, b: int) -> str:
    a, b = a % 500, b % 500
    return f"{in_words(a)} plus {in_words(b)} is {in_words(a + b)}"


def _counting(a: int, b: int) -> str:
    step = b % 9 + 1
    return f"count from {a} in steps of {step}: " + ", ".join(str(a + i * step) for i in range(8))


def _sorting(a: int, b: int) -> str:
    numbers = [(a * 7 + i * b) % 100 for i in range(5)]
    return f"sort {' '.join(map(str, numbers))}: {' '.join(map(str, sorted(numbers)))}"


KINDS: tuple[Callable[[int, int], str], ...] = (
    _addition, _subtraction, _multiplication, _division, _comparison, _parity, _sum_in_words, _counting, _sorting,
)  # fmt: skip


def arithmetic_documents(n_bytes: int, seed: int = 0) -> Iterator[str]:
    """Documents of LINES lines, each document of two kinds of exercise, until about `n_bytes` bytes are out."""
    size, number = 0, 0
    while size < n_bytes:
        rng = np.random.default_rng((seed, number))
        kinds = rng.choice(len(KINDS), 2, replace=False)
        largest = int(rng.choice((10, 100, 1000)))
        lines = [KINDS[rng.choice(kinds)](*rng.integers(0, largest, 2).tolist()) for _ in range(LINES)]
        text = "\n".join(lines) + "\n"
        yield text
        size, number = size + len(text), number + 1
