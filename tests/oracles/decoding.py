"""Tiny models laid out for decoding, the same under released names, and what NumPy says that they continue with."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.serving import Serving, from_params
from oracles import numpy_model
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.random_checkpoint import SMALL_CONFIG, random_tensors

VOCABULARY, END = 13, 12
TINY: dict[str, Any] = SMALL_CONFIG | {
    "hidden_size": 16, "intermediate_size": 20, "moe_intermediate_size": 8, "vocab_size": VOCABULARY,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
# A window so short that a few tokens lie beyond it.
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


class Tiny(NamedTuple):
    released: dict[str, Any]  # config.json
    tensors: dict[str, np.ndarray]  # float64, by released name
    config: ModelConfig
    model: Serving


def served(released: dict[str, Any], tensors: dict[str, np.ndarray], **changes: Any) -> Tiny:
    config = model_config(released, **changes)
    return Tiny(released, tensors, config, from_params(*from_checkpoint(tensors, config), config))


@functools.cache
def tiny(seed: int = 0, *, yarn: bool = False, **fields: Any) -> Tiny:
    """Random weights; `fields` of config.json."""
    released = TINY | {"rope_scaling": YARN if yarn else None} | fields
    return served(released, random_tensors(released, seed))


def successor_tensors(
    released: dict[str, Any], pairs: Sequence[tuple[int, int]], noise: float, seed: int = 0
) -> dict[str, np.ndarray]:
    """A model that continues a token with its successor, and whose MTP modules know it too.

    A token's embedding points along the successor's row of the head; `noise` is how much the blocks interfere. Tokens that are
    nobody's successor have no score.
    """
    tensors, rng = random_tensors(released, seed), np.random.default_rng(seed)
    vocabulary, width = released["vocab_size"], released["hidden_size"]
    directions = rng.standard_normal((vocabulary, width))
    if vocabulary <= width:
        directions = np.linalg.qr(directions.T)[0].T
    directions *= width**0.5 / np.linalg.norm(directions, axis=1, keepdims=True)
    tensors["model.embed_tokens.weight"] = directions
    tensors["lm_head.weight"] = np.zeros_like(directions)
    for token, successor in pairs:
        tensors["lm_head.weight"][successor] = directions[token]
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = tensors[name] * noise
        elif name.endswith("eh_proj.weight"):
            tensors[name][:, :width] = np.eye(width)  # the token's embedding, and a share of the hidden state
            tensors[name][:, width:] *= 0.5 * noise
    return tensors


@functools.cache
def predictable(noise: float, *, ends: bool = False, depths: int = 3, seed: int = 3) -> Tiny:
    """Successors in a circle of all tokens; without `ends`, of all but END."""
    released = TINY | {"num_nextn_predict_layers": depths}
    order = np.random.default_rng(seed).permutation(VOCABULARY)
    order = order if ends else order[order != END]
    return served(released, successor_tensors(released, list(zip(order, np.roll(order, -1), strict=True)), noise, seed))


def reference_logits(model: Tiny, tokens: Sequence[int]) -> np.ndarray:
    """[T, V] of the plain forward pass, float64."""
    return numpy_model.forward(model.tensors, model.released, np.array([tokens]))["logits"][0]


class Speculation(NamedTuple):
    steps: int
    accepted: int


def reference_speculation(model: Tiny, sequence: Sequence[int], n_prompt: int, n_new: int, depths: int) -> Speculation:
    """What greedy drafts of the first modules achieve, given a prompt's continuation by `n_new` tokens and `depths` more.

    From position p on, module k's draft for p + k + 1 is right where the module, given the true tokens, predicts that token.
    Behind the first wrong draft the others do not matter.
    """
    tokens = np.array([sequence])
    main = numpy_model.forward(model.tensors, model.released, tokens)
    modules = numpy_model.mtp_forward(model.tensors, model.released, main, tokens)[:depths]
    guesses = [module["logits"][0].argmax(axis=-1) for module in modules]
    steps, accepted, known = 0, 0, n_prompt  # position of the last known token
    while known < n_prompt + n_new - 1:
        right = 0
        while right < depths and guesses[right][known - 1] == sequence[known + right + 1]:
            right += 1
        steps, accepted, known = steps + 1, accepted + right, known + right + 1
    return Speculation(steps, accepted)
