"""Matrix-product FLOPs of training, per token, counted from the model's own parameters [§4.2; Table 1's cost].

The usual convention: a multiply-add is two operations, the backward pass costs twice the forward pass, attention reads half
of the window because it is causal, and what an implementation recomputes, pads or masks earns nothing.
"""

import math
from collections.abc import Mapping

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.module import model_spec
from dsv3_jax.model.spec import Spec, SpecTree


def matmul_parameters(config: ModelConfig) -> int:
    """Elements of the matrices that one token meets in the main model: active experts and the head, no gains, no embedding."""
    spec = model_spec(config)
    main = {name: child for name, child in spec.items() if name not in ("mtp", "embed_tokens", "lm_head")}
    return _matrices(main, config) + _head(config)


def training_flops_per_token(config: ModelConfig, seq_len: int, *, mtp: bool = True) -> int:
    """Forward and backward FLOPs per token at windows of `seq_len` tokens; with `mtp`, the MTP modules and their heads too."""
    matrices, attentions = matmul_parameters(config), config.num_hidden_layers
    if mtp and config.num_nextn_predict_layers:
        depths = config.num_nextn_predict_layers
        matrices += _matrices(model_spec(config)["mtp"], config) + depths * _head(config)
        attentions += depths
    channels = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 6 * matrices + 3 * attentions * channels * seq_len  # 3 * (2 * channels * seq_len / 2) a layer


def _head(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _matrices(tree: Spec | SpecTree, config: ModelConfig) -> int:
    """Elements of all matrices; of routed experts the share that a token visits. Gains are what starts at 1."""
    if isinstance(tree, Mapping):
        return sum(_matrices(child, config) for child in tree.values())
    if tree.init == "ones":
        return 0
    elements = math.prod(tree.shape)
    return elements // config.n_routed_experts * config.num_experts_per_tok if "experts" in tree.axes else elements
