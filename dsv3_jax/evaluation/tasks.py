"""Tasks in local JSON Lines: multiple choice and exact match, checked line by line, with few-shot examples.

Multiple choice: {"question": text, "choices": [texts], "answer": index}, asked as `Question: ...\\nAnswer:`, or with
"context" instead of "question" as the text stands. Exact match: {"prompt": text, "answer": text or [texts]}, and if wanted
"stop" (text or list), "max_new_tokens", "regex" (what of the continuation counts: its first group, or all that it matches).
Both may have "category". Other fields are left alone. A file holds records of one kind.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.data.files import parsed

SHOT_END = "\n\n"  # between examples, and between them and the question


@dataclass(frozen=True)
class Choice:
    """A multiple-choice record: which of `choices` continues `context`?"""

    number: int  # of the record in its file, from 0
    context: str
    choices: tuple[str, ...]
    answer: int
    category: str | None

    @property
    def solved(self) -> str:
        return joined(self.context, self.choices[self.answer])


@dataclass(frozen=True)
class Exact:
    """An exact-match record: the continuation of `context` must be one of `answers`."""

    number: int
    context: str
    answers: tuple[str, ...]
    category: str | None
    stop: tuple[str, ...] | None
    max_new_tokens: int | None
    regex: str | None

    @property
    def solved(self) -> str:
        return joined(self.context, self.answers[0])


@dataclass(frozen=True)
class Task:
    """Records to evaluate, all Choice or all Exact, their contexts with the examples before them."""

    name: str
    records: tuple[Choice, ...] | tuple[Exact, ...]
    digest: str  # SHA-256 of the file, and of that of the examples
    shots: int

    @property
    def multiple_choice(self) -> bool:
        return isinstance(self.records[0], Choice)


def summarised(
    outcomes: Sequence[dict[str, Any]], measures: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """JSON-able: how many, how much of their contexts was cut off, and their measures, over all and by category if any has one.

    An outcome has `cut_tokens` and `category`.
    """
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in outcomes:
        if outcome["category"] is not None:
            by_category[outcome["category"]].append(outcome)
    result = {
        "records": len(outcomes),
        "cut_records": sum(outcome["cut_tokens"] > 0 for outcome in outcomes),
        "cut_tokens": sum(outcome["cut_tokens"] for outcome in outcomes),
        **measures(outcomes),
    }
    if by_category:
        result["categories"] = {name: {"records": len(own), **measures(own)} for name, own in sorted(by_category.items())}
    return result


def joined(context: str, text: str) -> str:
    return context + delimiter(context) + text


def delimiter(context: str) -> str:
    """A space, unless the context ends in white space or is empty."""
    return " " if context and not context[-1].isspace() else ""


def read_task(path: str | Path, *, shots: int = 0, shots_file: str | Path | None = None, limit: int | None = None) -> Task:
    """A file's records; `shots` examples before each, from `shots_file` or the first records, which are then not asked.

    `limit`: only so many records. Raises ValueError, one line with file and line, for a file that is not there or empty, what
    is no JSON or no record, brackets too deep or numbers too long for Python, an answer that is no index of the choices,
    records of different kinds, and too few of them.
    """
    path = Path(path)
    records, digest = _records(path, "--tasks")
    examples = records[:shots]
    if shots_file is not None:
        examples, other = _records(Path(shots_file), "--shots_file")
        examples, digest = examples[:shots], hashlib.sha256(f"{digest} {other}".encode()).hexdigest()
        if type(examples[0]) is not type(records[0]):
            raise ValueError(f"--shots_file: {shots_file}: expected records of the same kind as {path} has")
    elif shots >= len(records):
        raise ValueError(
            f"--shots: expected fewer than the {len(records)} records of {path}, got {shots}; or name --shots_file"
        )
    else:
        records = records[shots:]
    if len(examples) < shots:
        raise ValueError(f"--shots: expected at most the {len(examples)} records of {shots_file}, got {shots}")
    before = "".join(example.solved + SHOT_END for example in examples)
    given: Any = [_with_context(record, before + record.context) for record in records[:limit]]
    return Task(path.stem, tuple(given), digest, shots)


def _with_context(record: Choice | Exact, context: str) -> Choice | Exact:
    return type(record)(**{**record.__dict__, "context": context})


def _records(path: Path, flag: str) -> tuple[Sequence[Any], str]:
    if not path.is_file():
        raise ValueError(f"{flag}: no file {path}; expected bits_per_byte, humaneval or a .jsonl file")
    raw = path.read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:  # its object is what comes behind a byte order mark
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8, got byte 0x{error.object[error.start]:02x}") from None
    records: list[Any] = []
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        place = f"{path}, line {line}"
        try:
            record = _record(place, len(records), text)
        except RecursionError:
            raise ValueError(
                f"{place}: brackets within brackets, too deep to be read; expected texts and lists of them"
            ) from None
        if records and type(record) is not type(records[0]):
            raise ValueError(f"{place}: expected a record of the same kind as the first one; put the two kinds in two files")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: the file has no record; expected one JSON object a line")
    return records, hashlib.sha256(raw).hexdigest()


def _record(place: str, number: int, text: str) -> Choice | Exact:
    fields = parsed(place, text)
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: expected an object, got {type(fields).__name__}")
    return _choice(place, number, fields) if "choices" in fields else _exact(place, number, fields)


def _choice(place: str, number: int, fields: dict[str, Any]) -> Choice:
    if ("question" in fields) == ("context" in fields):
        raise ValueError(f"{place}: expected either question or context beside choices, got {_names(fields)}")
    choices, answer = fields["choices"], fields.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{place}: expected choices to be a list of two or more texts, none empty, got {_shown(choices)}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{place}: expected answer to be an index of choices, 0..{len(choices) - 1}, got {_shown(answer)}")
    if "context" in fields:
        context = _text(place, fields, "context")
    else:
        context = f"Question: {_text(place, fields, 'question')}\nAnswer:"
    for text in choices:
        _check_characters(place, "choices", text)
    return Choice(number, context, tuple(choices), answer, _category(place, fields))


def _exact(place: str, number: int, fields: dict[str, Any]) -> Exact:
    if "prompt" not in fields or "answer" not in fields:
        raise ValueError(f"{place}: expected prompt and answer, or choices, among the fields, got {_names(fields)}")
    answers = _texts(place, fields, "answer")
    stop = _texts(place, fields, "stop") if "stop" in fields else None
    most, regex = fields.get("max_new_tokens"), fields.get("regex")
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f"{place}: expected max_new_tokens to be a number from 1 on, got {_shown(most)}")
    if regex is not None:
        try:
            re.compile(_text(place, fields, "regex"))
        except (re.error, OverflowError) as error:
            raise ValueError(f"{place}: regex is none: {error}") from None
    return Exact(number, _text(place, fields, "prompt"), answers, _category(place, fields), stop, most, regex)


def _texts(place: str, fields: dict[str, Any], name: str) -> tuple[str, ...]:
    """A text, or a list of them."""
    given = fields[name] if isinstance(fields[name], list) else [fields[name]]
    if not given or not all(isinstance(text, str) and text for text in given):
        raise ValueError(f"{place}: expected {name} to be a text or a list of texts, none empty, got {_shown(fields[name])}")
    for text in given:
        _check_characters(place, name, text)
    return tuple(given)


def _text(place: str, fields: dict[str, Any], name: str) -> str:
    if not isinstance(fields[name], str) or not fields[name]:
        raise ValueError(f"{place}: expected {name} to be a text, got {_shown(fields[name])}")
    _check_characters(place, name, fields[name])
    return fields[name]


def _category(place: str, fields: dict[str, Any]) -> str | None:
    category = fields.get("category")
    if category is not None and not isinstance(category, str):
        raise ValueError(f"{place}: expected category to be a text, got {_shown(category)}")
    return category


def _check_characters(place: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: {name} holds half of a surrogate pair, which is no text") from None


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(sorted(fields)) or "none"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
