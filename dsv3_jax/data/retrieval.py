"""Generated key-value retrieval documents, and the haystacks that measure what a model found of them [§4.3].

A document is lines of three kinds: a sentence as filler; a fact, a key and its value written as one word ("kt": k is t); and a
question, the key of an earlier fact again with the value apart from it ("k t"). Which fact a question asks for is drawn evenly
from all those before it, so the distance is anything from the line before to the whole document, and a window cut anywhere
holds facts with questions. A fact is one word so that a tokenizer makes one token of it: to find a value takes one look at the
past. Two tokens would take a chain of two attentions, which at the size of preset `needles` had not formed after 3 M tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

KEYS = VALUES = tuple("bcdfghjklmnprstv")
# Few words in many orders: what comes next follows from the two words before, which a model learns to look at.
FILLER = (
    "the sun is low and the sea is red", "the old man had a red hat", "a new day is far from the sea",
    "the man and the dog go up the hill", "the dog had an old bone", "we go to the sea in the sun",
    "a hat is on the hill", "the hill is old and the day is new", "far from the hill we had a dog",
    "the sea had no end and no hill", "in the end the man is old", "a red dog is on the low hill",
    "we had no hat in the sun", "the end of the day is red", "up the hill and far from the man",
    "no man had a new bone", "the new hat is low on the dog", "in the old sea the sun had no end",
    "a day in the sun is no end", "go from the sea to the old hill", "the bone is far up the red hill",
    "we and the man go in the end", "an old day had a new sun", "on the sea the dog is no man",
)  # fmt: skip
FILLER_SHARE = 0.3  # of a document's lines
MOST_FACT_SHARE = 0.3  # of them; fewer where the facts would not reach to the end. The rest are questions
SHORTEST = 4  # a document has between a quarter of the context and all of it
LINE_TOKENS = 4  # of a line, on average


class Haystack(NamedTuple):
    """A text that ends with a question's key; the value stands somewhere in it and has to follow now."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    needle: int  # where in the prompt the fact begins


def retrieval_documents(n_bytes: int, context: int, seed: int = 0) -> Iterator[str]:
    """Documents of `context`/4 to `context` tokens (at one token a word and a fact) until about `n_bytes` bytes are out."""
    size, number = 0, 0
    while size < n_bytes:
        text = _document(context, np.random.default_rng((seed, context, number)))
        yield text
        size, number = size + len(text), number + 1


def _document(context: int, rng: np.random.Generator) -> str:
    length = context * SHORTEST ** -rng.random()  # as many short ones as long ones, on a scale of ratios
    # few facts asked for often, or many seldom
    unused = _facts(rng)[: round(len(KEYS) ** rng.random())]
    fact_share = min(MOST_FACT_SHARE, len(unused) * LINE_TOKENS / length)
    known, lines, tokens = list[str](), list[str](), 0
    while tokens < length:
        kind = rng.random()
        if kind < FILLER_SHARE:
            lines.append(_filler(rng))
        elif not known or (unused and kind < FILLER_SHARE + fact_share):
            known.append(unused.pop())
            lines.append(f"{known[-1]}\n")
        else:
            fact = known[rng.integers(len(known))]
            lines.append(f"{fact[0]} {fact[1]}\n")
        tokens += len(lines[-1].split()) + 1
    return "".join(lines)


def _facts(rng: np.random.Generator) -> list[str]:
    """A fact for every key, in random order."""
    return [KEYS[key] + VALUES[rng.integers(len(VALUES))] for key in rng.permutation(len(KEYS))]


def _filler(rng: np.random.Generator) -> str:
    return FILLER[rng.integers(len(FILLER))] + "\n"


def haystack(length: int, depth: float, encode: Callable[[str], list[int]], seed: int, *, begin: int) -> Haystack:
    """A haystack of at most `length` tokens, answer included, and not a line less than that.

    The needle lies at the share `depth` of the lines before the question: 0 is the first, 1 the last. The other lines are
    filler and, anywhere among it, the other keys' facts, fewer where they would be more than half of it. `begin` is the token
    that a document begins with. Raises ValueError if `length` holds no needle and question.
    """
    rng = np.random.default_rng((seed, length, round(1000 * depth)))
    fact, *others = _facts(rng)
    needle, question, answer = encode(f"{fact}\n"), encode(fact[0]), encode(f" {fact[1]}")
    room = length - 1 - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"length: expected at least {length - room} tokens for a needle and its question, got {length}")
    lines = list[list[int]]()
    for text in others:
        line = encode(f"{text}\n")
        if sum(map(len, lines)) + len(line) <= room // 2:
            lines.append(line)
    room -= sum(map(len, lines))
    while len(line := encode(_filler(rng))) <= room:
        lines.append(line)
        room -= len(line)
    lines = [lines[i] for i in rng.permutation(len(lines))]
    before = round(depth * len(lines))
    lines.insert(before, needle)
    prompt = [begin, *(token for line in [*lines, question] for token in line)]
    return Haystack(tuple(prompt), tuple(answer), 1 + sum(map(len, lines[:before])))
