"""Drafts are accepted so that nobody can tell: the same greedy tokens, the same distribution of drawn ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference import generate as generation
from dsv3_jax.inference import speculative
from dsv3_jax.inference.decode import padded
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.inference.speculative import CLOSE, Drafting, close_calls, speculative_step, verify
from oracles import numpy_model
from oracles.chi_square import rejected
from oracles.decoding import predictable

N = 20_000
RNG = np.random.default_rng(3)
# Of 4 tokens: the model's logits for the first token, for the second after each first one, for the third after each second one;
# and what the drafts were drawn from. Token 3 is never drafted first, and token 0 is drafted too often.
P = [RNG.normal(0, 1, (4, 4)) for _ in range(3)]
Q = [np.array([[2.5, 0.0, 0.3, -np.inf]] * 4), P[1] + RNG.normal(0, 1.0, (4, 4))]
HALF = Sampling(1.0)


@functools.cache
def drafted_and_verified(sampling=HALF, depth=2):
    """Tokens [N, depth + 1] and how many of them count: N sequences of one start, drafts drawn with NumPy."""
    rng, before = np.random.default_rng(4), np.zeros(N, int)
    drafts, scores, logits = [], [], []
    for i in range(depth + 1):
        logits.append(P[i][before])
        if i < depth:
            q_NV = Q[i][before]
            noise = rng.gumbel(size=q_NV.shape)
            before = (q_NV + noise).argmax(axis=1)
            drafts.append(before)
            scores.append(q_NV)
    drafting = Drafting(jnp.asarray(np.stack(drafts, 1), jnp.int32), jnp.asarray(np.stack(scores, 1), jnp.float32), ())
    logits_BTV = jnp.asarray(np.stack(logits, 1), jnp.float32)
    run = jax.jit(lambda *args: verify(*args, jnp.uint32(7), sampling))
    verified = run(logits_BTV, drafting, jnp.zeros(N, jnp.int32))
    return np.asarray(verified.tokens_BT), np.asarray(verified.count_B), np.stack(drafts, 1)


def softmax(logits, keep=4):
    least = np.sort(logits, axis=-1)[..., -keep, None]
    return numpy_model.softmax(np.where(logits >= least, logits, -np.inf))


def first_is_wrong(tokens, keep=4):
    return rejected(np.bincount(tokens[:, 0], minlength=4), softmax(P[0][0], keep))


def second_is_wrong(tokens, count):
    """Given the first token, where there is a second one."""
    rows = tokens[count > 1]
    return any(rejected(np.bincount(rows[rows[:, 0] == t, 1], minlength=4), softmax(P[1][t])) for t in set(rows[:, 0]))


def third_is_wrong(tokens, count):
    rows = tokens[count > 2]
    return any(rejected(np.bincount(rows[rows[:, 1] == t, 2], minlength=4), softmax(P[2][t])) for t in set(rows[:, 1]))


def test_what_comes_out_is_distributed_as_the_model():
    tokens, count, _ = drafted_and_verified()
    assert 0.3 < np.mean(count - 1) / 2 < 0.9 and set(count) == {1, 2, 3}  # some are accepted, some are not
    assert not first_is_wrong(tokens) and not second_is_wrong(tokens, count) and not third_is_wrong(tokens, count)


def test_a_draft_is_accepted_as_often_as_the_distributions_overlap():
    """sum min(p, q) of the first one."""
    _, count, _ = drafted_and_verified()
    overlap = np.minimum(softmax(P[0][0]), numpy_model.softmax(Q[0][0])).sum()
    assert not rejected(np.bincount((count > 1).astype(int), minlength=2), np.array([1 - overlap, overlap]))


def test_accepted_drafts_come_out_and_the_first_rejected_one_does_not():
    tokens, count, drafts = drafted_and_verified()
    for i in range(2):
        assert (tokens[count > i + 1, i] == drafts[count > i + 1, i]).all()
    # Drawn from what p has more than q: the rejected token itself has less.
    assert (tokens[count == 1, 0] != drafts[count == 1, 0]).all()


def test_the_models_filters_hold_for_drafts_too():
    """Top-2: drafts come from the unfiltered q, what comes out does not."""
    tokens, count, drafts = drafted_and_verified(Sampling(1.0, top_k=2), depth=1)
    allowed = set(np.argsort(P[0][0])[-2:].tolist())
    assert not set(drafts[:, 0].tolist()) <= allowed and set(tokens[:, 0].tolist()) == allowed
    assert not first_is_wrong(tokens, keep=2)


def altered(change):
    """`_rejection`, its result changed by `change(accepted, replacement, logits)`."""
    sound = speculative._rejection

    def faulty(logits_BTV, drafting, position_B, seed, sampling):
        accepted, replacement = sound(logits_BTV, drafting, position_B, seed, sampling)
        return change(accepted, replacement, logits_BTV)

    return faulty


def drawn_from_p(accepted, replacement, logits_BTV):
    keys = jax.random.split(jax.random.key(11), logits_BTV.shape[0])
    return accepted, jax.vmap(jax.random.categorical)(keys, logits_BTV).astype(jnp.int32)


FAULTS = {
    "every draft accepted": lambda accepted, replacement, logits: (jnp.ones_like(accepted), replacement),
    "no draft accepted": lambda accepted, replacement, logits: (jnp.zeros_like(accepted), replacement),
    "replacements drawn from p": drawn_from_p,
    "greedy replacements": lambda a, r, logits: (a, jnp.argmax(logits, axis=-1).astype(jnp.int32)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sampler_is_rejected_by_the_same_test(fault, monkeypatch):
    monkeypatch.setattr(speculative, "_rejection", altered(FAULTS[fault]))
    tokens, _, _ = drafted_and_verified.__wrapped__()
    assert first_is_wrong(tokens)


def test_coins_differ_between_seeds_and_are_repeated_with_one():
    logits = jnp.asarray(np.tile(P[0][:1, None], (64, 2, 1)), jnp.float32)
    unlikely = jnp.full((64, 1), P[0][0].argmin(), jnp.int32)
    drafting = Drafting(unlikely, jnp.zeros((64, 1, 4)), ())
    run = jax.jit(lambda seed: verify(logits, drafting, jnp.zeros(64, jnp.int32), seed, HALF)[:2])
    first, again, other = (jax.tree.map(np.asarray, run(jnp.uint32(seed))) for seed in (1, 1, 2))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


def test_greedy_accepts_up_to_the_first_draft_that_the_model_would_not_choose():
    own = np.array([2, 0, 3, 1])  # largest logit after t_n and after each of three drafts
    logits = np.zeros((5, 4, 4), np.float32)
    logits[:, np.arange(4), own] = 1.0
    drafts = np.array([[2, 0, 3], [2, 0, 1], [2, 1, 3], [1, 0, 3], [1, 2, 0]], np.int32)
    drafting = Drafting(jnp.asarray(drafts), jnp.zeros((5, 3, 1)), ())
    got = verify(jnp.asarray(logits), drafting, jnp.zeros(5, jnp.int32), jnp.uint32(0), GREEDY)
    assert got.count_B.tolist() == [4, 3, 2, 1, 1]
    for tokens, count in zip(got.tokens_BT.tolist(), got.count_B.tolist(), strict=True):
        assert tokens[:count] == own[:count].tolist()  # as if the model alone had chosen


def test_close_calls_are_margins_below_the_bound_of_greedy_choices():
    logits = jnp.array([[1.0, 0.0, 1.0 - CLOSE / 2], [0.0, 1.0, 1.0 - 2 * CLOSE], [0.5, 0.5, 0.0], [3.0, 1.0, 1.0]])
    assert close_calls(logits, GREEDY).tolist() == [True, False, True, False]
    assert not close_calls(logits, HALF).any()


@pytest.mark.slow
def test_drafts_are_drawn_from_what_the_plain_modules_predict():
    """After every step, whatever it accepted: scores of the whole chain against the reference on tokens and drafts."""
    model, sampling, seed = predictable(0.85), Sampling(temperature=3.0), jnp.uint32(2)
    known = [[1, 2, 3], [1, 4, 5, 2, 7, 3, 3]]
    state = generation._begin(model.model, model.config, padded(known, 4), sampling, seed, 64, 4, (), 1)
    drafting, cache, token_B, position_B = state.drafting, state.cache, state.token_B, state.position_B
    step = jax.jit(lambda *at: speculative_step(model.model, *at, seed, sampling, model.config))
    known, counts = [[*row, token] for row, token in zip(known, token_B.tolist(), strict=True)], set()
    for _ in range(7):
        for row, drafts, scores_DV in zip(known, drafting.drafts_BD.tolist(), drafting.scores_BDV, strict=True):
            tokens = np.array([row + drafts])
            main = numpy_model.forward(model.tensors, model.released, tokens)
            modules = numpy_model.mtp_forward(model.tensors, model.released, main, tokens)
            expected = [numpy_model.softmax(module["logits"][0, len(row) - 2] / 3.0) for module in modules]
            # float32 against float64, of logits up to 20
            np.testing.assert_allclose(jax.nn.softmax(scores_DV, axis=-1), expected, atol=2e-5)
        cache, drafting, verified, _ = step(cache, drafting, token_B, position_B)
        for row, tokens, count in zip(known, verified.tokens_BT.tolist(), verified.count_B.tolist(), strict=True):
            row += tokens[:count]
            counts.add(count)
        token_B, position_B = jnp.array([row[-1] for row in known], jnp.int32), position_B + verified.count_B
    assert len(counts) >= 3
