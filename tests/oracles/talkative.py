"""A tiny model with a tokenizer of bytes, as a folder: it continues `a` with ANSWER and an end."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from oracles import numpy_model
from oracles.decoding import TINY, successor_tensors
from oracles.released_folder import released_config, write_folder

ANSWER = " né19b."  # no byte twice, so that every token has one successor
VOCABULARY = 266  # special tokens and bytes
WINDOW = 48  # positions


def byte_tokenizer() -> Tokenizer:
    return train_tokenizer(["a"], VOCABULARY)


def released() -> dict[str, Any]:
    """config.json."""
    changes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_nextn_predict_layers": 0, "max_position_embeddings": WINDOW}
    return released_config(**TINY | changes)


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    """By released name, float32. The blocks interfere a little, so that there is something to compute."""
    tokenizer, config = byte_tokenizer(), released()
    ids = [*tokenizer.encode("a" + ANSWER), tokenizer.eos]
    found = successor_tensors(config, list(zip(ids, ids[1:], strict=False)), noise=0.3)
    found["lm_head.weight"] = found["lm_head.weight"] * 0.25  # likely, and not certain
    others = np.random.default_rng(1).standard_normal(found["lm_head.weight"].shape) * 0.05  # no two tokens are equal
    found["lm_head.weight"] = found["lm_head.weight"] + others
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def write_talkative(folder: Path) -> Path:
    write_folder(folder, released(), tensors())
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    return folder


def reference_logprobs(ids: list[int]) -> np.ndarray:
    """[T, V] log-probabilities of what follows each of `ids`, float64 NumPy."""
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors().items()}
    logits_TV = numpy_model.forward(wide, released(), np.array([ids]))["logits"][0]
    shifted = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
