"""Random tensors in released names and orientation for any small config: the cases that no stored checkpoint covers."""

from typing import Any

import numpy as np

from oracles.numpy_attention import key_value_heads
from oracles.numpy_model import is_moe_layer

SMALL_CONFIG: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 12, "vocab_size": 50,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> (out, in) of every tensor of a checkpoint, without the copies of embedding and head that MTP stores."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    d_n, d_r, d_v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    d_q, d_c, width = config["q_lora_rank"], config["kv_lora_rank"], config["moe_intermediate_size"]

    def mlp(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj.weight": (inner, d),
            f"{prefix}up_proj.weight": (inner, d),
            f"{prefix}down_proj.weight": (d, inner),
        }

    def attention(prefix: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}o_proj.weight": (d, heads * d_v)}
        if config.get("attention", "mla") != "mla":
            kv_heads = key_value_heads(config)
            return shapes | {
                f"{prefix}q_proj.weight": (heads * (d_n + d_r), d),
                f"{prefix}k_proj.weight": (kv_heads * (d_n + d_r), d),
                f"{prefix}v_proj.weight": (kv_heads * d_v, d),
            }
        if d_q:
            shapes |= {
                f"{prefix}q_a_proj.weight": (d_q, d),
                f"{prefix}q_a_layernorm.weight": (d_q,),
                f"{prefix}q_b_proj.weight": (heads * (d_n + d_r), d_q),
            }
        else:
            shapes |= {f"{prefix}q_proj.weight": (heads * (d_n + d_r), d)}
        return shapes | {
            f"{prefix}kv_a_proj_with_mqa.weight": (d_c + d_r, d),
            f"{prefix}kv_a_layernorm.weight": (d_c,),
            f"{prefix}kv_b_proj.weight": (heads * (d_n + d_v), d_c),
        }

    def moe(prefix: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}gate.weight": (config["n_routed_experts"], d)}
        if config["topk_method"] == "noaux_tc":
            shapes |= {f"{prefix}gate.e_score_correction_bias": (config["n_routed_experts"],)}
        for expert in range(config["n_routed_experts"]):
            shapes |= mlp(f"{prefix}experts.{expert}.", width)
        if config["n_shared_experts"]:
            shapes |= mlp(f"{prefix}shared_experts.", config["n_shared_experts"] * width)
        return shapes

    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
        "lm_head.weight": (config["vocab_size"], d),
    }
    main_layers = config["num_hidden_layers"]
    for layer in range(main_layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}input_layernorm.weight": (d,), f"{prefix}post_attention_layernorm.weight": (d,)}
        shapes |= attention(f"{prefix}self_attn.")
        is_moe = is_moe_layer(layer, config)
        shapes |= moe(f"{prefix}mlp.") if is_moe else mlp(f"{prefix}mlp.", config["intermediate_size"])
        if layer >= main_layers:
            shapes |= {
                f"{prefix}enorm.weight": (d,),
                f"{prefix}hnorm.weight": (d,),
                f"{prefix}eh_proj.weight": (d, 2 * d),
                f"{prefix}shared_head.norm.weight": (d,),
            }
    return shapes


def random_tensors(config: dict[str, Any], seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Weights that keep activations near one, gains near one, a correction bias large enough to change choices."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("e_score_correction_bias"):
            values = 0.1 * rng.standard_normal(shape)
        elif len(shape) == 1:
            values = 1.0 + 0.2 * rng.standard_normal(shape)
        elif name == "model.embed_tokens.weight":
            values = rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) * shape[1] ** -0.5
        tensors[name] = values.astype(dtype)
    return tensors
