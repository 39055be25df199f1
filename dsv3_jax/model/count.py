"""Parameters, total and activated per token, counted from the model's own tree [§4.2, Table 1]."""

import math
from typing import Any, NamedTuple

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.module import abstract_variables


class ParameterCount(NamedTuple):
    """`total`: the main model, router biases included. `active`: read for one token, without embedding and head.

    DeepSeek's "37B activated" is `active_with_head`. The `mtp` fields leave out the shared embedding and head.
    """

    total: int
    active: int
    active_with_head: int
    active_with_head_and_embedding: int
    mtp: int
    mtp_active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    params, bias = abstract_variables(config)
    vocabulary = config.vocab_size * config.hidden_size
    mtp = params.pop("mtp", {})
    bias_row = bias.shape[1] if config.has_correction_bias else 0
    main_bias, mtp_bias = bias_row * config.n_main_moe_layers, bias_row * config.num_nextn_predict_layers
    stored_vocabularies = vocabulary * (1 if config.tie_word_embeddings else 2)
    active = _count(params, config, active=True) - stored_vocabularies + main_bias
    return ParameterCount(
        total=_count(params, config) + main_bias,
        active=active,
        active_with_head=active + vocabulary,
        active_with_head_and_embedding=active + 2 * vocabulary,
        mtp=_count(mtp, config) + mtp_bias,
        mtp_active=_count(mtp, config, active=True) + mtp_bias,
    )


def _count(tree: Any, config: ModelConfig, *, active: bool = False) -> int:
    """Elements of a tree; with `active`, routed experts count for the share of them that a token visits."""

    def size(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> int:
        elements = math.prod(leaf.shape)
        if active and any(key.key == "experts" for key in path):
            elements = elements // config.n_routed_experts * config.num_experts_per_tok
        return elements

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, tree)))
