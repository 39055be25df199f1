"""Replies as text: shown while they come, whole characters only, cut at stop strings."""

import pytest

from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.inference import talk
from dsv3_jax.inference.generate import Generated, Statistics
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.talk import Speaker, end_ids, reply, summary
from oracles.decoding import tiny

TOKENIZER = train_tokenizer(["a"], 266)  # special tokens and bytes
STATISTICS = Statistics(
    prompt_tokens=3, new_tokens=9, steps=4, drafts=8, accepted=3, close=0, prefill_seconds=0.5, decode_seconds=2.0,
    timed_tokens=7, host_seconds=0.1,
)  # fmt: skip


@pytest.fixture
def speak(monkeypatch):
    """`reply` to prompts whose continuations are given as texts, heard three tokens at a time: (reply, what was shown)."""

    def speaking(texts, *, end=True, **options):
        numbers = [TOKENIZER.encode(text) + [TOKENIZER.eos] * end for text in texts]
        shown, asked = [], {}

        def faked(model, config, prompts, *, on_tokens, **others):
            asked.update(others)
            heard, going = [[] for _ in numbers], set(range(len(numbers)))
            for start in range(0, max(map(len, numbers)), 3):
                for i in sorted(going):
                    new = numbers[i][start : start + 3]
                    heard[i] += new
                    if not new or on_tokens(i, new):
                        going.remove(i)
            return Generated(heard, STATISTICS)

        monkeypatch.setattr(talk, "generate", faked)
        speaker = Speaker(tiny().model, tiny().config, TOKENIZER, (TOKENIZER.eos,))
        got = reply(speaker, [[0]] * len(texts), max_new_tokens=50, show=lambda i, text: shown.append((i, text)), **options)
        return got, shown, asked

    return speaking


def test_the_text_is_shown_while_it_comes_and_never_half_a_character(speak):
    text = "né 🌹日本🌹."
    got, shown, _ = speak([text])
    assert got.texts == [text] and "".join(t for _, t in shown) == text
    assert len(shown) > 3 and all(t and "\ufffd" not in t for _, t in shown)
    assert got.tokens == [[*TOKENIZER.encode(text), TOKENIZER.eos]] and got.statistics is STATISTICS


def test_several_texts_come_side_by_side(speak):
    got, shown, _ = speak(["abcdef", "日本", "x"])
    assert got.texts == ["abcdef", "日本", "x"]
    assert list(dict.fromkeys(i for i, _ in shown)) == [0, 1, 2]


def test_a_stop_string_ends_its_text_and_is_not_shown(speak):
    got, shown, _ = speak(["one\nUser: two\nUser: three", "no mark here"], stop=["\nUser:", "##"])
    assert got.texts == ["one", "no mark here"]
    assert "".join(t for i, t in shown if i == 0) == "one"
    assert len(got.tokens[0]) < len("one\nUser: two\n")  # nothing was computed for long after it


def test_what_waited_for_a_stop_string_or_a_character_is_shown_at_the_end(speak):
    got, shown, _ = speak(["abc#"], stop=["##"])
    assert got.texts == ["abc#"] and shown[-1] == (0, "#")


def test_options_reach_the_generator(speak):
    sampling = Sampling(0.7, seed=3)
    _, _, asked = speak(["a"], sampling=sampling, speculative=True)
    assert asked == {"max_new_tokens": 50, "sampling": sampling, "end_ids": (TOKENIZER.eos,), "speculative": True}


def test_an_empty_stop_string_is_refused(speak):
    with pytest.raises(ValueError, match="^stop: expected a list of strings, none of them empty"):
        speak(["a"], stop=["x", ""])


@pytest.mark.parametrize(
    ("config_json", "more"), [(None, []), ({}, []), ({"eos_token_id": 7}, [7]), ({"eos_token_id": [7, 9, 1]}, [7, 9]),
                              ({"eos_token_id": None}, []), ({"eos_token_id": True}, [])],
)  # fmt: skip
def test_ends_are_the_tokenizers_and_those_of_config_json(config_json, more):
    assert end_ids(TOKENIZER, config_json) == tuple(sorted({TOKENIZER.eos, *more}))


def test_an_end_token_that_stands_for_text_is_not_shown(speak):
    """config.json may name any token as an end."""
    assert speak(["abcZ"], end=False)[0].texts == ["abcZ"]  # not an end here
    model = Speaker(tiny().model, tiny().config, TOKENIZER, (TOKENIZER.eos, *TOKENIZER.encode("Z")))
    assert reply(model, [[0]], max_new_tokens=50).texts == ["abc"]


def test_the_summary_says_speed_acceptance_and_close_calls():
    line = summary(STATISTICS)
    assert "\n" not in line
    assert "3 tokens in 0.50 s" in line and "9 new ones" in line
    assert "38% of the drafts accepted, 1.75 tokens a step" in line and "logit" not in line
    line = summary(STATISTICS._replace(drafts=0, accepted=0, close=2, decode_seconds=0.0, timed_tokens=0))
    assert "draft" not in line and "2 chosen by less than 1e-4 of a logit" in line
