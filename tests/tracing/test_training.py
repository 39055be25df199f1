"""A training pass over a trace's text that goes to the trace's experts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, DataConfig, TrainConfig
from dsv3_jax.inference.loaded import load
from dsv3_jax.moe.balance import controller_of
from dsv3_jax.tracing.capture import Whole, trace
from dsv3_jax.tracing.store import Text, Writer, about_model, open_trace
from dsv3_jax.tracing.training import training_batch
from dsv3_jax.training import step as training
from oracles.cases import DATA
from oracles.checks_step import HYPER
from oracles.compiling import quick_jit

pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTHS = (5, 17, 1, 30)


@pytest.fixture(scope="module")
def loaded():
    return load(DATA / "mtp")


@pytest.fixture(scope="module")
def found(loaded, tmp_path_factory):
    """A trace of four documents, of two domains."""
    rng, config = np.random.default_rng(0), loaded.config
    ids = rng.integers(0, config.vocab_size, sum(LENGTHS)).astype(np.int32)
    text = Text(ids, np.cumsum([0, *LENGTHS]), np.arange(4), np.array([0, 1, 1, 0]), ("x", "y"))
    about = about_model(config, model="m", tokenizer=None, domains=text.domains, source="t", batch_tokens=64, how={})
    folder = tmp_path_factory.mktemp("trace") / "t"
    trace(Whole(loaded.params, loaded.bias_LE, config), text, Writer(folder, about, text), 64)
    return open_trace(folder)


def test_rows_are_the_trace_s_sequences_and_experts_with_nothing_in_their_padding(loaded, found):
    batch = training_batch(found, [3, 0, 2], loaded.config, length=33)
    assert {name: a.shape for name, a in batch.items()} == {
        "tokens": (3, 33), "segment_ids": (3, 33), "domain_ids": (3, 33),
        "forced": (3, 32, len(found.about.layers), found.about.top_k),
    }  # fmt: skip
    for row, i in enumerate([3, 0, 2]):
        place, n = found.text.sequence(i), LENGTHS[i]
        np.testing.assert_array_equal(batch["tokens"][row, :n], found.text.tokens_N[place])
        np.testing.assert_array_equal(batch["segment_ids"][row], np.arange(33) < n)
        assert (batch["domain_ids"][row, :n] == found.text.domain_of[i]).all()
        np.testing.assert_array_equal(batch["forced"][row, :n], found.choices.experts_NLK[place])
        assert (batch["forced"][row, n:] == found.about.n_experts).all() and not batch["tokens"][row, n:].any()
    assert training_batch(found, [0, 1], loaded.config)["tokens"].shape == (2, 17)


def test_a_forced_gradient_is_bitwise_the_free_one_and_keeps_to_the_trace_when_the_router_moves(loaded, found):
    data = DataConfig(seq_len=32, cross_document_attention=False)
    config = Config(model=loaded.config, train=TrainConfig(batch_size=3, batch_size_start=3), data=data)
    run = quick_jit(partial(training.gradients, config=config, controller=controller_of(config), n_domains=2))
    batch = {name: jnp.asarray(a[None]) for name, a in training_batch(found, [3, 1, 0], config.model, length=33).items()}
    free = batch | {"forced": jnp.full_like(batch["forced"], found.about.n_experts)}
    state = training.init_state(config)._replace(params=loaded.params, bias=loaded.bias_LE)
    forced, own = run(state, batch, HYPER), run(state, free, HYPER)
    for a, b in zip(jax.tree.leaves(forced), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    moved = state._replace(bias=state.bias + jnp.linspace(0, 1, found.about.n_experts)[None, :])
    gradients, terms = run(moved, batch, HYPER)
    np.testing.assert_array_equal(terms.load_LE, own[1].load_LE)
    assert (np.asarray(run(moved, free, HYPER)[1].load_LE) != np.asarray(own[1].load_LE)).any()
    assert np.abs(np.asarray(gradients["moe_layers"]["mlp"]["gate"])).max() > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(sequences=[4]), r"sequences: expected 0..3, got 4"),
        (dict(sequences=[-1]), r"sequences: expected 0..3, got -1"),
        (dict(sequences=[2]), r"sequences: expected the longest to have 2..2 tokens, got 1"),
        (dict(sequences=[]), r"sequences: expected the longest to have 2..2 tokens, got 0"),
        (dict(sequences=[1], length=16), r"sequences: expected the longest to have 2..16 tokens, got 17"),
        (dict(sequences=[0, 1], tokens=[np.zeros(5, int)]), r"tokens: expected those of 2 sequences, got 1"),
        (
            dict(sequences=[0], tokens=[np.full(5, -1)]),
            r"tokens of row 0: expected those of the trace's sequence 0, got others",
        ),
    ],
)
def test_what_does_not_fit_is_refused(loaded, found, given, said):
    with pytest.raises(ValueError, match=said):
        training_batch(found, given.pop("sequences"), loaded.config, **given)


def test_tokens_are_compared_and_other_architectures_refused(loaded, found):
    own = [found.text.tokens_N[found.text.sequence(1)]]
    assert training_batch(found, [1], loaded.config, tokens=own)["tokens"].shape == (1, 17)
    with pytest.raises(ValueError, match="other tokens|got others"):
        training_batch(found, [1], loaded.config, tokens=[own[0] + 1])
    with pytest.raises(ValueError, match="architecture"):
        training_batch(found, [1], replace(loaded.config, num_experts_per_tok=loaded.config.num_experts_per_tok + 1))
