"""Generated ids become text as they come, up to a stop string; prompts, conversations and released folders become ids."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.tokenizer import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, USER, load_tokenizer, train_tokenizer
from dsv3_jax.inference.text import TextStream, chat_ids, folder_tokenizer, prompt_ids
from oracles.texts import VOCAB_SIZE, WORDS, invented

TOKENIZER = train_tokenizer([invented(domain, seed) for domain in WORDS for seed in range(4)], VOCAB_SIZE)
NUMBER = {name: TOKENIZER.backend.token_to_id(name) for name in SPECIAL_TOKENS}


def streamed(pieces: list[bytes], stop: list[str]) -> tuple[list[str], TextStream]:
    """What the stream shows for each of the pieces, and at its end."""
    stream = TextStream(pieces, stop)
    shown = [stream.push(i) for i in range(len(pieces))]
    return [*shown, stream.finish()], stream


def cut(text: str, stop: list[str]) -> str:
    return text[: min([text.index(s) for s in stop if s in text], default=len(text))]


def complete(raw: bytes) -> str:
    """The text of the bytes without an unfinished character at their end."""
    return next((raw[:-n] for n in (3, 2, 1) if len(raw) >= n and unfinished(raw[-n:])), raw).decode(errors="replace")


def unfinished(tail: bytes) -> bool:
    try:
        tail.decode()
        return False
    except UnicodeDecodeError as error:
        # Python's decoder waits for the last byte of a surrogate too, to reject all three.
        surrogate = len(tail) == 2 and tail[0] == 0xED and 0xA0 <= tail[1] <= 0xBF
        return surrogate or (error.start == 0 and error.reason == "unexpected end of data")


# Few characters, so that stop strings are met and half met; whole ones of one to four bytes, parts of some, and any bytes.
characters = st.sampled_from([*"aab", "é", "日", "本", "🌹", "\ufffd"])
parts = ["🌹".encode()[:3], "日".encode()[:2], "日".encode()[1:], b"\xc3", b"\xed\xa0", b"\xff"]
stray = st.sampled_from(parts) | st.binary(max_size=3)
byte_strings = st.lists(characters.map(str.encode) | stray, max_size=24).map(b"".join)
stop_strings = st.lists(st.text(characters, min_size=1, max_size=4), max_size=3)


@st.composite
def cut_into_tokens(draw) -> list[bytes]:
    raw = draw(byte_strings)
    bounds = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    return [raw[a:b] for a, b in zip([0, *bounds], [*bounds, len(raw)], strict=True)]


@settings(max_examples=250)
@given(cut_into_tokens(), stop_strings)
def test_the_shown_text_is_the_whole_text_cut_at_the_first_stop_string(pieces, stop):
    shown, stream = streamed(pieces, stop)
    whole = b"".join(pieces).decode(errors="replace")
    assert "".join(shown) == cut(whole, stop)
    assert stream.stopped == any(s in whole for s in stop)


@settings(max_examples=250)
@given(cut_into_tokens(), stop_strings)
def test_no_more_is_held_back_than_may_begin_a_stop_string_or_a_character(pieces, stop):
    stream, shown = TextStream(pieces, stop), ""
    for i in range(len(pieces)):
        shown += stream.push(i)
        so_far = complete(b"".join(pieces[: i + 1]))
        if stream.stopped:
            assert shown == cut(so_far, stop)
        else:
            assert so_far.startswith(shown)
            held = so_far[len(shown) :]
            assert held == "" or any(held != s and s.startswith(held) for s in stop)


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["aa", "ab!"], ["aab"], ["", "a", ""]),  # the match begins within what was held back
        (["x\n", "\nUs", "er: y"], ["\n\nUser:"], ["x", "", "", ""]),
        (["x\n", "\nUs", "ed"], ["\n\nUser:"], ["x", "", "\n\nUsed", ""]),
        (["x\n\nUse"], ["\n\nUser:"], ["x", "\n\nUse"]),
        (["xabc", "d"], ["bc", "abcd"], ["x", "", ""]),  # the longer begins first
        (["xabc", "e"], ["bc", "abcd"], ["x", "a", ""]),
        (["xabc"], ["bc", "abcd"], ["x", "a"]),
        (["xab", "c"], ["abc", "ab"], ["x", "", ""]),  # both begin here
        (["one ", "two"], [], ["one ", "two", ""]),
    ],
)
def test_stop_strings_may_cross_tokens_and_begin_alike(pieces, stop, expected):
    assert streamed([piece.encode() for piece in pieces], stop)[0] == expected


def test_the_shorter_of_two_stop_strings_does_not_wait_for_the_longer():
    stream = TextStream([b"xab", b"y"], ["abc", "ab"])
    assert stream.push(0) == "x" and stream.stopped
    assert stream.push(1) == "" and stream.finish() == ""


def test_characters_appear_whole_however_their_bytes_are_cut():
    text = "é日本🌹👩\u200d🚀"
    shown, _ = streamed([bytes([byte]) for byte in text.encode()], [])
    assert [piece for piece in shown if piece] == list(text)


def test_a_stop_string_is_found_across_cuts_within_its_characters():
    raw = "go 日本🌹 on".encode()
    for a in range(len(raw)):
        for b in range(a, len(raw)):
            shown, stream = streamed([raw[:a], raw[a:b], raw[b:]], ["本🌹"])
            assert "".join(shown) == "go 日" and stream.stopped


def test_an_unfinished_character_appears_at_the_end_as_a_replacement():
    assert streamed([b"a", "🌹".encode()[:3]], [])[0] == ["a", "", "\ufffd"]
    assert streamed(["🌹".encode()[:3], b"a"], [])[0] == ["", "\ufffda", ""]
    assert streamed([b"a", "é".encode()[:1]], ["a\ufffd"])[0] == ["", "", ""]


def test_special_tokens_and_ids_beyond_the_table_show_nothing():
    stream = TextStream(TOKENIZER.token_bytes)
    ids = [NUMBER[USER], *TOKENIZER.encode("a 🌹"), TOKENIZER.size + 7, TOKENIZER.eos]
    assert "".join(map(stream.push, ids)) == "a 🌹" and stream.finish() == ""


@pytest.mark.parametrize("stop", [["a", ""], "END"])
def test_stop_strings_that_cannot_be_meant_are_refused(stop):
    with pytest.raises(ValueError, match=r"stop: expected a list of strings, none of them empty, got .*(''|END)"):
        TextStream([b"a"], stop)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_prompt_begins_with_bos_and_stays_open():
    assert prompt_ids(TOKENIZER, "the ferry") == [NUMBER[BOS], *TOKENIZER.encode("the ferry")]
    assert prompt_ids(TOKENIZER, "") == [NUMBER[BOS]]


def test_a_conversation_has_the_layout_of_the_released_templates():
    e = TOKENIZER.encode
    messages = [said("system", "be brief"), said("user", "who?"), said("assistant", "me"), said("user", "no, who?")]
    asked = [NUMBER[USER], *e("who?"), NUMBER[ASSISTANT], *e("me"), NUMBER[EOS]]
    again = [NUMBER[USER], *e("no, who?"), NUMBER[ASSISTANT]]
    assert chat_ids(TOKENIZER, messages) == [NUMBER[BOS], *e("be brief"), *asked, *again]
    assert chat_ids(TOKENIZER, messages[:3]) == [NUMBER[BOS], *e("be brief"), *asked]  # answered: nothing more to say
    assert chat_ids(TOKENIZER, messages[3:]) == [NUMBER[BOS], *again]


def test_system_texts_come_first_with_a_blank_line_between_them():
    messages = [said("user", "who?"), said("system", "be brief"), said("user", "say"), said("system", "be kind")]
    e = TOKENIZER.encode
    turns = [NUMBER[USER], *e("who?"), NUMBER[USER], *e("say"), NUMBER[ASSISTANT]]
    assert chat_ids(TOKENIZER, messages) == [NUMBER[BOS], *e("be brief\n\nbe kind"), *turns]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"expected a message of the user's, got none"),
        ([said("system", "be brief")], r"expected a message of the user's, got none"),
        ([said("assistant", "me"), said("user", "who?")], "got one at the beginning"),
        ([said("system", "be brief"), said("assistant", "me")], "got one at the beginning"),
        ([said("user", "who?"), said("assistant", "me"), said("assistant", "I")], "got two in a row"),
        ([said("user", "who?"), said("tool", "me")], r"messages\[1\]: expected a role of system, user, assistant, got 'tool'"),
        ([{"role": "user"}], r"messages\[0\]: expected the keys role and content, got \['role'\]"),
        ([{**said("user", "x"), "name": "I"}], r"expected the keys role and content, got \['content', 'name', 'role'\]"),
        ([{"role": "user", "content": None}], r"messages\[0\]: expected content to be a string, got NoneType"),
    ],
)
def test_conversations_without_sense_are_refused(messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        chat_ids(TOKENIZER, messages)
    assert "\n" not in str(caught.value)


def write_folder(folder, tokenizer_json: str, **others):
    """A released model's folder; `others` by the first part of their names."""
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, content in others.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def plain_marks(tokenizer_json: str, special: tuple[str, ...]) -> str:
    """Lists the added tokens other than `special` as text, as released files do with some of theirs."""
    content = json.loads(tokenizer_json)
    for token in content["added_tokens"]:
        token["special"] = token["content"] in special
    return json.dumps(content)


# A relative that calls BOS and EOS by other names.
RELATIVE = plain_marks(TOKENIZER.backend.to_str().replace(BOS, "[BOS]").replace(EOS, "<|endoftext|>"), special=())


def test_marks_that_a_released_file_lists_as_plain_added_text_are_marks_nevertheless(tmp_path):
    released = plain_marks(TOKENIZER.backend.to_str(), special=(BOS, EOS))
    tokenizer = folder_tokenizer(write_folder(tmp_path, released), VOCAB_SIZE)
    text = f"is {USER} a mark, {ASSISTANT} and {EOS} too?"
    ids = chat_ids(tokenizer, [said("system", text), said("user", text)])
    assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [NUMBER[BOS], NUMBER[USER], NUMBER[ASSISTANT]]
    assert tokenizer.decode(ids) == text + text


def test_a_tokenizer_without_marks_of_turns_makes_prompts_but_no_conversations(tmp_path):
    folder = write_folder(tmp_path, TOKENIZER.backend.to_str().replace(USER, "User:"))
    tokenizer = folder_tokenizer(folder, VOCAB_SIZE)
    assert prompt_ids(tokenizer, "who?") == prompt_ids(TOKENIZER, "who?")
    with pytest.raises(ValueError, match=f"tokenizer: expected {USER} and {ASSISTANT} among its tokens") as caught:
        chat_ids(tokenizer, [said("user", "who?")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "others",
    [
        {"tokenizer_config": {"bos_token": "[BOS]", "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}}},
        {"config": {"bos_token_id": 0, "eos_token_id": 1}},
        {"config": {"bos_token_id": 0, "eos_token_id": [1, 7, 6]}},
        {"tokenizer_config": {"bos_token": "[BOS]", "eos_token": None}, "config": {"bos_token_id": 5, "eos_token_id": 1}},
    ],
)
def test_a_relative_names_or_numbers_its_own_bos_and_eos(tmp_path, others):
    tokenizer = folder_tokenizer(write_folder(tmp_path, RELATIVE, **others), VOCAB_SIZE)
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.token_bytes[0] == tokenizer.token_bytes[1] == b""
    assert min(tokenizer.encode("[BOS] <|endoftext|>")) >= len(SPECIAL_TOKENS)  # quoted, they are text


def test_a_folder_that_names_nothing_has_deepseeks_bos_and_eos(tmp_path):
    folder = write_folder(tmp_path, TOKENIZER.backend.to_str(), config={"vocab_size": VOCAB_SIZE})
    tokenizer = folder_tokenizer(folder, VOCAB_SIZE)
    assert (tokenizer.bos, tokenizer.eos) == (NUMBER[BOS], NUMBER[EOS])
    assert chat_ids(tokenizer, [said("user", "who?")]) == chat_ids(TOKENIZER, [said("user", "who?")])


def test_bos_and_eos_can_be_given_by_name_or_by_id(tmp_path):
    path = write_folder(tmp_path, RELATIVE) / "tokenizer.json"
    for bos, eos in (("[BOS]", "<|endoftext|>"), (0, 1), ("[BOS]", 1)):
        tokenizer = load_tokenizer(path, VOCAB_SIZE, bos=bos, eos=eos)
        assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    for bos in (VOCAB_SIZE, -1, 10**30, "[BOS", BOS):
        with pytest.raises(ValueError, match="tokenizer.json has no token ") as caught:
            load_tokenizer(path, VOCAB_SIZE, bos=bos, eos=1)
        assert str(bos) in str(caught.value)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert folder_tokenizer(tmp_path, VOCAB_SIZE) is None


@pytest.mark.parametrize(
    ("tokenizer_json", "others", "message"),
    [
        ("{", {}, r"/tokenizer.json is not a tokenizer.json: "),
        (RELATIVE, {}, f"/tokenizer.json has no token {BOS}"),
        (RELATIVE, {"config": {"bos_token_id": 0, "eos_token_id": 100000}}, r"/tokenizer.json has no token 100000"),
        (RELATIVE, {"tokenizer_config": "{"}, r"/tokenizer_config.json is not JSON: "),
        (RELATIVE, {"tokenizer_config": "[]"}, r"/tokenizer_config.json: expected an object, got list"),
        (RELATIVE, {"tokenizer_config": {"bos_token": 0}}, r"/tokenizer_config.json: expected bos_token to name .*, got 0"),
        (RELATIVE, {"tokenizer_config": {"bos_token": {"x": 0}}}, r"expected bos_token to name a token, got \{'x': 0\}"),
        (RELATIVE, {"config": {"bos_token_id": "0"}}, r"/config.json: expected bos_token_id to be a token's id .*, got '0'"),
        (RELATIVE, {"config": {"bos_token_id": 0, "eos_token_id": []}}, r"expected eos_token_id to be .*, got \[\]"),
        (RELATIVE, {"config": {"bos_token_id": True}}, r"expected bos_token_id to be a token's id .*, got True"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, tokenizer_json, others, message):
    with pytest.raises(ValueError, match=message) as caught:
        folder_tokenizer(write_folder(tmp_path, tokenizer_json, **others), VOCAB_SIZE)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="but vocab_size is 300; set vocab_size="):
        folder_tokenizer(write_folder(tmp_path, TOKENIZER.backend.to_str(), tokenizer_config={}, config={}), 300)
