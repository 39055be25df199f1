"""Decoding runs with the newest JAX too: on one device and on a mesh, with drafts, the same tokens."""

import dataclasses

import jax
import numpy as np

from dsv3_jax.inference import deploy
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.mesh import serving_placement
from dsv3_jax.inference.serving import from_params
from dsv3_jax.model.module import init_variables
from dsv3_jax.presets import preset


def test_a_small_model_says_the_same_alone_on_a_mesh_and_with_drafts():
    config = dataclasses.replace(preset("tiny").model, vocab_size=64, num_nextn_predict_layers=1)
    params, bias = init_variables(config, 0)
    params = jax.tree.map(lambda w: 3 * w, params)  # logits far apart
    prompts = [np.random.default_rng(0).integers(0, 64, n).tolist() for n in (3, 9)]
    alone = from_params(params, bias, config)
    spread = deploy.from_params(params, bias, config, serving_placement("decode", config))
    expected = generate(alone, config, prompts, max_new_tokens=6)
    assert expected.statistics.close == 0
    for model, speculative in ((alone, True), (spread, False)):
        assert generate(model, config, prompts, max_new_tokens=6, speculative=speculative).tokens == expected.tokens
