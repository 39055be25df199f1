"""Known numbers of DeepSeek-V3, typed in once: rotary frequencies, router choices, balance loss, MTP alignment."""

from typing import Any

import numpy as np

# Rotary settings of the released models; `rope_scaling` as in config.json.
V3_YARN: dict[str, Any] = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
V3_ROPE: dict[str, Any] = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_theta": 10000, "rope_scaling": V3_YARN}
V3_ROPE_PRETRAINING: dict[str, Any] = V3_ROPE | {"rope_scaling": None}  # 4K context, before YaRN
V2_ROPE: dict[str, Any] = V3_ROPE | {"rope_scaling": V3_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}

# YaRN frequency of rotary pair j with V3_ROPE, ten significant digits. Plain RoPE up to pair 10, a fortieth from pair 23.
V3_YARN_FREQUENCIES = {
    0: 1.0, 4: 3.162277660e-1, 8: 1e-1, 10: 5.623413252e-2, 11: 3.900692657e-2, 12: 2.687936011e-2, 13: 1.837814622e-2,
    14: 1.244795587e-2, 15: 8.334508951e-3, 16: 5.5e-3, 17: 3.561997494e-3, 18: 2.249365301e-3, 19: 1.370513636e-3,
    20: 7.905694150e-4, 21: 4.149903985e-4, 22: 1.778279410e-4, 23: 3.333803580e-5, 24: 2.5e-5, 28: 7.905694150e-6,
    31: 3.333803580e-6,
}  # fmt: skip
V3_LAST_PLAIN_PAIR, V3_FIRST_INTERPOLATED_PAIR = 10, 23

SOFTMAX_SCALE_V3_PRETRAINING = 0.0721687836
SOFTMAX_SCALE_V3_YARN = 0.1352337789
SOFTMAX_SCALE_V2_YARN = 0.1147214

# Router with groups: the settings are keyword arguments of `numpy_moe.route_token`.
ROUTER_SETTINGS: dict[str, Any] = {
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "group_score_topk": 2,
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
ROUTER_LOGITS = np.array([2, -1, 0.5, 0, 1, 1, -2, 0.3, -0.5, 1.5, 0.2, -1.5, 0.9, 0.8, 0.7, 0.6])
ROUTER_BIAS = np.array([-0.30, 0.05, 0, 0.10, 0, -0.05, 0.02, 0, 0.10, -0.10, 0, 0, 0, 0.03, 0, -0.02])
ROUTER_WITH_BIAS: dict[str, list] = {
    "group_scores": [1.222459, 1.412117, 1.267408, 1.430924],
    "kept_groups": [1, 3],
    "indices": [4, 13, 12, 5],
    "gates": [0.638358, 0.602484, 0.620799, 0.638358],
}
ROUTER_WITHOUT_BIAS: dict[str, list] = {  # experts 4 and 5 tie: the lower index comes first
    "group_scores": [1.503256, 1.462117, 1.367408, 1.400924],
    "kept_groups": [0, 1],
    "indices": [0, 4, 5, 2],
    "gates": [0.742568, 0.616329, 0.616329, 0.524773],
}

# Dropped groups must be filled with -inf: a kept group with negative biased scores loses to a fill of 0.
FILL_SETTINGS: dict[str, Any] = ROUTER_SETTINGS | {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 1}
FILL_LOGITS = np.array([1, 0, -5, -6, 0.5, -5, -6, -6])
FILL_BIAS = np.array([0, 0, -0.9, -0.9, 0, -0.9, -0.9, -0.9])
FILL_KEPT_GROUP = 0
FILL_MINUS_INF: dict[str, list] = {"indices": [0, 1, 2], "gates": [1.476586, 1.009896, 0.013518]}
FILL_ZERO: dict[str, list] = {
    "indices": [0, 1, 4],
    "gates": [0.986042, 0.674393, 0.839565],
}  # the bug: expert 4 is in the dropped group

# Balance: 4 tokens, 4 experts, top-2 by sigmoid score without groups or bias.
BALANCE_LOGITS = np.array([[1, 0, -1, 0.5], [0.2, 0.4, -0.3, 0.1], [2, -1, 0, 0], [0, 1, 1.5, -0.5]])
BALANCE_SETTINGS: dict[str, Any] = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
BALANCE_COUNTS = [3, 2, 2, 1]
BALANCE_F = [1.5, 1.0, 1.0, 0.5]
BALANCE_P = [0.305548, 0.236805, 0.224754, 0.232893]
BALANCE_LOSS = 1.0363273  # before the coefficient
BALANCE_ALPHA, BALANCE_LOSS_TIMES_ALPHA = 1e-4, 1.0363273e-4
BIAS_RATE, BIAS_AFTER_ONE_STEP = 1e-3, [-0.001, 0.0, 0.0, 0.001]
MAX_VIOLATION = 0.5

# Multi-token prediction on tokens a b c d e = 0 1 2 3 4, of which a..d are inputs.
# depth -> per counted position: (position, token whose embedding joins it or None, target).
MTP_TOKENS = np.array([[0, 1, 2, 3, 4]])
MTP_LENGTH = 4
MTP_ALIGNMENT: dict[int, list[tuple[int, int | None, int]]] = {
    0: [(0, None, 1), (1, None, 2), (2, None, 3), (3, None, 4)],
    1: [(0, 1, 2), (1, 2, 3), (2, 3, 4)],
    2: [(0, 2, 3), (1, 3, 4)],
}
