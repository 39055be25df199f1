"""Whole continuations: with drafts and without, side by side, cut where they end, and compiled once."""

import functools

import jax
import numpy as np
import pytest

from dsv3_jax.inference import generate as generation
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.inference.speculative import CLOSE
from oracles import numpy_model
from oracles.cases import CASES, load_case
from oracles.chi_square import rejected
from oracles.decoding import END, predictable, reference_logits, reference_speculation, served, tiny

PROMPTS = [[1, 2, 3], [1, 4, 5, 2, 7, 3, 3], [5, 4, 3, 2]]
NEW = 24
CHAIN = 2  # modules of a chain
SURE, UNSURE = 0.1, 0.85  # how much the model's blocks interfere with the successor that everyone knows
DRAWN = Sampling(temperature=3.0, seed=5)


def run(model, prompts=PROMPTS, *, depths=None, max_new_tokens=NEW, steps=3, chunk=4, **options):
    """`depths` modules draft; None: no drafts."""
    serving = model.model if depths is None else model.model._replace(depths=model.model.depths[:depths])
    return generate(
        serving, model.config, prompts, max_new_tokens=max_new_tokens, speculative=depths is not None, steps=steps,
        chunk=chunk, end_ids=(END,), **options,
    )  # fmt: skip


@functools.cache
def plain(noise):
    """Three tokens more than others ask for."""
    return run(predictable(noise), max_new_tokens=NEW + 3)


def cut(tokens, n):
    return [row[:n] for row in tokens]


def margins(logits):
    top = np.sort(logits, axis=-1)
    return top[:, -1] - top[:, -2]


def test_greedy_tokens_are_the_largest_logits_of_the_plain_forward_pass():
    model = predictable(UNSURE)
    for prompt, new in zip(PROMPTS, plain(UNSURE).tokens, strict=True):
        logits = reference_logits(model, prompt + new)[len(prompt) - 1 : -1]
        assert margins(logits).min() > 1e-4  # else rounding could decide
        assert logits.argmax(axis=-1).tolist() == new
    statistics = plain(UNSURE).statistics
    assert (statistics.prompt_tokens, statistics.new_tokens) == (14, 3 * (NEW + 3))
    assert (statistics.steps, statistics.drafts, statistics.close) == (3 * (NEW + 2), 0, 0)
    assert statistics.acceptance == 0 and statistics.tokens_per_step == 1


@pytest.mark.parametrize("noise", [SURE, UNSURE])
@pytest.mark.parametrize("depths", [CHAIN, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 3))])
def test_drafts_change_no_greedy_token_and_are_accepted_as_often_as_the_reference_says(noise, depths):
    model, expected = predictable(noise), plain(noise).tokens
    got = run(model, depths=depths)
    assert got.tokens == cut(expected, NEW)
    statistics = got.statistics
    each = [
        reference_speculation(model, p + new[: NEW + depths], len(p), NEW, depths)
        for p, new in zip(PROMPTS, expected, strict=True)
    ]
    assert statistics.steps == sum(s.steps for s in each) and statistics.accepted == sum(s.accepted for s in each)
    assert statistics.drafts == depths * statistics.steps
    assert statistics.acceptance == statistics.accepted / statistics.drafts
    assert statistics.tokens_per_step == 1 + statistics.accepted / statistics.steps
    assert statistics.acceptance > 0.95 if noise == SURE else 0.3 < statistics.acceptance < 0.9


@pytest.mark.slow
def test_a_prompt_shorter_than_the_chain_of_modules_is_drafted_for_by_fewer():
    prompts = [[1], [4, 2], [3, 3, 3]]
    got = run(predictable(SURE), prompts, depths=3)
    assert got.tokens == run(predictable(SURE), prompts).tokens
    assert got.statistics.drafts == got.statistics.steps  # one each


@pytest.mark.parametrize("depths", [None, CHAIN])
def test_max_new_tokens_is_exact_wherever_it_cuts_a_step(depths):
    for n in range(1, 11):
        got = run(predictable(SURE), max_new_tokens=n, depths=depths)
        assert got.tokens == cut(plain(SURE).tokens, n)
        assert got.statistics.new_tokens == 3 * n


def test_an_end_token_ends_its_sequence_wherever_it_lies_in_a_step():
    """The successors go round, so it comes after other numbers of tokens in each sequence."""
    model, lengths = predictable(SURE, ends=True), set()
    for first in range(0, END, 3):
        prompts = [[2, first], [3, 1, first + 1], [first, 5, 5, first + 2]]
        for prompt, new in zip(prompts, run(model, prompts, depths=CHAIN).tokens, strict=True):
            logits = reference_logits(model, prompt + new)[len(prompt) - 1 : -1]
            assert logits.argmax(axis=-1).tolist() == new and (new.index(END) if END in new else NEW - 1) == len(new) - 1
            lengths.add(len(new))
    assert lengths >= {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("depths", [None, CHAIN])
def test_what_is_heard_is_what_is_returned_and_who_listens_may_end_a_sequence(depths):
    heard = {0: [], 1: [], 2: []}

    def listen(sequence, tokens):
        assert tokens
        heard[sequence] += tokens
        return sequence == 1 and len(heard[1]) >= 4 or sequence == 2

    got = run(predictable(UNSURE), depths=depths, on_tokens=listen)
    expected = plain(UNSURE).tokens
    assert got.tokens == list(heard.values())
    assert got.tokens[0] == expected[0][:NEW] and got.tokens[2] == expected[2][:1]
    # the host looks every three steps
    assert 4 <= len(got.tokens[1]) <= 4 + 3 * (1 + (depths or 0)) and got.tokens[1] == expected[1][: len(got.tokens[1])]


@pytest.mark.slow
@pytest.mark.parametrize("depths", [None, 1])
def test_a_drawn_sequence_depends_neither_on_its_neighbours_nor_on_steps_or_chunks(depths):
    model = predictable(UNSURE)
    first = run(model, depths=depths, sampling=DRAWN)
    others = run(model, [PROMPTS[0], [9, 9, 8, 7, 1], [2] * 7], depths=depths, sampling=DRAWN)
    assert others.tokens[0] == first.tokens[0] and others.tokens[1] != first.tokens[1]
    assert run(model, depths=depths, sampling=DRAWN, steps=5).tokens == first.tokens
    if depths is None:
        assert run(model, sampling=DRAWN, chunk=16).tokens == first.tokens


@pytest.mark.slow
@pytest.mark.parametrize("depths", [None, 1])
def test_seeds_repeat_a_continuation_and_differ_from_each_other(depths):
    model, prompts = predictable(UNSURE), [PROMPTS[0]] * 3
    one, again, other = (run(model, prompts, depths=depths, sampling=DRAWN._replace(seed=s)).tokens for s in (5, 5, 6))
    assert one == again and all(a != b for a, b in zip(one, other, strict=True))
    assert one[0] != one[1] != one[2]  # each sequence draws for itself


@pytest.mark.parametrize("depths", [None, CHAIN])
def test_close_calls_are_counted_where_two_logits_tie(depths):
    """Two tokens' rows of the head are made equal: wherever the lower one is chosen, it was by no margin at all."""
    sound = predictable(SURE)
    low, high = sorted(plain(SURE).tokens[0][2:4])
    head = sound.tensors["lm_head.weight"].copy()
    head[high] = head[low]
    model = served(sound.released, sound.tensors | {"lm_head.weight": head})
    got = run(model, depths=depths)
    expected = 0
    for prompt, new in zip(PROMPTS, got.tokens, strict=True):
        logits = reference_logits(model, prompt + new)[len(prompt) - 1 : -1]
        expected += int((margins(logits) < CLOSE).sum())
        assert high not in new
    assert got.statistics.close == expected > 0
    for n in (1, 2, 3, 4, 5, 6):  # none that lie beyond the last token
        part = run(model, depths=depths, max_new_tokens=n)
        close = sum((np.array(row) == low).sum() for row in part.tokens)
        assert part.statistics.close == close


@pytest.fixture
def compilations():
    """What is traced or compiled during a test, in a list that grows."""
    events = []

    def listen(event, seconds, **_):
        if event.endswith(("jaxpr_trace_duration", "backend_compile_duration")):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("depths", [None, CHAIN])
def test_nothing_is_compiled_for_other_prompts_lengths_seeds_and_numbers_of_tokens(depths, compilations):
    model = predictable(UNSURE)
    run(model, depths=depths)
    known, traces = len(compilations), generation._compiled_steps(model.config, GREEDY, (END,), 3, depths or 0).traces
    run(model, [[3, 1], [7, 7, 7, 7, 7, 7, 7], [5, 6, 7, 8, 9]], depths=depths, max_new_tokens=90, sampling=Sampling(seed=9))
    assert len(compilations) == known
    assert generation._compiled_steps(model.config, GREEDY, (END,), 3, depths or 0).traces == traces >= 1


@pytest.mark.slow
def test_nothing_is_compiled_while_sequences_grow(compilations):
    """From a short view of the cache to a long one."""
    model, prompt, marks = tiny(), [3, 1, 4, 1, 5] * 24, []
    got = run(model, [prompt, prompt[:9]], max_new_tokens=90, on_tokens=lambda *_: bool(marks.append(len(compilations))))
    assert 128 < len(prompt) + len(got.tokens[0])  # rows of the smallest view
    assert compilations and marks[3] == marks[-1]  # two are heard after the prompts, two after the first steps


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: expected at least one token in each, got none"),
        ([[1], []], {}, "prompts: expected at least one token in each, got an empty one"),
        ([[1, 13]], {}, r"prompts: expected ids of 0\.\.12, got 13"),
        ([[-1]], {}, r"prompts: expected ids of 0\.\.12, got -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ([[1]], {"depths": 0}, "speculative: this model has no MTP module to draft with; leave it out"),
        ([[1]], {"sampling": Sampling(top_p=0.0)}, "top_p: expected .*, got 0.0"),
    ],
)
def test_what_cannot_be_continued_is_said_in_one_line(prompts, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        run(predictable(SURE), prompts, **options)


# Slow --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stored_cases_continue_as_stored(name):
    case = load_case(name)
    ids, expected = case.expected["input_ids"].tolist(), case.expected["decode_ids"].tolist()
    model = served(case.config, case.tensors)
    assert run(model, ids, max_new_tokens=16, chunk=13).tokens == expected
    if model.config.num_nextn_predict_layers:
        got = run(model, ids, max_new_tokens=16, chunk=13, depths=1)
        assert got.tokens == expected and got.statistics.drafts > 0


@pytest.mark.slow
@pytest.mark.parametrize("depths", [None, 2])
def test_drawn_continuations_are_distributed_as_the_model(depths):
    """Three tokens of a vocabulary of four, all 64 outcomes, against the reference's probabilities. With random modules the
    drafts are bad, so most of what comes out was drawn in their place."""
    model, prompt = tiny(vocab_size=4, num_nextn_predict_layers=2), [1, 3, 2]
    temperature = 1.7
    probabilities = np.ones((4, 4, 4))
    for a in range(4):
        for b in range(4):
            logits = reference_logits(model, [*prompt, a, b])[-3:] / temperature
            p = numpy_model.softmax(logits)
            probabilities[a, b] = p[0, a] * p[1, b] * p[2]
    counts, accepted = np.zeros((4, 4, 4)), 0
    for seed in range(400):
        got = run(model, [prompt] * 8, depths=depths, max_new_tokens=3, sampling=Sampling(temperature, seed=seed))
        accepted += got.statistics.accepted
        for a, b, c in got.tokens:
            counts[a, b, c] += 1
    likely = probabilities.ravel() * counts.sum() >= 5
    grouped = [np.append(v.ravel()[likely], v.ravel()[~likely].sum()) for v in (counts, probabilities)]
    grouped = [v[:-1] if grouped[1][-1] * counts.sum() < 5 else v for v in grouped]
    assert not rejected(*grouped)
    assert rejected(grouped[0], np.ones_like(grouped[1]) / len(grouped[1]))
    assert depths is None or accepted > 400
