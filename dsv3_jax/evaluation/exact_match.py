"""Exact match: a greedy continuation, up to a stop text, against the answers that count.

Both sides are normalised before they are compared, as far as NORMALISERS are named: `whitespace` (none at the ends, one space
for each run), `case` (folded), `punctuation` (Unicode's, and ASCII's symbols, removed), `articles` (a, an, the removed;
English). With a `regex` its first group, or all that it matches, at its first match is compared; no match is no answer.
"""

import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.evaluation.intervals import wilson
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.tasks import Exact, summarised
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.inference.talk import Speaker, reply
from dsv3_jax.inference.text import prompt_ids


def _without_punctuation(text: str) -> str:
    return "".join(c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")


NORMALISERS: dict[str, Callable[[str], str]] = {  # in the order of their use
    "case": str.casefold,
    "punctuation": _without_punctuation,
    "articles": lambda text: re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE),
    "whitespace": lambda text: " ".join(text.split()),
}


def check_normalisers(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in NORMALISERS."""
    for name in names:
        if name not in NORMALISERS:
            raise ValueError(f"--normalise: expected some of {', '.join(NORMALISERS)}, got {name!r}")


def normalised(text: str, names: Sequence[str]) -> str:
    for name, function in NORMALISERS.items():
        if name in names:
            text = function(text)
    return text


def extracted(text: str, regex: str | None) -> str | None:
    """What of a continuation counts."""
    if regex is None:
        return text
    found = re.search(regex, text)
    return None if found is None else found.group(1 if found.re.groups else 0)


class Prompt(NamedTuple):
    """What to continue, and until when. `cut`: tokens that were left out at the left."""

    ids: tuple[int, ...]
    cut: int
    max_new_tokens: int
    stop: tuple[str, ...]


def prompt_of(tokenizer: Tokenizer, text: str, window: int, max_new_tokens: int, stop: Sequence[str]) -> Prompt:
    """BOS and the text, cut from the left so that it and the new tokens fit the window. Raises ValueError if they cannot."""
    check_room(window, max_new_tokens)
    room = window - max_new_tokens
    ids = prompt_ids(tokenizer, text)
    return Prompt(tuple(ids[-room:]), max(0, len(ids) - room), max_new_tokens, tuple(stop))


def check_room(window: int, max_new_tokens: int) -> None:
    """Raises ValueError if new tokens alone fill the window."""
    if max_new_tokens >= window:
        raise ValueError(
            f"max_new_tokens: expected fewer than the window of {window} tokens, got {max_new_tokens}; "
            "set --max_new_tokens or --window"
        )


def batches(prompts: Sequence[Prompt], batch_size: int) -> list[tuple[int, ...]]:
    """Prompts that end alike, about the same length together."""
    alike: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        alike[prompt.max_new_tokens, prompt.stop].append(i)
    found = []
    for members in alike.values():
        members.sort(key=lambda i: len(prompts[i].ids))
        found += [tuple(members[start : start + batch_size]) for start in range(0, len(members), batch_size)]
    return found


def continued(speaker: Speaker, prompts: Sequence[Prompt], rows: int, sampling: Sampling = GREEDY) -> list[str]:
    """Continuations of up to `rows` prompts that end alike, without the stop text.

    Fewer are filled up with copies of the first, which end when it does: so many rows are one compiled program.
    """
    ids, first = [list(prompt.ids) for prompt in prompts], prompts[0]
    ids += [ids[0]] * (rows - len(ids))
    how: dict[str, Any] = {"max_new_tokens": first.max_new_tokens, "stop": first.stop, "sampling": sampling}
    return reply(speaker, ids, **how).texts[: len(prompts)]


def run_exact(
    speaker: Speaker, records: Sequence[Exact], journal: Journal, *, window: int, batch_size: int, max_new_tokens: int,
    stop: Sequence[str], normalise: Sequence[str], on_records: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:  # fmt: skip
    """Continues what the journal lacks, and summarises: JSON-able. A record's own stop and length go before the given ones."""
    prompts = []
    for record in records:
        most, own_stop = record.max_new_tokens or max_new_tokens, record.stop or stop
        try:
            prompts.append(prompt_of(speaker.tokenizer, record.context, window, most, own_stop))
        except ValueError as error:
            raise ValueError(f"record {record.number}: {error}") from None
    batch_size = min(batch_size, len(prompts))
    for members in batches(prompts, batch_size):
        missing = [i for i in members if records[i].number not in journal.finished]
        if missing:  # the batch is run as a whole, as it would have been
            texts = continued(speaker, [prompts[i] for i in members], batch_size)
            outcomes = [
                outcome(records[i], text, prompts[i].cut, normalise)
                for i, text in zip(members, texts, strict=True)
                if i in missing
            ]
            journal.write(outcomes)
            on_records(len(missing))
    return summary(journal.in_order(record.number for record in records))


def outcome(record: Exact, text: str, n_cut: int, normalise: Sequence[str]) -> dict[str, Any]:
    """JSON-able."""
    answer = extracted(text, record.regex)
    right = {normalised(each, normalise) for each in record.answers}
    correct = answer is not None and normalised(answer, normalise) in right
    return {
        "record": record.number, "continuation": text, "extracted": answer, "answers": list(record.answers), "correct": correct,
        "cut_tokens": n_cut, "category": record.category,
    }  # fmt: skip


def summary(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of exact matches, over all records and by category."""
    return summarised(outcomes, lambda own: {"exact_match": _share(own)})


def _share(outcomes: Sequence[dict[str, Any]]) -> dict[str, float]:
    return wilson(sum(each["correct"] for each in outcomes), len(outcomes))._asdict()
