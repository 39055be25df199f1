"""The router's choice in one pass over its logits: scores, group limit, top-k and gates, eqs. 12-16 [§2.1.2]; float32.

The bias moves the choice only: no gradient flows through it, nor through the choice. The gradient is plain JAX from the scores.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.modes import Mode, mode_of
from dsv3_jax.kernels.router import pallas_gpu, pallas_tpu, reference
from dsv3_jax.kernels.router.call import Choose, How, Routed, gates_of

IMPLEMENTATIONS: dict[str, Choose] = {
    "reference": reference.choose,
    "pallas_tpu": pallas_tpu.choose,
    "pallas_gpu": pallas_gpu.choose,
}
SCORES = ("sigmoid", "softmax")
METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


class Choice(NamedTuple):
    """What was decided for every token."""

    indices: Int[Array, "*batch K"]  # int32, by descending biased score, ties to the lower id
    gates: Float[Array, "*batch K"]  # normalised and scaled
    scores: Float[Array, "*batch E"]  # affinities, unbiased
    margin: Float[Array, "*batch"]  # biased score of the last expert chosen minus that of the first one not; inf if none


def choose(logits: Float[Array, "*batch E"], bias_E: Float[Array, " E"], config: ModelConfig, *, implementation: str) -> Choice:
    """`moe.router.route` from its logits on; differentiable in the logits. Both operands are float32, the bias finite.

    Whatever a token's logits hold, its experts are distinct, and no other token's are moved; the kernels choose a NaN first.
    `implementation`: one of IMPLEMENTATIONS; see `kernels.modes`. Raises ValueError for another one, for a score function or a
    selector that no kernel has, and for operands of another dtype or number of experts.
    """
    mode = mode_of(implementation, tuple(IMPLEMENTATIONS))
    how = how_of(config)
    experts = config.n_routed_experts
    for name, operand in (("logits", logits), ("bias_E", bias_E)):
        if operand.dtype != jnp.float32 or operand.shape[-1:] != (experts,):
            raise ValueError(f"{name}: expected float32 [..., {experts}], got {operand.dtype} {list(operand.shape)}")
    batch = logits.shape[:-1]
    flat = logits.reshape(math.prod(batch), experts)
    if flat.shape[0] == 0:
        mode = Mode("reference")
    indices, gates, scores, margin = _choose(flat, jax.lax.stop_gradient(bias_E), how, mode)
    return Choice(
        indices.reshape(*batch, how.k), gates.reshape(*batch, how.k), scores.reshape(logits.shape), margin.reshape(batch)
    )  # fmt: skip


def how_of(config: ModelConfig) -> How:
    """Raises ValueError where a setting is a function of somebody else's."""
    for setting, known in (("scoring_func", SCORES), ("topk_method", METHODS)):
        if (value := getattr(config, setting)) not in known:
            raise ValueError(f"{setting}: expected one that the kernels have, {', '.join(known)}, got {value!r}")
    groups = config.n_group
    return How(
        config.scoring_func, config.num_experts_per_tok, groups,
        groups if config.topk_method == "greedy" else config.topk_group, config.group_score_topk,
        config.norm_topk_prob, config.routed_scaling_factor,
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _choose(logits_NE: Array, bias_E: Array, how: How, mode: Mode) -> Routed:
    return IMPLEMENTATIONS[mode.implementation](logits_NE, bias_E, how, interpret=mode.interpret)


def _forward(logits_NE: Array, bias_E: Array, how: How, mode: Mode) -> tuple[Routed, Any]:
    routed = _choose(logits_NE, bias_E, how, mode)
    return routed, (routed.scores_NE, routed.indices_NK)


def _backward(how: How, mode: Mode, saved: Any, d: Routed) -> tuple[Array, None]:
    scores_NE, indices_NK = saved

    def gates(scores_NE: Array) -> Array:
        own_NKE = indices_NK[:, :, None] == jnp.arange(scores_NE.shape[1], dtype=jnp.int32)[None, None, :]
        # A masked sum instead of a gather: its gradient is elementwise, where a gather's would be a scatter.
        return gates_of(jnp.where(own_NKE, scores_NE[:, None, :], 0.0).sum(axis=-1), how, 1)

    ds_NE = d.scores_NE + jax.vjp(gates, scores_NE)[1](d.gates_NK)[0]
    if how.scoring == "sigmoid":
        dlogits_NE = ds_NE * scores_NE * (1 - scores_NE)
    else:
        dlogits_NE = scores_NE * (ds_NE - (scores_NE * ds_NE).sum(axis=1, keepdims=True))
    return dlogits_NE, None


_choose.defvjp(_forward, _backward)
