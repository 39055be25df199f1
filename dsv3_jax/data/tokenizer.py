"""Byte-level BPE with DeepSeek-V3's pre-tokeniser and special tokens [§4.1].

The new pre-tokeniser of V3 makes tokens of punctuation followed by line breaks; to weaken the bias that such tokens bring to
prompts without a final line break, a share of them is split again in training (`split_merged`).
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
# The order is V3's: begin, end and padding are 0, 1, 2; V3 puts the others behind its 128,000 merges, we before ours.
SPECIAL_TOKENS = (
    BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, "<|EOT|>", "<｜tool▁calls▁begin｜>",
)  # fmt: skip

# Three isolated splits, one after the other; the third's alternatives in their order: an ASCII punctuation mark with the
# letters after it, a word with at most one mark before it, punctuation with the line breaks after it, line breaks with
# the white space before them, white space up to the last one before a word, any white space.
DIGITS = r"\p{N}{1,3}"
CJK = r"[一-龥぀-ゟ゠-ヿ]+"
WORDS = "|".join(
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """V3's: digits in threes, runs of CJK, words; then bytes, without the regular expression GPT-2 would add."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in (DIGITS, CJK, WORDS)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError if special tokens and bytes alone are more than `vocab_size`."""
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: expected at least {smallest} ({len(SPECIAL_TOKENS)} special tokens and 256 bytes), got {vocab_size}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A tokenizer of at most `vocab_size` entries: special tokens, the 256 bytes, then merges in order of frequency.

    Raises ValueError as `check_vocab_size` does.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(path: str | Path, vocab_size: int, bos: str | int = BOS, eos: str | int = EOS) -> "Tokenizer":
    """A `tokenizer.json`, ours or a released one; `bos` and `eos` by name or by id where they are not DeepSeek's.

    Raises ValueError if it is none, if it lacks BOS or EOS, or if its ids do not fit a model of `vocab_size`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"tokenizer: no file {path}; expected `train` or a tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer: {path} is not a tokenizer.json: {str(error).splitlines()[0]}") from None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    bos_name, eos_name = (_name(vocabulary, mark, path) for mark in (bos, eos))
    size = max(vocabulary.values()) + 1
    if size > vocab_size:
        raise ValueError(f"tokenizer: {path} has ids up to {size - 1}, but vocab_size is {vocab_size}; set vocab_size={size}")
    return Tokenizer(backend, bos_name, eos_name)


def _name(vocabulary: Mapping[str, int], mark: str | int, path: Path) -> str:
    """The name of a token given by name or by id. Raises ValueError if there is none."""
    found = next((name for name, number in vocabulary.items() if mark in (name, number)), None)
    if found is None:
        raise ValueError(f"tokenizer: {path} has no token {mark}; expected DeepSeek's BOS and EOS or others that it has")
    return found


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids, and which bytes every id stands for. Special tokens stand for no bytes."""

    backend: tokenizers.Tokenizer
    bos_name: str = BOS
    eos_name: str = EOS

    def __post_init__(self) -> None:
        # A document that quotes `<｜end▁of▁sentence｜>` contains these characters, not the end of a document. That holds for
        # the marks of turns and holes too, which a released file may list as added text that is not special.
        known = [name for name in (*SPECIAL_TOKENS, self.bos_name, self.eos_name) if self.backend.token_to_id(name) is not None]
        self.backend.add_special_tokens(known)
        self.backend.encode_special_tokens = True

    @property
    def bos(self) -> int:
        return self._special(self.bos_name)

    @property
    def eos(self) -> int:
        return self._special(self.eos_name)

    @property
    def pad(self) -> int:
        """Fills rows; never predicted. A tokenizer without its own uses EOS, as V3's configuration does."""
        found = self.backend.token_to_id(PAD)
        return self.eos if found is None else found

    @property
    def fim(self) -> tuple[int, int, int] | None:
        """Ids of begin, hole, end; None if this tokenizer lacks one of them."""
        if any(self.backend.token_to_id(name) is None for name in (FIM_BEGIN, FIM_HOLE, FIM_END)):
            return None
        return self._special(FIM_BEGIN), self._special(FIM_HOLE), self._special(FIM_END)

    @property
    def turns(self) -> tuple[int, int] | None:
        """Ids that open a user's and an assistant's turn; None if this tokenizer lacks one of them."""
        if any(self.backend.token_to_id(name) is None for name in (USER, ASSISTANT)):
            return None
        return self._special(USER), self._special(ASSISTANT)

    def _special(self, name: str) -> int:
        number = self.backend.token_to_id(name)
        assert number is not None, name
        return number

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return len(self.token_bytes)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """Id -> bytes; empty for special tokens and for ids not in use."""
        byte_of = {character: byte for byte, character in _byte_alphabet().items()}
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        table = [b""] * (max(vocabulary.values()) + 1)
        for text, number in vocabulary.items():
            if number in added:
                table[number] = b"" if added[number].special else text.encode()
            else:
                table[number] = bytes(byte_of[character] for character in text)
        return tuple(table)

    @cached_property
    def n_bytes(self) -> Int[np.ndarray, "V"]:
        """Id -> number of bytes."""
        return np.array([len(text) for text in self.token_bytes])

    @cached_property
    def merged(self) -> Int[np.ndarray, "V 2"]:
        """Id of a token of punctuation and line breaks -> ids of its two parts; -1 for every other token.

        A token whose parts are not in the vocabulary counts as one that cannot be split.
        """
        number = {text: i for i, text in enumerate(self.token_bytes) if text}
        table = np.full((self.size, 2), -1)
        for text, i in number.items():
            head = text.rstrip(b"\r\n")
            parts = number.get(head), number.get(text[len(head) :])
            if len(head) < len(text) and None not in parts and _is_punctuation(head):
                table[i] = parts
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no BOS, no EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def to_bytes(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> bytes:
        """The bytes that the ids stand for, also where they end within a character."""
        return b"".join(self.token_bytes[int(i)] for i in ids)

    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.to_bytes(ids).decode(errors="replace")


def split_merged(
    ids: Integer[np.ndarray, "T"], merged: Int[np.ndarray, "V 2"], rate: float, rng: np.random.Generator
) -> Integer[np.ndarray, "T2"]:
    """Splits each token of punctuation and line breaks in two with probability `rate`; the text stays the same."""
    chosen = (merged[ids, 0] >= 0) & (rng.random(len(ids)) < rate)
    out = np.repeat(ids, 1 + chosen)
    first = np.flatnonzero(chosen) + np.arange(chosen.sum())
    out[first], out[first + 1] = merged[ids[chosen], 0], merged[ids[chosen], 1]
    return out


def _is_punctuation(head: bytes) -> bool:
    """Whether these bytes are the pre-tokeniser's optional space and a run of punctuation or symbols."""
    try:
        marks = head.decode().removeprefix(" ")
    except UnicodeDecodeError:
        return False
    return bool(marks) and all(unicodedata.category(character)[0] in "PS" for character in marks)


def _byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it in a vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
