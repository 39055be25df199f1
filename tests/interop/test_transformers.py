"""What we write is loaded by the `transformers` library, which then computes the same. Needs torch and transformers.

They are looked for in this environment (`pip install -e '.[interop-tests]'`) or, so that it need not hold them, in the
interpreter that $TRANSFORMERS_PYTHON names.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.inference.loaded import load
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.source import open_source
from dsv3_jax.training import loop
from oracles.cases import DATA
from oracles.micro import micro_config
from oracles.released_folder import released_config, released_tensors, write_folder

HERE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
PYTHON = os.environ.get("TRANSFORMERS_PYTHON") or (sys.executable if HERE else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="torch and transformers are not installed; pip install '.[interop-tests]'"),
]


def logits_of_peer(folder, tokens, tmp_path):
    np.save(tmp_path / "tokens.npy", tokens)
    script, out = Path(__file__).parents[1] / "oracles" / "transformers_peer.py", tmp_path / "logits.npy"
    command = [PYTHON, str(script), str(folder), str(tmp_path / "tokens.npy"), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return np.load(out)


# float32 on both sides: 1.5e-5 between two correct implementations.
TOLERANCE = 4e-5
WAYS = {
    "keep": ("mtp", "keep"),
    "float32": ("fp8", "float32"),
    "bfloat16": ("yarn", "bfloat16"),
    "plain query": ("noqlora", "keep"),
}


@pytest.mark.parametrize("way", WAYS)
def test_transformers_reads_what_we_write(tmp_path, way):
    case, dtype = WAYS[way]
    convert(open_source(DATA / case), tmp_path / "orbax", format="orbax")
    convert(open_source(tmp_path / "orbax"), tmp_path / "hf", dtype=dtype, shard_bytes=400_000)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 24))
    ours = load(tmp_path / "hf").score(tokens).logits
    np.testing.assert_allclose(logits_of_peer(tmp_path / "hf", tokens, tmp_path), ours, rtol=0, atol=TOLERANCE)


def test_transformers_reads_fp8_with_its_scales_as_we_write_it(tmp_path):
    """It divides a side by the number of its blocks to know their size, so that sides are of whole blocks here, or of one."""
    released = released_config(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=112,
        num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=16,
        torch_dtype="bfloat16",
    )  # fmt: skip
    write_folder(tmp_path / "source", released, released_tensors(released, 1, dtype=ml_dtypes.bfloat16))
    convert(open_source(tmp_path / "source"), tmp_path / "hf", dtype="fp8")
    tokens = np.random.default_rng(0).integers(0, 50, (2, 24))
    ours = load(tmp_path / "hf").score(tokens).logits
    np.testing.assert_allclose(logits_of_peer(tmp_path / "hf", tokens, tmp_path), ours, rtol=0, atol=TOLERANCE)
    exact = load(tmp_path / "source").score(tokens).logits
    assert np.abs(ours - exact).max() > 100 * TOLERANCE, "FP8 makes a difference"


def test_transformers_reads_a_training_runs_weights(tmp_path):
    """config.json is ours then, every key of it."""
    loop.train(micro_config(tmp_path, steps=2), tmp_path / "run", header=False, progress=False)
    convert(open_source(tmp_path / "run"), tmp_path / "hf")
    loaded = load(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (2, 24))
    peer = logits_of_peer(tmp_path / "hf", tokens, tmp_path)
    np.testing.assert_allclose(peer, loaded.score(tokens).logits, rtol=0, atol=TOLERANCE)


def test_transformers_reads_tied_tables_of_version_2(tmp_path):
    released = released_config(
        model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"], scoring_func="softmax", norm_topk_prob=False,
        topk_method="group_limited_greedy", tie_word_embeddings=True, torch_dtype="float32",
    )  # fmt: skip
    write_folder(tmp_path / "source", released, released_tensors(released, 1, dtype=ml_dtypes.bfloat16))
    convert(open_source(tmp_path / "source"), tmp_path / "hf", dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    ours = load(tmp_path / "hf").score(tokens).logits
    np.testing.assert_allclose(logits_of_peer(tmp_path / "hf", tokens, tmp_path), ours, rtol=0, atol=TOLERANCE)
