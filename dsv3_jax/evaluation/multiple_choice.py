"""Multiple choice by log-probability: of the choices the one whose text is the most probable continuation.

Three readings: the sum of a choice's log-probabilities; the same per byte of its text, so that long choices are not at a
disadvantage; and, if asked for, less what the choice has without the context (the field's mutual information), so that
frequent words are not at an advantage. Of equals the first choice wins.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.evaluation.intervals import wilson
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.logprob import Request, Scored, cut, encode_pair, n_read, scored
from dsv3_jax.evaluation.tasks import Choice, delimiter, summarised
from dsv3_jax.inference.score import Supply

READINGS = ("accuracy", "accuracy_per_byte", "accuracy_unconditional")


def requests_of(record: Choice, tokenizer: Tokenizer, window: int, unconditional: bool) -> tuple[list[Request], int]:
    """One request a choice, then, if wanted, one without the context; and how many tokens of the context were cut off at most.

    Raises ValueError if a choice does not fit the window.
    """
    space, found, most = delimiter(record.context), [], 0
    for context in (record.context, "") if unconditional else (record.context,):
        for choice in record.choices:
            try:
                request, over = cut(*encode_pair(tokenizer, context, space + choice), window)
            except ValueError as error:
                raise ValueError(f"record {record.number}: {error}") from None
            found.append(request)
            most = max(most, over)
    return found, most


def run_choices(
    supply: Supply, tokenizer: Tokenizer, records: Sequence[Choice], journal: Journal, *, window: int, batch_tokens: int,
    unconditional: bool = False, on_records: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:  # fmt: skip
    """Scores what the journal lacks, and summarises: JSON-able. `on_records` hears how many more are finished."""
    requests, owners, lengths, cuts = [], [], [], {}
    for i, record in enumerate(records):
        own, cuts[i] = requests_of(record, tokenizer, window, unconditional)
        n = len(record.choices)
        requests += own
        owners += [(i, j) for j in range(len(own))]
        # A record's choices go together, so that it is finished early; those without a context are short, and apart.
        lengths += (
            [max(map(n_read, own[:n]))] * n + [max(map(n_read, own[n:]))] * n if unconditional else [max(map(n_read, own))] * n
        )
    partial: dict[int, dict[int, Scored]] = defaultdict(dict)
    missing = {i for i, record in enumerate(records) if record.number not in journal.finished}
    for batch in scored(supply, requests, batch_tokens, lengths=lengths, wanted=lambda index: owners[index][0] in missing):
        complete = []
        for index, found in batch.items():
            i, j = owners[index]
            partial[i][j] = found
            if len(partial[i]) == len(records[i].choices) * (1 + unconditional):
                each = partial.pop(i)
                if i in missing:
                    complete.append(_outcome(records[i], [each[j] for j in sorted(each)], cuts[i]))
        journal.write(complete)
        on_records(len(complete))
    return summary(journal.in_order(record.number for record in records))


def _outcome(record: Choice, found: Sequence[Scored], n_cut: int) -> dict[str, Any]:
    """JSON-able; log-probabilities in nats."""
    n = len(record.choices)
    sums = np.array([each.logprob for each in found])
    sizes = np.array([len(choice.encode()) for choice in record.choices])
    by_reading = {"accuracy": sums[:n], "accuracy_per_byte": sums[:n] / sizes}
    result = {"record": record.number, "answer": record.answer, "logprobs": sums[:n].tolist(), "bytes": sizes.tolist()}
    if len(found) > n:
        by_reading["accuracy_unconditional"] = sums[:n] - sums[n:]
        result["unconditional_logprobs"] = sums[n:].tolist()
    result["chosen"] = {reading: int(np.argmax(values)) for reading, values in by_reading.items()}
    if not np.isfinite(sums).all():
        raise FloatingPointError(f"record {record.number}: a log-probability is not finite; try --dtype=float32")
    return result | {"cut_tokens": n_cut, "category": record.category}


def summary(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies with their intervals, over all records and by category, and what guessing would give."""
    chance = float(np.mean([1 / len(outcome["logprobs"]) for outcome in outcomes]))
    return {**summarised(outcomes, _accuracies), "chance": chance}


def _accuracies(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        reading: wilson(sum(o["chosen"][reading] == o["answer"] for o in outcomes), len(outcomes))._asdict()
        for reading in READINGS
        if reading in outcomes[0]["chosen"]
    }
