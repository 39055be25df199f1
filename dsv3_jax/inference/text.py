"""Text before and after generation: a prompt's ids, V3's chat layout, generated ids as text while they come [§4.1].

BOS system text <｜User｜> question <｜Assistant｜> answer EOS <｜User｜> question <｜Assistant｜> ...
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from dsv3_jax.data.tokenizer import ASSISTANT, BOS, EOS, USER, Tokenizer, load_tokenizer

ROLES = ("system", "user", "assistant")


class TextStream:
    """Text of ids that come one by one, up to the first of the `stop` strings.

    What has been shown stays as it is: bytes wait until their character is complete, and characters wait as long as they may
    be the beginning of a stop string. Of several stop strings in the text the one that begins first ends it. Two that begin at
    the same place end it at the same place, so the shorter is not kept waiting for the longer. Bytes that are no UTF-8 become
    U+FFFD, those of an unfinished last character at `finish`.

    `stopped` says that a stop string was found; the stream gives no text from then on.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop: expected a list of strings, none of them empty, got {stop!r}; leave empty ones out")
        self.stopped = False
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, number: int) -> str:
        """Takes the next id; returns the text that can be shown now. Ids beyond the table, padding of a model's vocabulary,
        stand for no bytes."""
        assert number >= 0, number
        return self._take(self._token_bytes[number] if number < len(self._token_bytes) else b"", final=False)

    def finish(self) -> str:
        """The text that was held back, when no more ids come."""
        return self._take(b"", final=True)

    def _take(self, new: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(new, final)
        safe = len(text) if final else _first_beginning(text, self._stop)
        found = _first_match(text, self._stop)
        # A match has to wait for a longer stop string that may have begun before it.
        self.stopped = found is not None and found <= safe
        shown = found if self.stopped else safe
        self._held = text[shown:]
        return text[:shown]


def _first_match(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins; None if the text contains none."""
    return min((at for at in map(text.find, stop) if at >= 0), default=None)


def _first_beginning(text: str, stop: Sequence[str]) -> int:
    """From where on the rest of the text may be the beginning of a stop string; the text's length if it is none."""
    longest = max(map(len, stop), default=1)
    starts = range(max(0, len(text) - longest + 1), len(text))
    return next((at for at in starts if any(s.startswith(text[at:]) for s in stop)), len(text))


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that a model is to continue: BOS and the text, no EOS."""
    return [tokenizer.bos, *tokenizer.encode(text)]


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]]) -> list[int]:
    """Ids of a conversation in V3's layout; behind a last message of the user's they ask for the assistant's answer.

    A message is `{"role": "system" | "user" | "assistant", "content": text}`. As in the released templates, system texts come
    first wherever they stand, joined by blank lines, and users may write several messages in a row, each with its own mark. The
    templates would write answers without a question as well; here they are an error, as is a conversation without a turn.
    What a message quotes of the marks is text. Raises ValueError as well if the tokenizer has no marks of turns.
    """
    if tokenizer.turns is None:
        raise ValueError(f"tokenizer: expected {USER} and {ASSISTANT} among its tokens, got one without; use a plain prompt")
    user, assistant = tokenizer.turns
    texts = [_role_and_text(i, message) for i, message in enumerate(messages)]
    turns = [(role, text) for role, text in texts if role != "system"]
    _check_order([role for role, _ in turns])
    ids = prompt_ids(tokenizer, "\n\n".join(text for role, text in texts if role == "system"))
    for role, text in turns:
        ids += [user, *tokenizer.encode(text)] if role == "user" else [assistant, *tokenizer.encode(text), tokenizer.eos]
    return [*ids, assistant] if turns[-1][0] == "user" else ids


def _role_and_text(index: int, message: Mapping[str, object]) -> tuple[str, str]:
    """Raises ValueError unless the message is a known role and a text, and nothing else."""
    if set(message) != {"role", "content"}:
        raise ValueError(f"messages[{index}]: expected the keys role and content, got {sorted(message)}; leave out others")
    role, text = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"messages[{index}]: expected a role of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(text, str):
        raise ValueError(f"messages[{index}]: expected content to be a string, got {type(text).__name__}")
    return str(role), text


def _check_order(roles: Sequence[str]) -> None:
    """Raises ValueError unless every answer follows a question and there is one."""
    if not roles:
        raise ValueError("messages: expected a message of the user's, got none; add one")
    for before, role in pairwise(["", *roles]):
        if role == "assistant" and before != "user":
            got = "two in a row" if before else "one at the beginning"
            raise ValueError(f"messages: expected each message of the assistant's behind one of the user's, got {got}; reorder")


def folder_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a released model's folder; None if the folder has no tokenizer.json.

    BOS and EOS are those that tokenizer_config.json names, else those whose ids config.json gives (the first, where it gives
    several), else DeepSeek's. Raises ValueError if one of the files is damaged, and as `load_tokenizer` does.
    """
    folder = Path(folder).expanduser()
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    return load_tokenizer(path, vocab_size, _mark(folder, "bos", BOS), _mark(folder, "eos", EOS))


def _mark(folder: Path, which: str, default: str) -> str | int:
    """Name or id of BOS or EOS (`which`: bos, eos)."""
    name = _name(folder / "tokenizer_config.json", f"{which}_token")
    number = _number(folder / "config.json", f"{which}_token_id")
    return name if name is not None else number if number is not None else default


def _name(path: Path, key: str) -> str | None:
    """A token's name: a string, or an object's `content`."""
    given = _read_object(path).get(key)
    name = given.get("content", given) if isinstance(given, dict) else given
    if name is not None and not isinstance(name, str):
        raise ValueError(f"tokenizer: {path}: expected {key} to name a token, got {given!r}; correct or remove it")
    return name


def _number(path: Path, key: str) -> int | None:
    """A token's id: a number, or the first of a list."""
    given = _read_object(path).get(key)
    number = given[0] if isinstance(given, list) and given else given
    if number is not None and type(number) is not int:
        raise ValueError(f"tokenizer: {path}: expected {key} to be a token's id or a list of ids, got {given!r}; correct it")
    return number


def _read_object(path: Path) -> dict[str, object]:
    """A JSON file's object; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer: {path}: expected an object, got {type(content).__name__}; restore the released file")
    return content
