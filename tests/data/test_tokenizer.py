"""The tokenizer keeps every byte, pre-tokenises as V3 does, and knows the special tokens."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, trainers

from dsv3_jax.data.tokenizer import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    pre_tokenizer,
    split_merged,
    train_tokenizer,
)  # fmt: skip
from oracles.texts import VOCAB_SIZE, WORDS, invented

TEXTS = [invented(domain, seed) for domain in WORDS for seed in range(20)]
TOKENIZER = train_tokenizer(TEXTS, VOCAB_SIZE)

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def pieces(text: str) -> list[str]:
    """The pre-tokeniser's pieces of `text`, in the text's own characters (byte level would show stand-ins)."""
    raw = text.encode()
    spans, at = [], 0
    for shown, _ in pre_tokenizer().pre_tokenize_str(text):
        spans.append(raw[at : at + len(shown)].decode())
        at += len(shown)
    assert at == len(raw)
    return spans


@settings(max_examples=80)
@given(unicode_text)
def test_any_text_survives_encoding_and_decoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\r\n\n", "naïve 🌹👩‍🚀 日本語テキスト", "a\u0301\ufeff\u200d", "\x00\x1b", "  x \n\t y  "]
)
def test_unusual_text_survives_encoding_and_decoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode_batch([text]) == [TOKENIZER.encode(text)]


@settings(max_examples=40)
@given(unicode_text)
def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(text):
    ids = np.array(TOKENIZER.encode(text), np.int64)
    assert TOKENIZER.to_bytes(ids) == text.encode()
    assert TOKENIZER.n_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1234567", ["123", "456", "7"]),
        ("x12y", ["x", "12", "y"]),
        ("日本語abc", ["日本語", "abc"]),
        ("カタカナとかな", ["カタカナとかな"]),
        ("import os.path", ["import", " os", ".path"]),  # (a) a punctuation mark with the letters after it
        ("_name $x(y", ["_name", " $", "x", "(y"]),
        ("Grüße, Éa", ["Grüße", ",", " Éa"]),  # (b) a space belongs to its word
        ("\tword", ["\tword"]),
        ("end):\n\n  x", ["end", "):\n\n", " ", " x"]),  # (c) punctuation takes the line ends after it
        ("a ...\r\nb", ["a", " ...\r\n", "b"]),
        ("a  \n b", ["a", "  \n", " b"]),  # (d) white space that ends in line ends
        ("a    b", ["a", "   ", " b"]),  # (e) white space leaves its last character to the word
        ("a   ", ["a", "   "]),  # (f) white space at the end
    ],
)
def test_pre_tokeniser_splits_as_released(text, expected):
    assert pieces(text) == expected


def test_special_tokens_have_their_places():
    assert (TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.pad) == (0, 1, 2)
    assert TOKENIZER.fim == (4, 3, 5)
    assert [TOKENIZER.backend.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert not TOKENIZER.n_bytes[: len(SPECIAL_TOKENS)].any() and TOKENIZER.n_bytes[len(SPECIAL_TOKENS) :].all()


def test_a_quoted_special_token_is_text():
    text = f"the token {EOS} ends a document, {FIM_HOLE} is a hole"
    ids = TOKENIZER.encode(text)
    assert min(ids) >= len(SPECIAL_TOKENS) and TOKENIZER.decode(ids) == text


def test_the_same_texts_give_the_same_tokenizer():
    assert train_tokenizer(TEXTS, VOCAB_SIZE).backend.to_str() == TOKENIZER.backend.to_str()
    assert TOKENIZER.size == VOCAB_SIZE


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 266 \(10 special tokens and 256 bytes\), got 265"):
        train_tokenizer(TEXTS, 265)
    assert train_tokenizer(TEXTS[:1], 266).decode(train_tokenizer(TEXTS[:1], 266).encode("é🌹")) == "é🌹"


def test_splitting_merged_tokens_keeps_the_text_and_splits_at_the_rate():
    text = TEXTS[0] * 40
    ids = np.array(TOKENIZER.encode(text), np.int32)
    candidates = (TOKENIZER.merged[ids, 0] >= 0).sum()
    assert candidates > 200
    for rate in (0.0, 0.3, 1.0):
        split = split_merged(ids, TOKENIZER.merged, rate, np.random.default_rng(1))
        assert split.dtype == ids.dtype and TOKENIZER.decode(split) == text
        # Four standard deviations of a binomial count.
        assert abs(len(split) - len(ids) - rate * candidates) <= 4 * (candidates * rate * (1 - rate)) ** 0.5


@settings(max_examples=60)
@given(unicode_text, st.floats(0, 1), st.integers(0, 2**32))
def test_splitting_decodes_unchanged(text, rate, seed):
    ids = np.array(TOKENIZER.encode(text + "):\n" + text + ".\n\n"), np.int64)
    split = split_merged(ids, TOKENIZER.merged, rate, np.random.default_rng(seed))
    assert TOKENIZER.to_bytes(split) == TOKENIZER.to_bytes(ids)


def test_exactly_tokens_of_punctuation_with_line_ends_can_be_split():
    splittable = {TOKENIZER.token_bytes[i] for i in np.flatnonzero(TOKENIZER.merged[:, 0] >= 0)}
    expected = {
        text
        for text in TOKENIZER.token_bytes
        if text.endswith(b"\n") and text.strip() and not any(chr(b).isalnum() for b in text) and text.isascii()
    }
    assert splittable == expected and {b".\n", b"):\n", b"!!\n"} <= splittable
    for i in np.flatnonzero(TOKENIZER.merged[:, 0] >= 0):
        head, tail = (TOKENIZER.token_bytes[part] for part in TOKENIZER.merged[i])
        assert not head.endswith(b"\n") and not tail.strip(b"\r\n") and head + tail == TOKENIZER.token_bytes[i]


def released_style(path, names: tuple[str, ...]) -> int:
    """Writes a tokenizer.json laid out as the released one: BOS, EOS, PAD first, the others behind the merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer(), decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[n for n in names if n in (BOS, EOS, PAD)],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([n for n in names if n not in (BOS, EOS, PAD)])
    backend.add_tokens(["<plain added>"])
    backend.save(str(path))
    return backend.get_vocab_size()


def test_a_tokenizer_laid_out_as_the_released_one_loads(tmp_path):
    path = tmp_path / "tokenizer.json"
    size = released_style(path, SPECIAL_TOKENS)
    loaded = load_tokenizer(path, vocab_size=size)
    assert (loaded.bos, loaded.eos, loaded.pad) == (0, 1, 2)
    assert loaded.fim == tuple(loaded.backend.token_to_id(n) for n in (FIM_BEGIN, FIM_HOLE, FIM_END)) and min(loaded.fim) >= 350
    text = "see <plain added> here:\n " + TEXTS[40]
    assert loaded.decode(loaded.encode(text)) == text
    assert size - 1 in loaded.encode(text)  # an added token that is not special is text like any other
    with pytest.raises(ValueError, match=rf"ids up to {size - 1}, but vocab_size is {size - 1}; set vocab_size={size}"):
        load_tokenizer(path, vocab_size=size - 1)


def test_a_tokenizer_without_padding_and_fim_pads_with_eos(tmp_path):
    released_style(tmp_path / "tokenizer.json", (BOS, EOS))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", 1000)
    assert loaded.pad == loaded.eos == 1 and loaded.fim is None


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: no file .*absent.json"):
        load_tokenizer(tmp_path / "absent.json", 1000)
    for content in ("not JSON", json.dumps({"model": {}})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json is not a tokenizer.json: .*") as caught:
            load_tokenizer(tmp_path / "bad.json", 1000)
        assert "\n" not in str(caught.value)
    released_style(tmp_path / "tokenizer.json", (BOS,))
    with pytest.raises(ValueError, match="has no token <｜end▁of▁sentence｜>"):
        load_tokenizer(tmp_path / "tokenizer.json", 1000)


def test_bytes_that_end_within_a_character_are_kept():
    ids = TOKENIZER.encode("🌹")
    partial = Tokenizer(TOKENIZER.backend).to_bytes(ids[:1]) if len(ids) > 1 else TOKENIZER.to_bytes(ids)
    assert "🌹".encode().startswith(partial) and partial
