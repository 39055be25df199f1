"""One call opens every kind of checkpoint."""

import numpy as np
import pytest

from dsv3_jax.inference.loaded import load
from oracles.cases import DATA, load_case


def test_computing_precision_follows_the_parameters_unless_told():
    assert load(DATA / "base").config.compute_dtype == "float32"
    assert load(DATA / "base", dtype="bfloat16").config.compute_dtype == "bfloat16"
    assert load(DATA / "base", dtype="bfloat16", compute_dtype="float32").config.compute_dtype == "float32"
    assert load(DATA / "base", dtype="stored").config.compute_dtype == "float32"


def test_rows_may_be_lists_and_no_tokenizer_is_needed():
    loaded = load(DATA / "base")
    assert loaded.tokenizer is None
    tokens = load_case("base").expected["input_ids"]
    np.testing.assert_array_equal(loaded.score(tokens.tolist()).logits, loaded.score(tokens).logits)


def test_a_ragged_batch_is_refused():
    with pytest.raises(ValueError) as error:
        load(DATA / "base").score([[1, 2], [3]])
    assert "\n" not in str(error.value)


def test_mtp_is_left_out_on_request():
    whole, main = load(DATA / "mtp"), load(DATA / "mtp", mtp=False)
    assert "mtp" in whole.params and "mtp" not in main.params and len(main.bias_LE) == len(whole.bias_LE) - 1
