"""FLOPs of a step as the implementation executes them, beside the useful ones [§3.2.3, Table 1].

Executed beyond the usual convention: what the remat policy computes again, scores that the attention's backward pass
recomputes, keys beyond the diagonal in its blocks, and products that every tensor rank repeats.
"""

import math
from typing import NamedTuple

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import MAX_BLOCKS, MIN_BLOCK
from dsv3_jax.model.flops import training_flops_per_token
from dsv3_jax.parallel.mesh import EXPERT
from dsv3_jax.planner.parameters import NOT_IN_FP8
from dsv3_jax.planner.rows import Number
from dsv3_jax.planner.share import Share, Weight, in_kernel

# Products whose results no policy but `none` keeps: what MLA expands from its latents, other attentions' projections, and the
# MTP module's projection of its pair. `full` repeats all but the router's and a block's last one, whose result nothing reads.
EXPANSIONS = ("q_b_proj", "kv_b_proj", "q_proj", "k_proj", "v_proj", "eh_proj")
NEVER_REPEATED = ("down_proj", "gate")
EXPERT_INPUTS = ("gate_proj", "up_proj")


class Work(NamedTuple):
    """FLOPs of one token, summed over the tensor ranks that share it."""

    linear: float = 0  # products that the report runs in FP8
    linear_repeated: float = 0
    attention: float = 0  # scores and weighted values
    attention_repeated: float = 0
    other: float = 0  # head, router, MTP's projection
    other_repeated: float = 0

    @property
    def total(self) -> Number:
        return sum(self)


def causal_pairs(length: int, *, kernel: bool = False) -> int:
    """(query, key) pairs that attention computes: each block of queries reads the keys up to its last one.

    A kernel's blocks are so small that those on the diagonal are not counted, and its own estimate does not.
    """
    if kernel:
        return length * (length + 1) // 2
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    return sum((end - start) * end for start, end in ends)


def repeats(weight: Weight, remat: str, *, exchanged: bool) -> bool:
    """Whether the backward pass computes a weight's forward product again."""
    if not weight.is_matrix or weight.group in ("embed_tokens", "lm_head"):
        return False
    if weight.is_expert and exchanged:  # whatever the policy: the exchange keeps the layer's input alone
        return weight.leaf in EXPERT_INPUTS
    if remat == "full":
        return weight.leaf not in NEVER_REPEATED
    return remat == "report" and weight.leaf in EXPANSIONS


def executed(share: Share) -> Work:
    """Forward and backward, of one token."""
    model, work = share.config.model, Work()
    for weight in share.weights:
        if not weight.is_matrix or weight.group == "embed_tokens":
            continue
        kind = "other" if weight.leaf in NOT_IN_FP8 else "linear"
        once = 6 * _met(weight, model) * _passes(weight, model)
        work = _add(work, kind, once, _products(share, weight) - once)
    if model.tie_word_embeddings:
        work = _add(work, "other", 6 * model.vocab_size * model.hidden_size * (1 + model.num_nextn_predict_layers), 0)
    return _add_attention(work, model, share.config.data.seq_len)


def padding(share: Share, *, every_expert: bool = False) -> Number:
    """FLOPs that a token's step would take besides, if the experts multiplied all rows that a round has room for.

    With `every_expert`, if each of a device's experts did.
    """
    experts = sum(_products(share, weight) for weight in share.weights if weight.is_expert)
    times = share.config.model.n_routed_experts // share.sizes[EXPERT] if every_expert else 1
    return experts * (times * share.received_rows / share.rows - 1)


def _products(share: Share, weight: Weight) -> Number:
    """FLOPs of one token with one weight, in all passes of a step."""
    model, exchanged = share.config.model, share.sizes[EXPERT] > 1
    passes = 3 * _passes(weight, model) + repeats(weight, model.remat, exchanged=exchanged)
    return 2 * share.tensor * visited(share, weight) * passes


def visited(share: Share, weight: Weight) -> Number:
    """Elements of a device's piece that one of its tokens is multiplied with."""
    model = share.config.model
    if not weight.is_expert:
        return weight.compute
    return weight.compute * share.sizes[EXPERT] / model.n_routed_experts * model.num_experts_per_tok


def _met(weight: Weight, model: ModelConfig) -> int:
    """Elements of a whole weight that a token is multiplied with."""
    elements = math.prod(weight.spec.shape)
    return elements // model.n_routed_experts * model.num_experts_per_tok if weight.is_expert else elements


def _passes(weight: Weight, model: ModelConfig) -> int:
    """The head reads every depth's hidden states."""
    return 1 + model.num_nextn_predict_layers if weight.group == "lm_head" else 1


def _add(work: Work, kind: str, once: Number, again: Number) -> Work:
    repeated = f"{kind}_repeated"
    return work._replace(**{kind: getattr(work, kind) + once, repeated: getattr(work, repeated) + again})


def _add_attention(work: Work, model: ModelConfig, length: int) -> Work:
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    keys, values = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    per_pair = 2 * layers * model.num_attention_heads
    pairs = causal_pairs(length, kernel=in_kernel(model)) / length  # per query
    useful = 3 * per_pair * (keys + values) * length / 2
    # forward two products; backward the scores again, then two products for each of the two
    products = 3 * (keys + values) + keys + (keys + values if model.remat == "full" else 0)
    return _add(work, "attention", useful, per_pair * products * pairs - useful)


def full_window_flops(model: ModelConfig, length: int) -> int:
    """Useful FLOPs per token of the main model, if attention had to read the whole window, as some published figures count."""
    channels = model.num_attention_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim)
    return training_flops_per_token(model, length, mtp=False) + 3 * model.num_hidden_layers * channels * length
