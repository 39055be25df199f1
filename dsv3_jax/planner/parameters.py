"""Parameters by component, total and active per token, and what a stored checkpoint of them weighs [§4.2, Table 1; §3.3.2].

A stored checkpoint is laid out as the released one: every matrix that runs in FP8 (all of attention, MLPs and experts) one
byte an element with a float32 scale for each block, the rest in BF16, router biases in float32, and an MTP module with its own
copies of embedding and head.
"""

import math
from typing import NamedTuple

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.planner.rows import Number
from dsv3_jax.planner.share import COMPONENTS, FLOAT32, Weight, matrix, whole

BLOCK = 128  # rows and columns of a weight that share a scale [§3.3.2]
BF16 = 2
NOT_IN_FP8 = ("embed_tokens", "lm_head", "gate", "eh_proj")


class Count(NamedTuple):
    total: int
    active: int  # multiplied with for one token; an embedding is looked up, so it does not count


class Stored(NamedTuple):
    fp8: int
    bf16: int
    scales: int
    biases: int
    tensors: int

    @property
    def elements(self) -> int:
        return self.fp8 + self.bf16 + self.scales + self.biases

    @property
    def bytes(self) -> int:
        return self.fp8 + BF16 * self.bf16 + FLOAT32 * (self.scales + self.biases)


def component_counts(config: Config) -> dict[str, Count]:
    """Main model by component, and the MTP modules."""
    model = config.model
    counts = dict.fromkeys(COMPONENTS, Count(0, 0))
    for weight in whole(config):
        elements = math.prod(weight.spec.shape)
        active = elements // model.n_routed_experts * model.num_experts_per_tok if weight.is_expert else elements
        if weight.component == "embedding":
            active = elements if model.tie_word_embeddings else 0
        counts[weight.component] = _plus(counts[weight.component], elements, active)
    bias = model.n_routed_experts if model.has_correction_bias else 0
    for name, layers in (("router", model.n_main_moe_layers), ("mtp", model.num_nextn_predict_layers)):
        counts[name] = _plus(counts[name], bias * layers, bias * layers)
    return counts


def _plus(count: Count, total: int, active: int) -> Count:
    return Count(count.total + total, count.active + active)


def stored_checkpoint(config: Config) -> Stored:
    model = config.model
    fp8 = bf16 = scales = tensors = 0
    for weight in whole(config):
        elements, stack = math.prod(weight.spec.shape), _stack(weight)
        tensors += stack
        if weight.is_matrix and weight.leaf not in NOT_IN_FP8:
            m = matrix(weight.spec.axes, weight.spec.shape)
            fp8, scales, tensors = fp8 + elements, scales + m.stack * _blocks(m.rows) * _blocks(m.columns), tensors + stack
        else:
            bf16 += elements
    copies = 2 * model.num_nextn_predict_layers
    biases = model.n_moe_layers if model.has_correction_bias else 0
    bf16 += copies * model.vocab_size * model.hidden_size
    return Stored(fp8, bf16, scales, biases * model.n_routed_experts, tensors + copies + biases)


def _stack(weight: Weight) -> int:
    """Tensors that a checkpoint keeps apart and our tree stacks."""
    stacked = zip(weight.spec.axes, weight.spec.shape, strict=True)
    return math.prod(size for axis, size in stacked if axis in ("layers", "experts"))


def _blocks(size: int) -> int:
    return math.ceil(size / BLOCK)


def quantised_bytes(elements: int, bits: int, group: int, scale_bits: int) -> Number:
    """Of integers of `bits` in groups that share a scale."""
    return elements * (bits + scale_bits / group) / 8


def cache_elements(model: ModelConfig, scheme: str, groups: int = 0) -> int:
    """Cached per token and layer: MLA's latent, or the keys and values of MHA, GQA (`groups` heads) or MQA [§2.1.1].

    The schemes compared with MLA have its head sizes without the rotary channels.
    """
    heads = {"mha": model.num_attention_heads, "gqa": groups, "mqa": 1}
    if scheme == "mla":
        return model.kv_lora_rank + model.qk_rope_head_dim
    return heads[scheme] * (model.qk_nope_head_dim + model.v_head_dim)


def cache_bytes_per_token(model: ModelConfig, bytes_per_element: int = BF16) -> int:
    """Of the main model's layers, in the attention that the config has: rotary channels included, unlike the schemes above."""
    if model.attention == "mla":
        elements = cache_elements(model, "mla")
    else:
        elements = model.n_key_value_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim)
    return model.num_hidden_layers * elements * bytes_per_element
