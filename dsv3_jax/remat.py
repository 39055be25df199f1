"""Rematerialisation [§3.2.3]: the named values that the backward pass may keep, and the policies over them.

A policy says what is kept, not what is recomputed: as long as an unnamed value just before a named one may be kept, nothing
is ever recomputed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig

LATENT = "latent"  # MLA's compressed queries, keys and values, before their norms
ATTENTION = "attention"  # the core's output and log-sum-exp
RESIDUAL = "residual"  # the residual stream between attention and feed-forward
SWIGLU_INPUT = "swiglu_input"  # both pre-activations, of dense, shared and routed experts
ROUTER = "router"  # logits: kept by every policy, so that a recomputation cannot choose other experts

KEPT = {"report": (LATENT, ATTENTION, RESIDUAL, SWIGLU_INPUT, ROUTER), "full": (ROUTER,)}

name = checkpoint_name

# Elementwise functions keep their inputs alone, whatever the policy: recomputing the rest is cheaper than writing it to
# memory and reading it back.
keep_inputs = partial(jax.checkpoint, prevent_cse=False)


def rematerialised(function: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """`function` (one block) under the config's policy.

    none: whatever its operations ask for is kept; report: norms, MLA's up-projections and SwiGLU outputs are recomputed, as
    in the report; full: all of it is, from the block's input.
    """
    if config.remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT[config.remat])
    # Inside a scan XLA cannot undo the recomputation by common-subexpression elimination: the barrier is not needed.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)
