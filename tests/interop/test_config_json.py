"""config.json of every relative, old keys and new, and what is refused."""

import dataclasses
import json
import math
import warnings

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.interop.config_json import model_config, released_json
from dsv3_jax.interop.names import bias_names, leaves
from oracles import vectors
from oracles.cases import CASES, load_case
from oracles.from_checkpoint import FLOAT32
from oracles.from_checkpoint import model_config as independent_config
from oracles.released_folder import released_config

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
V2_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
V3_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
K2_YARN = V3_YARN | {"factor": 32, "beta_fast": 1.0}
SOFTMAX = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2,
           "num_experts_per_tok": 6, "rope_scaling": V2_YARN, "max_position_embeddings": 163840}  # fmt: skip
SIGMOID = {"scoring_func": "sigmoid", "norm_topk_prob": True, "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1,
           "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False}  # fmt: skip


def sizes(layers, dense, d, heads, q_lora, nope, v, f, m, experts, shared, k, groups, kept, scale, vocab, theta, eps, mtp):
    return {
        "num_hidden_layers": layers, "first_k_dense_replace": dense, "hidden_size": d, "num_attention_heads": heads,
        "num_key_value_heads": heads, "q_lora_rank": q_lora, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": nope, "v_head_dim": v, "intermediate_size": f, "moe_intermediate_size": m,
        "n_routed_experts": experts, "n_shared_experts": shared, "num_experts_per_tok": k, "n_group": groups,
        "topk_group": kept, "routed_scaling_factor": scale, "vocab_size": vocab, "rope_theta": theta, "rms_norm_eps": eps,
        "num_nextn_predict_layers": mtp,
    }  # fmt: skip


V3 = sizes(61, 3, 7168, 128, 1536, 128, 128, 18432, 2048, 256, 1, 8, 8, 4, 2.5, 129280, 10000, 1e-6, 1) | SIGMOID
MOONLIGHT = sizes(27, 1, 2048, 16, None, 128, 128, 11264, 1408, 64, 2, 6, 1, 1, 2.446, 163840, 50000.0, 1e-5, 0) | SIGMOID
KIMI = sizes(61, 1, 7168, 64, 1536, 128, 128, 18432, 2048, 384, 1, 8, 1, 1, 2.827, 163840, 50000.0, 1e-6, 0) | SIGMOID
GLM = sizes(47, 1, 2048, 20, 768, 192, 256, 10240, 1536, 64, 1, 4, 1, 1, 1.8, 154880, 1000000, 1e-5, 1) | SIGMOID
LITE = sizes(27, 1, 2048, 16, None, 128, 128, 10944, 1408, 64, 2, 6, 1, 1, 1.0, 102400, 10000, 1e-6, 0) | SOFTMAX
V2 = sizes(60, 1, 5120, 128, 1536, 128, 128, 12288, 1536, 160, 2, 6, 8, 3, 16.0, 102400, 10000, 1e-6, 0) | SOFTMAX
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
AUTO_MAP = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
AS_RELEASED = {"architectures": ["DeepseekV3ForCausalLM"], "auto_map": AUTO_MAP, "torch_dtype": "bfloat16", "use_cache": True,
               "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.02, "transformers_version": "4.33.1"}  # fmt: skip

RELATIVES = {
    "v3": V3 | AS_RELEASED | {"model_type": "deepseek_v3", "rope_scaling": V3_YARN, "quantization_config": FP8},
    "v3.1": V3 | AS_RELEASED | {"rope_scaling": V3_YARN, "quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "r1, older keys": V3 | {"rope_scaling": V3_YARN, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1},
    "moonlight": MOONLIGHT | {"model_type": "deepseek_v3", "rope_scaling": None, "max_position_embeddings": 8192,
                              "bos_token_id": 163584, "eos_token_id": 163586},
    "kimi k2": KIMI | {"model_type": "kimi_k2", "rope_scaling": K2_YARN, "quantization_config": FP8},
    "glm 4.7 flash": GLM | {"model_type": "glm4_moe_lite", "rope_scaling": None, "partial_rotary_factor": 1.0,
                            "eos_token_id": [154820, 154827]},
    "v2 lite": LITE | {"topk_method": "greedy", "aux_loss_alpha": 0.001, "seq_aux": True},
    "v2": V2 | {"topk_method": "group_limited_greedy"},
}  # fmt: skip
# Parameters without MTP, with the correction bias: each a count by hand, and published to three digits.
TOTALS = {
    "v3": 671_026_419_200, "v3.1": 671_026_419_200, "r1, older keys": 671_026_419_200, "moonlight": 15_960_110_208,
    "kimi k2": 1_026_408_232_448, "glm 4.7 flash": 29_943_393_920, "v2 lite": 15_706_484_224, "v2": 235_741_434_880,
}  # fmt: skip


def newer(released):
    """The same as transformers 5 writes it."""
    released = dict(released)
    rope = released.pop("rope_scaling") or {"type": "default"}
    rope = {"rope_type": rope["type"]} | rope | {"rope_theta": released.pop("rope_theta")}
    released |= {"rope_parameters": rope, "dtype": released.pop("torch_dtype", "float32"), "head_dim": 64, "qk_head_dim": 192}
    for key in ("scoring_func", "moe_layer_freq", "ep_size"):
        released.pop(key, None)
    if released.get("model_type", "deepseek_v3") == "deepseek_v3":
        released |= {"rope_interleave": True, "output_router_logits": False, "pad_token_id": None}
        released.pop("topk_method")
    if released.get("model_type") == "glm4_moe_lite":
        dense = released.pop("first_k_dense_replace")
        released["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (released["num_hidden_layers"] - dense)
        released.pop("topk_method")
    if released.get("n_group") == 1 and released.get("topk_method") == "greedy":
        released |= {"n_group": None, "topk_group": None}
    return released


@pytest.mark.parametrize("relative", RELATIVES)
@pytest.mark.parametrize("form", ["as released", "newer keys"])
def test_every_relative_is_understood(relative, form):
    released = RELATIVES[relative]
    config = model_config(released if form == "as released" else newer(released), "config.json")
    for name in set(released) & {f.name for f in dataclasses.fields(ModelConfig)} - {"rope_scaling"}:
        assert getattr(config, name) == released[name], name
    yarn = released["rope_scaling"]
    assert config.rope_scaling == (yarn and RopeScaling(**{k: v if k == "type" else type(getattr(RopeScaling(), k))(v)
                                                           for k, v in yarn.items()}))  # fmt: skip
    v2 = released.get("model_type") == "deepseek_v2"
    assert config.scoring_func == ("softmax" if v2 else "sigmoid") and config.norm_topk_prob is not v2
    assert config.has_correction_bias is not v2
    assert config.group_score_topk == (1 if config.topk_method == "group_limited_greedy" else 2)
    assert config.latent_norm_eps == 1e-6


@pytest.mark.parametrize("relative", RELATIVES)
def test_every_relative_has_its_published_number_of_parameters(relative):
    config = model_config(RELATIVES[relative] | {"num_nextn_predict_layers": 0}, "config.json")
    weights = sum(math.prod(leaf.stack) * math.prod(leaf.released_shape) for leaf in jax.tree.leaves(leaves(config)))
    assert weights + len(bias_names(config)) * config.n_routed_experts == TOTALS[relative]


@pytest.mark.parametrize("case", CASES)
def test_stored_configs_are_what_an_independent_reader_makes_of_them(case):
    released = load_case(case).config
    assert model_config(released, "config.json", initializer_range=0.006, **FLOAT32) == independent_config(released)


def test_yarn_without_mscale_leaves_the_softmax_scale_as_it_is():
    config = model_config(released_config(rope_scaling=YARN), "config.json")
    assert config.rope_scaling.mscale_all_dim == 0.0 and config.rope_scaling.factor == 40.0


WRONG = {
    "model_type": ("llama", "model_type: expected one of"),
    "index_topk": (2048, "sparse attention"),
    "vision_config": ({"x": 1}, "a vision tower"),
    "rope_interleave": (False, "rope_interleave: expected True"),
    "attention_bias": (True, "attention_bias"),
    "hidden_act": ("gelu", "hidden_act"),
    "hidden_size": ("64", "hidden_size: expected int, got '64'"),
    "num_hidden_layers": (2.0, "num_hidden_layers: expected int"),
    "norm_topk_prob": (1, "norm_topk_prob: expected bool"),
    "vocab_size": (-5, "vocab_size"),
    "qk_rope_head_dim": (5, "qk_rope_head_dim"),
    "n_group": (3, "n_group: expected a divisor"),
    "scoring_func": ("os:system", "scoring_func: expected a built-in one"),
    "topk_method": ("os.path:join", "topk_method: expected a built-in one"),
    "rope_scaling": ({"type": "linear", "factor": 2}, "rope_scaling: expected type yarn"),
    "rope_parameters": ({"rope_type": "yarn", "factor": 4}, "original_max_position_embeddings is missing"),
    "mlp_layer_types": (["sparse", "dense"], "mlp_layer_types"),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, "quant_method: expected 'fp8'"),
    "use_qk_norm": (True, "use_qk_norm"),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_what_means_another_model_is_refused(key):
    value, message = WRONG[key]
    with pytest.raises(ValueError, match=message) as error:
        model_config(released_config(**{key: value}), "x/config.json")
    assert str(error.value).startswith("x/config.json: ") and "\n" not in str(error.value)


def test_scales_of_other_blocks_are_refused():
    config = released_config(quantization_config=FP8 | {"weight_block_size": [64, 64]})
    with pytest.raises(ValueError, match=r"weight_block_size: expected \[128, 128\], got '\[64, 64\]'"):
        model_config(config, "config.json")


def test_a_missing_size_is_named_and_an_unknown_key_is_warned_of():
    config = released_config()
    del config["kv_lora_rank"]
    with pytest.raises(ValueError, match="kv_lora_rank is missing"):
        model_config(config, "config.json")
    with pytest.warns(UserWarning, match="ignored, since unknown: 'frobnicate'"):
        model_config(released_config(frobnicate=1), "config.json")


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
KEYS = sorted({*RELATIVES["v3"], *newer(RELATIVES["v3"]), "mlp_layer_types", "index_topk", "num_mtp_layers", "latent_norm_eps"})


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_value_is_understood_or_refused_in_one_line(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = model_config(released_config(**changes), "config.json")
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith("config.json: ") and "\n" not in str(error)
            assert len(str(error)) < 1500
        else:
            assert isinstance(config, ModelConfig)


@pytest.mark.parametrize("relative", RELATIVES)
def test_what_is_written_is_read_as_the_same_model(relative):
    config = model_config(RELATIVES[relative], "config.json", **FLOAT32)
    written = json.loads(json.dumps(released_json(config, dtype="float32")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every key that we write is a key that we know
        assert model_config(written, "config.json", **FLOAT32) == config


def test_fields_that_only_this_package_has_survive():
    ours = {"attention": "gqa", "num_key_value_heads": 4, "mtp_hidden": "pre_norm", "group_score_topk": 3}
    config = ModelConfig(**FLOAT32 | ours)
    assert model_config(released_json(config, dtype="float32"), "c", **FLOAT32) == config


def test_a_written_config_speaks_of_fp8_only_where_told_so():
    config = model_config(RELATIVES["v3"], "config.json")
    assert "quantization_config" not in released_json(config, dtype="bfloat16")
    assert released_json(config, dtype="bfloat16", quantization=FP8)["quantization_config"] == FP8
    assert vectors.V3_YARN["factor"] == released_json(config, dtype="bfloat16")["rope_scaling"]["factor"]
