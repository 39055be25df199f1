"""The decoding benchmark: its arithmetic against counts by hand, and one measurement of a tiny model."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.serving import error_of
from dsv3_jax.presets import preset
from dsv3_jax.weights import n_bytes
from experiments import _bench_decode

CONFIG = dataclasses.replace(preset("tiny").model, num_nextn_predict_layers=0, vocab_size=128)


def test_a_step_reads_every_matrix_once_but_only_the_experts_chosen():
    model, params, _ = _bench_decode.model_of(CONFIG, "float32")
    whole = _bench_decode.step_bytes(model, CONFIG, distinct=CONFIG.n_routed_experts, batch=1, length=0)
    # All parameters but the embedding, of which one row is read; the router's bias comes with them.
    parameters = n_bytes(params) - n_bytes(params["embed_tokens"]) - n_bytes(params["norm"])
    assert whole == parameters + CONFIG.hidden_size * 4
    expert = 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size * 4
    less = _bench_decode.step_bytes(model, CONFIG, distinct=4, batch=1, length=0)
    assert whole - less == expert * (CONFIG.n_routed_experts - 4) * CONFIG.n_main_moe_layers
    longer = _bench_decode.step_bytes(model, CONFIG, distinct=4, batch=3, length=100)
    row = (CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim) * 4
    assert longer - less == 2 * CONFIG.hidden_size * 4 + 3 * 100 * row * CONFIG.num_hidden_layers


def test_logit_errors_are_relative_to_the_logits():
    exact = np.array([[3.0, -4.0], [0.0, 5.0]])
    error = error_of(exact + np.array([[0.0, 0.1], [0.0, 0.0]]), exact)
    assert error.largest == pytest.approx(0.1) and error.rms == pytest.approx(np.sqrt(0.01 / 4) / np.sqrt(50 / 4))


def test_one_sequence_chooses_as_many_experts_as_a_token_has():
    assert _bench_decode.distinct_experts(None, None, CONFIG, np.zeros((1, 5), np.int32)) == CONFIG.num_experts_per_tok


def test_read_bandwidth_is_a_rate_that_memory_has():
    assert 1e8 < _bench_decode.read_bandwidth(2**20, seconds=0.05) < 1e13


@pytest.mark.slow
@pytest.mark.parametrize("what", ["prefill", "decode_b8"])
def test_a_measurement_prints_one_line_with_what_a_peer_is_compared_by(what):
    command = ["-m", "experiments.bench_decode", "--child", "--sizes=tiny", "--dtypes=int8", f"--what={what}", "--runs=1"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["size"] == "tiny" and line["what"] == what and line["tokens_per_s"] > 0
    if what == "decode_b8":
        config = preset("tiny").model
        row = (config.kv_lora_rank + config.qk_rope_head_dim) * 4
        cache_mb = 8 * (512 + 32 / 2) * row * config.num_hidden_layers / 1e6
        assert 0 < line["logit_error_rms"] < 1 and cache_mb < line["step_mb"] < line["model_mb"] + cache_mb


@pytest.mark.parametrize("flag, said", [("--what=train", "--what"), ("--dtypes=fp4", "--dtypes"), ("--sizes=huge", "huge")])
def test_a_wrong_flag_ends_in_one_line(flag, said):
    done = subprocess.run([sys.executable, "-m", "experiments.bench_decode", flag], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr


def test_weights_that_are_laid_out_are_as_many_as_before():
    model, params, bias = _bench_decode.model_of(CONFIG, "float32")
    assert n_bytes(model) == n_bytes(params) + bias[: CONFIG.n_main_moe_layers].nbytes
    assert jnp.dtype(model.lm_head.dtype) == jnp.float32
