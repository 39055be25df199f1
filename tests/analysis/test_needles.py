"""Needles: what counts as found, whose prediction is read, and when a map is void."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.analysis import needles
from dsv3_jax.analysis.needles import Grid
from dsv3_jax.data.retrieval import Haystack, haystack, retrieval_documents
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.module import DeepSeekV3, init_variables
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from oracles.micro import micro_config

MODEL = preset("tiny").model  # whose place `Reader` takes


def test_rows_hold_prompt_answer_and_padding_and_point_before_each_answers_token():
    rows = needles.rows_of([Haystack((5, 6, 7), (8, 9), 1), Haystack((5, 4), (3,), 1)], length=6, pad=2)
    np.testing.assert_array_equal(rows.tokens_NT, [[5, 6, 7, 8, 9, 2], [5, 4, 3, 2, 2, 2]])
    np.testing.assert_array_equal(rows.before_NA, [[2, 3], [1, 0]])
    np.testing.assert_array_equal(rows.answer_NA, [[8, 9], [3, -1]])


def test_a_needle_is_found_only_with_every_token_of_its_value():
    answer = np.array([[8, 9], [8, 9], [8, 9], [3, -1], [3, -1]])
    said = np.array([[8, 9], [8, 1], [1, 9], [3, 7], [4, 7]])
    assert needles.found(said, answer).tolist() == [True, False, False, True, False]


class Reader:
    """Stands for a model: reads the haystack as text, and forgets what lies further back than `reach` tokens."""

    def __init__(self, tokenizer, reach: int):
        self.tokenizer, self.reach = tokenizer, reach

    def __call__(self, params, bias, tokens_NT, before_NA, *, model):
        decode, encode = self.tokenizer.decode, self.tokenizer.encode
        said = np.full(before_NA.shape, -7, np.int32)
        for row, (tokens, (question,)) in enumerate(zip(tokens_NT.tolist(), before_NA.tolist(), strict=True)):
            key = decode(tokens[question : question + 1])
            for token in tokens[max(0, question - self.reach) : question]:
                fact = decode([token])
                if len(fact) == 2 and fact[0] == key:
                    said[row, 0] = encode(f" {fact[1]}")[0]
        return said


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(retrieval_documents(400_000, 256), 768)


@pytest.mark.parametrize("at_a_time", [1, 100, 10_000])
def test_the_map_shows_what_a_model_with_a_short_memory_finds(monkeypatch, tokenizer, at_a_time):
    monkeypatch.setattr(needles, "TOKENS_AT_A_TIME", at_a_time)
    monkeypatch.setattr(needles, "likeliest", Reader(tokenizer, reach=10_000))
    grid = Grid((128, 256), (0.0, 1.0), samples=3)
    assert needles.measure(None, None, MODEL, tokenizer, grid, 0, "all", show=False) == [[1, 1], [1, 1]]
    monkeypatch.setattr(needles, "likeliest", Reader(tokenizer, reach=150))
    assert needles.measure(None, None, MODEL, tokenizer, grid, 0, "some", show=False) == [[1, 1], [0, 1]]


def test_the_likeliest_tokens_are_those_of_the_models_logits_at_these_positions(tmp_path):
    model = override(micro_config(tmp_path), {"num_nextn_predict_layers": 0}).model
    params, bias = init_variables(model, seed=3)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 12)).astype(np.int32)
    before = np.array([[3, 4], [10, 0]], np.int32)
    hidden, _ = DeepSeekV3(model).apply({"params": params, "balance": {"bias": bias}}, jnp.asarray(tokens))
    every = np.asarray(hidden.normed_BTD, np.float64) @ np.asarray(params["lm_head"], np.float64).T
    expected = [[every[row, position].argmax() for position in positions] for row, positions in enumerate(before)]
    np.testing.assert_array_equal(needles.likeliest(params, bias, tokens, before, model=model), expected)


def test_haystacks_are_the_same_for_every_model_and_others_for_another_seed(tokenizer):
    def tokens(seed):
        return haystack(64, 0.5, tokenizer.encode, seed, begin=tokenizer.bos)

    assert tokens(1) == tokens(1) != tokens(2)


GRID = Grid((256, 1024), (0.0, 1.0), samples=2)


@pytest.mark.parametrize(("first", "void"), [([0.95, 0.95], False), ([1.0, 0.89], True)])
def test_fewer_than_95_percent_at_the_training_length_make_it_void_in_result_line_and_figure(first, void):
    result = needles.summarise({"before": [first, [0, 0]], "after": [[1, 1], [1, 0.5]]}, GRID, 256)
    assert result["void"] is void and result["maps"]["after"]["mean"] == 0.875
    line = needles.verdict(result, 256)
    assert line.startswith("void: ") is void and f"{100 * np.mean(first):.1f} % of needles found at 256" in line
    figure = needles.draw(result, line)
    assert figure.get_suptitle() == line
    panels = figure.axes[:2]
    assert [ax.get_title() for ax in panels] == [f"before: mean {50 * np.mean(first):.1f} %", "after: mean 87.5 %"]
    assert {image.get_clim() for ax in panels for image in ax.get_images()} == {(0, 1)}


def test_the_table_has_a_line_for_each_map_and_fits_a_terminal():
    grid = Grid((256, 512, 1024, 2048, 4096), (0.0, 1.0), samples=2)
    maps = {name: [[0.5, 1.0]] * 5 for name in ("before", "before, YaRN untrained", "after phase 2, 4,096")}
    lines = needles.table(needles.summarise(maps, grid, 256)).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == 4
    assert lines[2].split()[-6:] == ["75.0"] * 6 and lines[0].split()[-2:] == ["4,096", "mean"]
