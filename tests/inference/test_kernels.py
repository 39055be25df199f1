"""Generating with kernels in place of XLA's operations: attention over prompt and cache, routers, experts; the same tokens."""

from dataclasses import replace

import pytest

from dsv3_jax.inference import serving
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.loaded import load
from oracles.accelerators import HERE
from oracles.cases import DATA

PROMPTS = [[5, 6, 7, 8, 9], [3, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["base", "mtp"])
@pytest.mark.parametrize("how", ["pallas_tpu:interpret", "pallas_gpu:interpret", *HERE])
def test_kernels_generate_the_same_tokens(folder, how):
    loaded = load(DATA / folder)

    def tokens(config):
        model = serving.from_params(loaded.params, loaded.bias_LE, config)
        return generate(model, config, PROMPTS, max_new_tokens=8, speculative=folder == "mtp").tokens

    names = [f"{name}_implementation" for name in ("attention", "decode", "router", "experts")]
    assert tokens(replace(loaded.config, **dict.fromkeys(names, how))) == tokens(loaded.config)
