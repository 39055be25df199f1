"""Traces of the tiny checkpoints against another implementation's choices; a pass and its replay are bitwise the same."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.loaded import load
from dsv3_jax.inference.score import InMemory, Streamed
from dsv3_jax.interop.source import open_source
from dsv3_jax.model.module import init_variables
from dsv3_jax.presets import preset
from dsv3_jax.tracing import capture
from dsv3_jax.tracing.capture import ByLayer, Whole, batches, check_replay, has_groups, replayed, trace
from dsv3_jax.tracing.store import Text, Writer, about_model, open_trace
from oracles.cases import DATA, load_case
from oracles.layouts import placement_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


def text_of(rows):
    ids, bounds = np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])
    return Text(ids, bounds, np.arange(len(rows)), np.zeros(len(rows), int), ("tokens",))


def some_text(vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    return text_of([rng.integers(0, vocabulary, n) for n in (5, 17, 1, 30, 16)])


def whole(name, **how):
    loaded = load(DATA / name)
    return Whole(loaded.params, loaded.bias_LE, loaded.config, **how)


def by_layer(name, scores=False, placement=None):
    source = open_source(DATA / name)
    return ByLayer(Streamed(source.tensors, source.config, "float32", placement), scores)


def traced(folder, tracer, text, batch_tokens=64, forced=None):
    config = tracer.config
    about = about_model(config, model="m", tokenizer=None, domains=text.domains, source="t", batch_tokens=batch_tokens, how={})
    writer = Writer(folder, about, text, config.n_group if has_groups(config) else 0, tracer.scores)
    trace(tracer, text, writer, batch_tokens, forced)
    return open_trace(folder)


def test_batches_have_every_sequence_once_in_few_shapes():
    text = some_text(9)
    found = batches(text, 64)
    assert sorted(i for batch in found for i in batch.sequences) == list(range(5))
    for batch in found:
        lengths = text.lengths[list(batch.sequences)]
        assert lengths.max() <= batch.length < 2 * max(lengths.min(), 16) and len(batch.sequences) <= batch.rows
    assert [(batch.rows, batch.length) for batch in found] == [(3, 16), (2, 32)]
    assert [(len(batch.sequences), batch.rows) for batch in batches(text, 32)] == [(2, 2), (1, 2), (1, 1), (1, 1)]
    assert [(batch.rows, batch.length) for batch in batches(text, 10**6)] == [(3, 16), (2, 32)], "nothing for nobody"
    assert {batch.rows for batch in batches(text, 64, ranks=3)} == {3}


@pytest.mark.parametrize("name", ["base", "mtp"])
def test_choices_are_those_of_another_implementation(tmp_path, name):
    expected, tokens = load_case(name).expected, load_case(name).expected["input_ids"]
    found = traced(tmp_path / "t", whole(name), text_of(list(tokens)), tokens.size)
    experts = found.choices.experts_NLK.reshape(*tokens.shape, len(found.about.layers), found.about.top_k)
    gates, n_main = found.choices.gates_NLK.reshape(experts.shape), len(found.about.layers) - (name == "mtp")
    for row, layer in enumerate(found.about.layers[:n_main]):
        order = np.argsort(experts[:, :, row], axis=-1)
        np.testing.assert_array_equal(np.take_along_axis(experts[:, :, row], order, -1), expected[f"topk_idx_{layer}"])
        rounded = {"rtol": 2**-10, "atol": 1e-6}  # to float16
        np.testing.assert_allclose(np.take_along_axis(gates[:, :, row], order, -1), expected[f"topk_w_{layer}"], **rounded)
    if name == "mtp":
        np.testing.assert_array_equal(np.sort(experts[:, :-1, n_main], axis=-1), expected["mtp_topk_idx"])
        assert (experts[:, -1, n_main] == found.about.n_experts).all() and (
            experts[:, :-1, n_main] < found.about.n_experts
        ).all()


def test_margins_groups_and_scores_are_of_the_biased_scores(tmp_path):
    model = whole("base", scores=True)
    found, config = traced(tmp_path / "t", model, some_text(model.config.vocab_size)), model.config
    assert has_groups(config)
    for layer in range(config.n_main_moe_layers):
        biased = found.choices.scores_NLE[:, layer].astype(np.float64) + np.asarray(model.bias_LE[layer])
        kept = found.choices.groups_NL[:, layer, None] >> np.arange(config.n_group) & 1
        assert (kept.sum(axis=1) == config.topk_group).all()
        grouped = np.where(kept[..., None], biased.reshape(len(biased), config.n_group, -1), -np.inf).reshape(biased.shape)
        order = np.sort(grouped, axis=1)[:, ::-1]
        k = config.num_experts_per_tok
        np.testing.assert_allclose(found.choices.margins_NL[:, layer], order[:, k - 1] - order[:, k], atol=2e-3)  # of float16
        chosen = np.take_along_axis(grouped, found.choices.experts_NLK[:, layer].astype(int), axis=1)
        np.testing.assert_allclose(chosen, order[:, :k], atol=1e-3)
        sums = -np.sort(-biased.reshape(len(biased), config.n_group, -1))[..., : config.group_score_topk].sum(axis=-1)
        worst, best = np.where(kept, sums, np.inf).min(axis=1), np.where(kept, -np.inf, sums).max(axis=1)
        assert (worst >= best - 2e-3).all()


@pytest.mark.parametrize("kind", ["whole", "streamed", pytest.param("mesh", marks=pytest.mark.slow)])
def test_a_replay_is_bitwise_the_pass_it_came_from(tmp_path, kind):
    placement = placement_of("report", 16, mesh_data=2, mesh_expert=4) if kind == "mesh" else None
    tracer = whole("mtp") if kind == "whole" else by_layer("mtp", placement=placement)
    text = some_text(tracer.config.vocab_size)
    first = traced(tmp_path / "first", tracer, text)
    for batch, found in replayed(tracer, first):
        free = tracer.run(capture.tokens_of(text, batch))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(free), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    again = traced(tmp_path / "again", tracer, text, forced=first)
    for ours, theirs in zip(again.choices, first.choices, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)


def test_a_forced_pass_uses_the_trace_s_experts_and_its_own_gates(tmp_path):
    tracer = whole("mtp")
    text, config = some_text(tracer.config.vocab_size), tracer.config
    first = traced(tmp_path / "first", tracer, text)
    moved = Whole(tracer.params, tracer.bias_LE + jnp.linspace(0, 1, config.n_routed_experts)[None, :], config)
    forced = traced(tmp_path / "forced", moved, text, forced=first)
    own = traced(tmp_path / "own", moved, text)
    np.testing.assert_array_equal(forced.choices.experts_NLK, first.choices.experts_NLK)
    assert (own.choices.experts_NLK != first.choices.experts_NLK).mean() > 0.2
    np.testing.assert_array_equal(forced.choices.gates_NLK, first.choices.gates_NLK)  # the bias is in no gate


@pytest.mark.slow
def test_streamed_and_whole_models_choose_alike(tmp_path):
    tracer = whole("mtp", scores=True)
    text = some_text(tracer.config.vocab_size)
    a, b = traced(tmp_path / "a", tracer, text), traced(tmp_path / "b", by_layer("mtp", scores=True), text)
    loaded = load(DATA / "mtp")
    c = traced(tmp_path / "c", ByLayer(InMemory(loaded.params, loaded.bias_LE, loaded.config), True), text)
    for other in (b, c):
        np.testing.assert_array_equal(a.choices.experts_NLK, other.choices.experts_NLK)
        for x, y in zip(a.choices[1:], other.choices[1:], strict=True):
            np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=2**-9, atol=1e-3)


def test_what_is_padded_and_who_shares_the_batch_does_not_matter(tmp_path):
    tracer = whole("base")
    text = some_text(tracer.config.vocab_size)
    together, alone = traced(tmp_path / "a", tracer, text, 256), traced(tmp_path / "b", tracer, text, 1)
    np.testing.assert_array_equal(together.choices.experts_NLK, alone.choices.experts_NLK)


def test_a_trace_of_another_model_or_other_tokens_is_refused(tmp_path):
    tracer = whole("base")
    found = traced(tmp_path / "t", tracer, some_text(tracer.config.vocab_size))
    check_replay(found, tracer.config, "m")
    check_replay(found, replace(tracer.config, compute_dtype="bfloat16"), "m")
    with pytest.raises(ValueError, match="the trace is of other weights of this architecture"):
        check_replay(found, tracer.config, "other")
    other = replace(tracer.config, routed_scaling_factor=1.25)
    with pytest.raises(ValueError, match="got one with routed_scaling_factor .*, not 1.25"):
        next(replayed(Whole(tracer.params, tracer.bias_LE, other), found))
    with pytest.raises(ValueError, match="tokens: expected 0"):
        traced(tmp_path / "u", tracer, text_of([np.array([tracer.config.vocab_size])]))


def test_an_interrupted_trace_goes_on_where_it_was(tmp_path, monkeypatch):
    tracer = whole("base")
    text, runs = some_text(tracer.config.vocab_size), []

    class Stops:
        config, scores, ranks = tracer.config, False, 1

        def run(self, *given):
            runs.append(given)
            if len(runs) == 2:
                raise KeyboardInterrupt
            return tracer.run(*given)

    with pytest.raises(KeyboardInterrupt):
        traced(tmp_path / "t", Stops(), text)
    found, once = traced(tmp_path / "t", Stops(), text), traced(tmp_path / "once", tracer, text)
    assert len(runs) == 1 + len(batches(text, 64))
    np.testing.assert_array_equal(found.choices.experts_NLK, once.choices.experts_NLK)


def test_what_was_begun_in_other_batches_is_not_continued(tmp_path):
    tracer = whole("base")
    text = some_text(tracer.config.vocab_size)

    class Stops:
        config, scores, ranks = tracer.config, False, 1

        def run(self, *given):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(tmp_path / "t", Stops(), text)
    progress = tmp_path / "t.part" / "progress.json"
    for batch, tokens, done, of in ((1, 23, 22, 2), (2, 22, 69, 2), (3, 69, 69, 2)):
        progress.write_text(json.dumps({"batches": batch, "tokens": tokens}))
        expected = f"--out: expected {done} tokens in the first {batch} of {of} batches, got {tokens} tokens in {batch} batches"
        with pytest.raises(ValueError, match=expected):
            traced(tmp_path / "t", tracer, text)


def test_a_replay_of_damaged_experts_is_one_line(tmp_path):
    tracer = whole("base")
    first = traced(tmp_path / "first", tracer, some_text(tracer.config.vocab_size))
    experts = first.choices.experts_NLK.copy()
    experts[-1, -1, 0] = tracer.config.n_routed_experts + 1
    damaged = replace(first, choices=first.choices._replace(experts_NLK=experts))
    with pytest.raises(ValueError, match="experts: expected 0.*; the trace is damaged"):
        list(replayed(tracer, damaged))


def test_every_depth_looks_as_far_ahead_and_lacks_as_many_rows(tmp_path):
    config = replace(preset("tiny").model, num_hidden_layers=2, num_nextn_predict_layers=2)
    variables, rng = init_variables(config), np.random.default_rng(0)
    text = text_of([rng.integers(0, 99, n) for n in (1, 2, 3, 16)])
    a = traced(tmp_path / "a", Whole(variables.params, variables.bias_LE, config), text)
    b = traced(tmp_path / "b", ByLayer(InMemory(variables.params, variables.bias_LE, config)), text)
    np.testing.assert_array_equal(a.choices.experts_NLK, b.choices.experts_NLK)
    for i, n in enumerate(text.lengths.tolist()):
        place = text.sequence(i)
        for k in (1, 2):
            row, expected = config.n_main_moe_layers + k - 1, [False] * max(0, n - k) + [True] * min(n, k)
            assert (a.choices.experts_NLK[place, row] == config.n_routed_experts).all(axis=-1).tolist() == expected
            assert np.isnan(a.choices.margins_NL[place, row]).tolist() == expected
