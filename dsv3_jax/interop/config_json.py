"""The released `config.json` <-> `ModelConfig`, for every relative of DeepSeek-V3 that shares its architecture [§4.2]."""

import dataclasses
import typing
import warnings
from collections.abc import Mapping
from typing import Any

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.fp8.quantize import FP8_BLOCK
from dsv3_jax.interop.safetensors import quoted

# What a released file says beside the fields of ModelConfig, and what it must say for this architecture to be meant.
EXPECTED: dict[str, Any] = {
    "rope_interleave": True,
    "attention_dropout": 0.0,
    "use_qk_norm": False,
    "mlp_bias": False,
    "use_bias": False,
    "head_dim": None,  # any: what these say follows from other fields
    "qk_head_dim": None,
    "partial_rotary_factor": None,
}
INERT = frozenset(
    """architectures auto_map model_type bos_token_id eos_token_id pad_token_id torch_dtype dtype transformers_version use_cache
    ep_size pretraining_tp seq_aux aux_loss_alpha quantization_config return_dict output_attentions output_hidden_states
    use_mla _name_or_path num_key_value_heads tie_encoder_decoder is_encoder_decoder unsloth_fixed id2label label2id
    chunk_size_feed_forward problem_type output_router_logits router_aux_loss_coef is_decoder pruned_heads torchscript
    tokenizer_class prefix cross_attention_hidden_size add_cross_attention finetuning_task task_specific_params
    keys_to_ignore_at_inference default_theta attention_scaling compression_config""".split()
)
MEANS_ANOTHER_MODEL = {
    "index_topk": "sparse attention (DeepSeek-V3.2)",
    "vision_config": "a vision tower",
    "text_config": "a model of several parts; its text_config alone may be one of this family",
    "hc_mult": "hyper-connections",
}
MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2", "glm4_moe_lite", "deepseek_v3_nextn")
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim", "intermediate_size")  # fmt: skip
# What a file means by leaving a field out, where that is not the released V3's value.
LEFT_OUT: dict[str, Any] = {
    "rope_scaling": None, "num_nextn_predict_layers": 0, "q_lora_rank": None, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "n_shared_experts": 0, "initializer_range": 0.02,
}  # fmt: skip
# Other names of our fields.
ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}  # the only one read
HINTS = typing.get_type_hints(ModelConfig)
OURS = ("attention", "latent_norm_eps", "mtp_hidden", "mtp_concat", "aux_loss_topk")  # written only where they are not V3's
NULL_MEANS_NONE = ("q_lora_rank", "rope_scaling")  # any other null is a field left out
YARN_LEFT_OUT = {"mscale": 1.0, "mscale_all_dim": 0.0}  # without mscale_all_dim the softmax scale stays as it is


def model_config(released: Mapping[str, Any], where: str, **changes: Any) -> ModelConfig:
    """The configuration that a config.json describes, with `changes` to fields that it does not speak of (numerics).

    Raises ValueError, one line that begins with `where`, for a model of another architecture, a missing or wrong field.
    Warns of keys that it does not know.
    """
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    released = {ALIASES.get(key, key): value for key, value in released.items()}
    for key, what in MEANS_ANOTHER_MODEL.items():
        if released.get(key):
            raise ValueError(f"{where}: {key} means {what}, which this architecture does not have")
    kind = released.get("model_type", MODEL_TYPES[0])
    if kind not in MODEL_TYPES:
        raise ValueError(f"{where}: model_type: expected one of {', '.join(MODEL_TYPES)}, got {quoted(kind)}")
    _check_quantization(released.get("quantization_config"), where)
    for key, wanted in EXPECTED.items():
        if wanted is not None and released.get(key, wanted) not in (wanted, None):
            raise ValueError(f"{where}: {key}: expected {wanted!r}, got {quoted(released[key])}")
    missing = [name for name in REQUIRED if name not in released]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    for name in ("scoring_func", "topk_method"):
        if ":" in str(released.get(name)):  # a stranger's file does not choose what is imported
            raise ValueError(f"{where}: {name}: expected a built-in one, got {quoted(released[name])}")
    rope = _rope(released, where)
    unknown = sorted(set(released) - fields - INERT - set(EXPECTED) - {"rope_parameters", "mlp_layer_types"})
    if unknown:
        warnings.warn(f"{where}: ignored, since unknown: {', '.join(map(quoted, unknown[:20]))}", stacklevel=2)
    given = {k: v for k, v in released.items() if k in fields and (v is not None or k in NULL_MEANS_NONE)}
    values = {**LEFT_OUT, **_router(released), **_dense(released, where), **given, **rope}
    try:
        return ModelConfig(**{name: _typed(name, value) for name, value in (values | changes).items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check_quantization(given: Any, where: str) -> None:
    for key, wanted in FP8_CONFIG.items() if given is not None else ():
        found = given.get(key, wanted) if isinstance(given, Mapping) else given
        if found != wanted:
            raise ValueError(f"{where}: quantization_config: {key}: expected {wanted!r}, got {quoted(found)}")


def _dense(released: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How many layers come before the first with experts, where a newer file lists every layer's kind instead."""
    kinds = released.get("mlp_layer_types")
    if kinds is None:
        first = 1 if released.get("model_type") == "glm4_moe_lite" else 0
        return {"first_k_dense_replace": first}
    n = kinds.count("dense") if isinstance(kinds, list) else 0
    alike = isinstance(kinds, list) and len(kinds) == released["num_hidden_layers"]
    if not alike or kinds[:n] != ["dense"] * n or any(kind != "sparse" for kind in kinds[n:]):
        raise ValueError(f"{where}: mlp_layer_types: expected 'dense' for the first layers, 'sparse' for the others")
    return {"first_k_dense_replace": n}


def _router(released: Mapping[str, Any]) -> dict[str, Any]:
    """What a file that leaves it out means: V2's softmax and best score of a group, or V3's sigmoid and sum of two."""
    score = released.get("scoring_func") or ("softmax" if released.get("model_type") == "deepseek_v2" else "sigmoid")
    softmax = score == "softmax"
    method = released.get("topk_method") or ("greedy" if softmax else "noaux_tc")
    best = 1 if method == "group_limited_greedy" else 2
    return {"scoring_func": score, "topk_method": method, "norm_topk_prob": not softmax, "group_score_topk": best}


def _rope(released: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, from the released files' two keys or the newer `rope_parameters`."""
    given = released.get("rope_parameters") or released.get("rope_scaling")
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{where}: rope_scaling: expected an object or null, got {quoted(given)}")
    scaling = dict(given or {})
    theta = scaling.pop("rope_theta", released.get("rope_theta", 10000.0))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    scaling.pop("partial_rotary_factor", None)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise ValueError(f"{where}: rope_scaling: expected type yarn, got {quoted(kind)}")
    names = {f.name for f in dataclasses.fields(RopeScaling)}
    if set(scaling) - names - {"truncate", "attention_factor"} or scaling.get("attention_factor") is not None:
        raise ValueError(
            f"{where}: rope_scaling: expected the fields {', '.join(sorted(names))}, got {quoted(', '.join(scaling))}"
        )
    if not scaling.get("truncate", True):
        raise ValueError(f"{where}: rope_scaling: truncate=false is not this family's YaRN")
    for name in ("factor", "original_max_position_embeddings"):
        if name not in scaling:
            raise ValueError(f"{where}: rope_scaling: {name} is missing")
    try:
        yarn = RopeScaling(**{k: _number(k, v) for k, v in (YARN_LEFT_OUT | scaling).items() if k in names})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: rope_scaling: {error}") from None
    return {"rope_theta": theta, "rope_scaling": yarn}


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {quoted(value)}")
    return int(value) if name == "original_max_position_embeddings" else float(value)


def _typed(name: str, value: Any) -> Any:
    """JSON's 10000 as the float that it stands for; anything else of a wrong type is refused."""
    hint = HINTS[name]
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {quoted(value)}")
        return value
    kinds = tuple(k for k in (typing.get_args(hint) or (hint,)) if isinstance(k, type))
    if RopeScaling in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{name}: expected {wanted}, got {quoted(value)}")
    return value


def released_json(config: ModelConfig, *, dtype: str, quantization: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config.json for `config`: the released file's keys, then those fields of ours that it could not be read from."""
    ours = dataclasses.asdict(config)
    for name in ("param_dtype", "compute_dtype", "remat", *(name for name in ours if name.endswith("_implementation"))):
        del ours[name]
    yarn = ours.pop("rope_scaling")
    family = {"kind": "deepseek_v3", "class": "DeepseekV3ForCausalLM"}
    if config.topk_method in ("greedy", "group_limited_greedy"):
        family = {"kind": "deepseek_v2", "class": "DeepseekV2ForCausalLM"}
    values: dict[str, Any] = {
        "architectures": [family["class"]],
        "model_type": family["kind"],
        **ours,
        "rope_scaling": yarn,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
        "use_cache": True,
        **({"quantization_config": dict(quantization)} if quantization else {}),
    }
    implied = {name: getattr(ModelConfig(), name) for name in OURS} | _router(values)
    for name in (*OURS, "group_score_topk"):
        if values[name] == implied[name]:
            del values[name]
    return dict(sorted(values.items()))
