"""Log-probabilities against one sequence at a time, in float64; borders between context and continuation; batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.evaluation.logprob import Request, bucket, cut, encode_pair, n_read, plan, scored, token_logprobs
from dsv3_jax.inference import score as scoring
from dsv3_jax.inference.score import Streamed
from oracles.talkative import ANSWER, VOCABULARY, byte_tokenizer, reference_logprobs

TOKENIZER = byte_tokenizer()


def alone(request):
    """(nats, greedy) of one request by itself."""
    ids = list(request.tokens)
    logprobs_TV = reference_logprobs(ids[:-1])
    places, targets = np.arange(len(ids) - 1)[-request.n_scored :], np.array(ids[1:])[-request.n_scored :]
    return logprobs_TV[places, targets].sum(), bool((logprobs_TV[places].argmax(axis=-1) == targets).all())


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    random = [
        Request(tuple(rng.integers(0, VOCABULARY, n).tolist()), scored) for n, scored in ((2, 1), (9, 3), (17, 16), (20, 4))
    ]
    known = Request((TOKENIZER.bos, *TOKENIZER.encode("a" + ANSWER)), len(TOKENIZER.encode(ANSWER)))
    return [*random, known]


def test_sums_and_greedy_are_those_of_each_sequence_alone(subject, requests):
    found = {}
    for batch in scored(subject.supply, requests, batch_tokens=64):
        found |= batch
    assert sorted(found) == [0, 1, 2, 3, 4]
    for i, request in enumerate(requests):
        nats, greedy = alone(request)
        # float32 logits of some 10, summed over up to 16 tokens
        assert found[i].logprob == pytest.approx(nats, abs=1e-4), i
        assert found[i].greedy == greedy
    assert found[4].greedy and not found[2].greedy


def test_neither_padding_nor_neighbours_change_a_number(subject, requests):
    """Shapes as above, so that nothing more is compiled."""

    def of(index, given, lengths):
        found = next(batch for batch in scored(subject.supply, given, 64, lengths=lengths) if index in batch)
        return found[index].logprob

    first, *others = requests[1], requests[0], requests[4], requests[2]
    wanted = of(0, [first, *others[:2]], [16] * 3)
    assert wanted == pytest.approx(alone(first)[0], abs=1e-4)
    # float32's rounding: longer rows are summed in another order
    assert of(3, [requests[0]] * 3 + [first], [16] * 4) == pytest.approx(wanted, abs=2e-5)
    assert of(0, [first, others[2]], [32, 32]) == pytest.approx(wanted, abs=2e-5)


def test_the_vocabulary_in_pieces_is_the_vocabulary(subject, requests, monkeypatch):
    ids = np.array(requests[3].tokens[:17], np.int32)
    tokens, targets = np.tile(ids[:-1], (4, 1)), np.tile(ids[1:], (4, 1))
    whole, greedy = token_logprobs(subject.supply, tokens, targets)
    best = np.tile(reference_logprobs(ids[:-1].tolist()).argmax(axis=-1).astype(np.int32), (4, 1))
    monkeypatch.setattr(scoring, "HEAD_ELEMENTS", 32 * 100)  # three pieces
    assert len(list(subject.supply.head())) == 3
    pieces, greedy_too = token_logprobs(subject.supply, tokens, targets)
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    np.testing.assert_array_equal(greedy, greedy_too)
    assert token_logprobs(subject.supply, tokens, best)[1].all() and (best >= 100).any()


def test_layers_from_disk_give_the_same_bits(subject, requests):
    streamed = Streamed(subject.source.tensors, subject.source.config, "float32")
    ids = np.array(requests[3].tokens[:17], np.int32)
    tokens, targets = np.tile(ids[:-1], (4, 1)), np.tile(ids[1:], (4, 1))
    for a, b in zip(token_logprobs(subject.supply, tokens, targets), token_logprobs(streamed, tokens, targets), strict=True):
        np.testing.assert_array_equal(a, b)


def test_white_space_that_ends_the_context_goes_to_the_continuation():
    def texts(context, continuation):
        left, right = encode_pair(TOKENIZER, context, continuation)
        assert left[0] == TOKENIZER.bos
        return TOKENIZER.decode(left[1:]), TOKENIZER.decode(right)

    assert texts("ab", " c") == ("ab", " c")
    assert texts("ab ", "c") == ("ab", " c")
    assert texts("ab \n", "c") == ("ab", " \nc")
    assert texts("", "c") == ("", "c") and texts("  ", "c") == ("", "  c")
    with pytest.raises(ValueError, match="at least one token"):
        encode_pair(TOKENIZER, "", "")


def test_a_token_across_the_border_leaves_one_to_the_continuation():
    merging = train_tokenizer(["ab"] * 9, VOCABULARY + 1)
    ab, a = (merging.encode(text) for text in ("ab", "a"))
    assert len(ab) == 1 and ab != a
    assert encode_pair(merging, "a", "b") == ([merging.bos], ab)
    assert encode_pair(merging, "aa", "b") == ([merging.bos, *a], ab)


def test_the_context_is_cut_from_the_left():
    assert cut([1, 2, 3], [4, 5], 4) == (Request((1, 2, 3, 4, 5), 2), 0)
    assert cut([1, 2, 3], [4, 5], 3) == (Request((2, 3, 4, 5), 2), 1)
    assert cut([1, 2, 3], [4, 5], 2) == (Request((3, 4, 5), 2), 2)
    with pytest.raises(ValueError, match="2 tokens does not fit the window of 1"):
        cut([1, 2, 3], [4, 5], 1)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 2000))
def test_every_request_is_in_one_batch_that_has_room_for_it(lengths, batch_tokens):
    batches = plan(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch.members) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch.members) <= batch.rows and (batch.rows == 1 or batch.rows * batch.length <= batch_tokens)
        assert all(lengths[i] <= batch.length and (batch.length < 2 * lengths[i] or batch.length == 16) for i in batch.members)
    assert len({(b.rows, b.length) for b in batches}) == len({b.length for b in batches})  # one shape a bucket


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    assert n_read(Request((1, 2, 3), 1)) == 2


def test_batches_that_nobody_wants_are_not_run(subject, requests, monkeypatch):
    found = list(scored(subject.supply, requests, 64, wanted=lambda index: index == 0))
    assert [sorted(batch) for batch in found] == [[0, 1, 2, 4]]
    monkeypatch.setattr(scoring, "run_layer", None)
    assert list(scored(subject.supply, requests, 64, wanted=lambda index: False)) == []
