"""Configuration of model, training, data and layout [§3, §4.2]: the defaults are the published DeepSeek-V3 recipe.

Model fields bear the names of the released `config.json`. Every dataclass is frozen and validates itself. Setting fields by
name, JSON and the differences from the published recipe: `settings.py`.
"""

import typing
from dataclasses import dataclass, field
from typing import Literal

from dsv3_jax.checks import require, require_choice, require_known, require_positive

PALLAS = Literal["pallas_tpu", "pallas_gpu", "pallas_tpu:interpret", "pallas_tpu:simulate", "pallas_gpu:interpret"]
EXPERTS = Literal["auto", "bucketed", "ragged_dot", "dense", PALLAS]
ATTENTION = Literal["auto", "blockwise", PALLAS]
DECODE = Literal["auto", "views", PALLAS]
ROUTER = Literal["auto", "top_k", PALLAS]
FP8_PRODUCTS = Literal["auto", "xla", PALLAS]
DTYPES = Literal["float32", "bfloat16"]
FP8_FORMATS = Literal["e4m3", "e5m2"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN [§4.3]; the released `rope_scaling` entry."""

    type: Literal["yarn"] = "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        require_choice(self)
        require_positive(self, "original_max_position_embeddings", "beta_fast", "beta_slow")
        require(self.factor >= 1, f"rope_scaling.factor: expected at least 1, got {self.factor}")


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """FP8 training [§3.3], every ingredient by itself; the defaults are the report's. What follows: `fp8/precision.py`."""

    activation_format: FP8_FORMATS = "e4m3"
    weight_format: FP8_FORMATS = "e4m3"
    gradient_format: FP8_FORMATS = "e4m3"  # others take e5m2
    tile: int = 128  # values that share a scale: 1 x tile of activations and gradients, tile x tile of weights
    scaling: Literal["fine", "tensor", "delayed"] = "fine"  # one a tile; one a tensor; one a tensor, from the steps before
    amax_history: int = 16  # steps that delayed scaling looks back
    gradient_scaling: Literal["tile", "block"] = "tile"  # block: tile x tile, which diverged in the report's trial
    power_of_two: Literal["report", "everywhere", "nowhere"] = "report"  # which scales are: after attention, at the exchange
    amax_floor: float = 1e-30  # released code has 1e-4, not stated for training: above most gradients of a mean loss
    accumulation: Literal["float32", "promoted", "tensor_core"] = "float32"
    accumulator: Literal["aligned", "apart"] = "aligned"  # whether it joins the products' alignment; H200s' does
    promotion_interval: int = 128
    attention_cache: Literal["e5m6", "e4m3", "compute"] = "e5m6"  # the attention's output, between forward and backward
    swiglu_cache: Literal["e4m3", "compute"] = "e4m3"  # SwiGLU's inputs
    dispatch: Literal["e4m3", "compute"] = "e4m3"  # rows on their way to experts, and their gradients
    router: bool = False  # the gate as well, which the report leaves in its own precision

    def __post_init__(self) -> None:
        require_choice(self)
        require_positive(self, "tile", "amax_history", "promotion_interval")
        require(
            self.amax_floor >= 1e-32, f"amax_floor: expected at least 1e-32, a scale being a number too, got {self.amax_floor}"
        )
        require(
            self.promotion_interval % 32 == 0,
            f"promotion_interval: expected a multiple of 32, the products that a tensor core adds at once, "
            f"got {self.promotion_interval}",
        )

    @property
    def fits_kernels(self) -> bool:
        """Whether our kernels compute its products: a scale for each 128 values, sums in float32."""
        return (self.tile, self.scaling, self.gradient_scaling, self.accumulation) == (128, "fine", "tile", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture [§2, §4.2] and numerics. Defaults: the released DeepSeek-V3 `config.json`."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # the latents' norms keep 1e-6 in released code, whatever rms_norm_eps says
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    initializer_range: float = 0.006  # [§4.2]; the released file's 0.02 was not used for training

    # attention [§2.1.1]; `gqa` reads num_key_value_heads, the others ignore it as released code does
    attention: Literal["mla", "mha", "gqa", "mqa"] = "mla"
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: Literal[False] = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    max_position_embeddings: int = 163840

    # feed-forward and mixture of experts [§2.1.2]
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    scoring_func: str = "sigmoid"  # sigmoid | softmax | package.module:function
    topk_method: str = "noaux_tc"  # noaux_tc | group_limited_greedy | greedy | package.module:function
    n_group: int = 8
    topk_group: int = 4
    group_score_topk: int = 2  # a group's score is the sum of its so many largest biased scores (V2: 1)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    aux_loss_topk: Literal["selected", "unbiased"] = "selected"  # eq. 18 counts the unbiased top-k; code what was chosen

    # multi-token prediction [§2.2]
    num_nextn_predict_layers: int = 1
    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"  # not disclosed; released weights need post_norm
    mtp_concat: Literal["embedding_first", "hidden_first"] = "embedding_first"  # eq. 21 writes the other order

    # numerics
    param_dtype: DTYPES = "float32"
    compute_dtype: DTYPES = "bfloat16"
    fp8: Fp8Recipe | None = None  # null: linear layers in the compute dtype; the published run had the recipe's defaults
    remat: Literal["none", "report", "full"] = "report"
    # auto: our kernels on TPU and Hopper GPUs; elsewhere bucketed or ragged_dot, blockwise, top_k, views
    experts_implementation: EXPERTS = "auto"
    attention_implementation: ATTENTION = "auto"  # in training
    decode_implementation: DECODE = "auto"  # attention over a cache of latents
    router_implementation: ROUTER = "auto"
    fp8_implementation: FP8_PRODUCTS = "auto"  # of linear operations in FP8, and of rounding their operands

    def __post_init__(self) -> None:
        require_choice(self)
        require_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps", "latent_norm_eps", "initializer_range",
            "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_theta",
            "max_position_embeddings", "intermediate_size", "routed_scaling_factor",
        )  # fmt: skip
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim: expected an even number, got {self.qk_rope_head_dim}")
        require(self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank: expected null or > 0, got {self.q_lora_rank}")
        require(self.moe_layer_freq == 1, f"moe_layer_freq: only 1 exists in this family, got {self.moe_layer_freq}")
        require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace: expected 0..num_hidden_layers={self.num_hidden_layers}, got {self.first_k_dense_replace}",
        )
        require(
            self.num_nextn_predict_layers >= 0,
            f"num_nextn_predict_layers: expected 0 or more, got {self.num_nextn_predict_layers}",
        )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.attention == "gqa":
            require(
                kv_heads > 0 and heads % kv_heads == 0,
                f"num_key_value_heads: gqa expects a divisor of num_attention_heads={heads}, got {kv_heads}",
            )
        require(
            self.fp8 is None or self.experts_implementation != "dense",
            "experts_implementation: FP8 has auto, bucketed, ragged_dot and kernels, got 'dense'",
        )
        for name in ("fp8_implementation", "experts_implementation"):
            require(
                self.fp8 is None or self.fp8.fits_kernels or getattr(self, name) not in typing.get_args(PALLAS),
                f"{name}: kernels have FP8 with tile=128, scaling=fine, gradient_scaling=tile and accumulation=float32, "
                "got another recipe; expected auto",
            )
        for name, plain in (("attention_implementation", "blockwise"), ("decode_implementation", "views")):
            require(
                self.attention == "mla" or getattr(self, name) in ("auto", plain),
                f"{name}: kernels are for attention=mla, got {getattr(self, name)!r}; expected auto or {plain}",
            )
        if self.n_moe_layers:
            self._validate_router()

    def _validate_router(self) -> None:
        require_known("scoring_func", self.scoring_func, ("sigmoid", "softmax"))
        require_known("topk_method", self.topk_method, ("noaux_tc", "group_limited_greedy", "greedy"))
        require_positive(self, "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
        experts, groups, kept, k = self.n_routed_experts, self.n_group, self.topk_group, self.num_experts_per_tok
        require(self.n_shared_experts >= 0, f"n_shared_experts: expected 0 or more, got {self.n_shared_experts}")
        require(experts % groups == 0, f"n_group: expected a divisor of n_routed_experts={experts}, got {groups}")
        require(kept <= groups, f"topk_group: expected at most n_group={groups}, got {kept}")
        size = experts // groups
        require(
            0 < self.group_score_topk <= size or groups == 1,
            f"group_score_topk: expected 1..{size} (experts in a group), got {self.group_score_topk}",
        )
        eligible = experts if self.topk_method == "greedy" else kept * size
        require(
            k <= eligible,
            f"num_experts_per_tok: expected at most {eligible}, the experts that a token may choose from "
            f"(topk_group={kept} of n_group={groups} groups of {size}), got {k}",
        )

    @property
    def n_dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def n_moe_layers(self) -> int:
        """Layers with a router: the main model's after the dense ones, and one for each MTP depth."""
        return self.num_hidden_layers - self.first_k_dense_replace + self.num_nextn_predict_layers

    @property
    def n_main_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def has_correction_bias(self) -> bool:
        """Whether a checkpoint of this model stores `e_score_correction_bias` (V2's two methods have none)."""
        return self.topk_method not in ("group_limited_greedy", "greedy")

    @property
    def n_key_value_heads(self) -> int:
        """Key/value heads that the attention really has."""
        return {"gqa": self.num_key_value_heads, "mqa": 1}.get(self.attention, self.num_attention_heads)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Objective, optimiser and schedules [§4.2]; points in tokens are the published run's and scale with the run.

    A schedule point `p` of the published 14.8T tokens (`schedule_tokens`) falls at `p * total / schedule_tokens` of a
    run of `total` tokens. Steps (`warmup_steps`) do not scale.
    """

    steps: int | None = None  # the run's length: so many optimiser steps ...
    train_tokens: float | None = 14.8e12  # ... or so many tokens, when steps is null
    seed: int = 0
    init_ulps: int = 0  # initial parameters moved by so many units in the last place: a control, what chaos alone does
    schedule_tokens: float = 14.8e12

    batch_size: int = 15360  # sequences per optimiser step
    batch_size_start: int = 3072  # equal to batch_size: no ramp
    batch_ramp_tokens: float = 469e9  # linear in tokens; the ramp's shape is not disclosed
    micro_batch_size: int | None = None  # sequences per forward pass; null: the whole batch

    learning_rate: float = 2.2e-4
    learning_rate_min: float = 2.2e-5
    learning_rate_final: float = 7.3e-6
    warmup_steps: int = 2000
    lr_decay_start_tokens: float = 10e12
    lr_decay_end_tokens: float = 14.3e12
    lr_final_start_tokens: float = 14.633e12

    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8  # not disclosed
    weight_decay: float = 0.1
    decay_norms: bool = False  # not disclosed: whether norm gains decay
    grad_clip: float = 1.0
    moment_dtype: DTYPES = "bfloat16"
    ema_decay: float = 0.999  # not disclosed; 0: no average
    ema_every: int = 1  # steps between two updates of the average

    # sign | proportional | centred (these move biases) | sequence | batch | classical | none | package.module:function
    controller: str = "sign"
    aux_loss_alpha: float | None = None  # null: the controller's own (the first three 1e-4; the losses 1e-3, V2-Lite's)
    aux_loss_reduction: Literal["sum", "mean"] = "sum"  # over MoE layers; not disclosed
    bias_update_speed: float = 1e-3
    bias_update_stop_tokens: float = 14.3e12
    balance_mtp: bool = True  # whether the MTP layers' routers are balanced too; not disclosed
    mtp_loss_weight: float = 0.3
    mtp_loss_weight_late: float = 0.1
    mtp_late_tokens: float = 10e12

    loss_chunk_elements: int = 4 * 2**20  # logits alive at a time in the loss, in elements

    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    eval_every: int = 0  # 0: only at the end
    nonfinite_limit: int = 10  # skipped updates in a row before the run stops

    def __post_init__(self) -> None:
        require_choice(self)
        known = ("sign", "proportional", "centred", "sequence", "batch", "classical", "none")
        require_known("controller", self.controller, known)
        require_positive(
            self, "schedule_tokens", "batch_size", "batch_size_start", "learning_rate", "adam_eps", "grad_clip", "ema_every",
            "loss_chunk_elements", "checkpoint_every", "keep_checkpoints", "nonfinite_limit",
        )  # fmt: skip
        length = self.steps if self.steps is not None else self.train_tokens
        require(length is not None and length > 0, f"steps, train_tokens: expected one of them > 0, got {length}")
        require(
            self.batch_size_start <= self.batch_size,
            f"batch_size_start: expected at most batch_size={self.batch_size}, got {self.batch_size_start}",
        )
        micro = self.micro_batch_size
        require(
            micro is None or (micro > 0 and self.batch_size % micro == 0),
            f"micro_batch_size: expected null or a divisor of batch_size={self.batch_size}, got {micro}",
        )
        for name in ("adam_b1", "adam_b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "bias_update_speed", "mtp_loss_weight", "mtp_loss_weight_late",
                     "learning_rate_min", "learning_rate_final", "eval_every", "batch_ramp_tokens", "init_ulps"):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name}: expected 0 or more, got {getattr(self, name)}")
        alpha = self.aux_loss_alpha
        require(alpha is None or alpha >= 0, f"aux_loss_alpha: expected null or 0 or more, got {alpha}")
        points = (self.lr_decay_start_tokens, self.lr_decay_end_tokens, self.lr_final_start_tokens, self.schedule_tokens)
        require(
            list(points) == sorted(points),
            f"lr_decay_start_tokens <= lr_decay_end_tokens <= lr_final_start_tokens <= schedule_tokens expected, got {points}",
        )

    @property
    def n_micro_batches(self) -> int:
        return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus, tokenizer and packing [§4.1]."""

    corpus: str = "embedded"  # embedded | a glob of .txt/.jsonl/.parquet files (several separated by commas)
    domain_from: str = "path"  # path: the parent folder's name; or a field of the JSONL/Parquet records
    text_field: str = "text"
    domain_bytes: int | None = None  # a sample of about so many bytes of each larger domain; null: all of it
    retrieval_bytes: int = 0  # so many bytes of generated key-value retrieval documents beside the corpus, a domain more
    retrieval_context: int | None = None  # tokens of the longest of them; null: seq_len
    tokenizer: str = "train"  # train: a byte-level BPE of vocab_size entries on the corpus; or a tokenizer.json
    cache_dir: str = "~/.cache/dsv3_jax"
    seq_len: int = 4096
    cross_document_attention: bool = True  # packed documents see each other, as in pre-training
    fim_rate: float = 0.1
    punctuation_split_rate: float = 0.1  # share of merged punctuation+newline tokens split again; not disclosed
    shuffle_windows: int = 4096  # packed windows are permuted within blocks of so many; 1: left in the order of packing
    data_streams: int = 1  # independent streams of documents that a batch's rows come from; many hosts need several
    holdout_fraction: float = 0.05
    eval_sequences: int = 128  # most held-out sequences that one validation reads
    data_seed: int = 0

    def __post_init__(self) -> None:
        require(self.seq_len > 1, f"seq_len: expected at least 2, got {self.seq_len}")
        require_positive(self, "eval_sequences", "shuffle_windows", "data_streams")
        require(
            self.shuffle_windows == 1 or self.data_streams <= self.shuffle_windows,
            f"data_streams: expected at most shuffle_windows={self.shuffle_windows}, got {self.data_streams}",
        )
        cap = self.domain_bytes
        require(cap is None or cap > 0, f"domain_bytes: expected null or > 0, got {cap}")
        require(self.retrieval_bytes >= 0, f"retrieval_bytes: expected 0 or more, got {self.retrieval_bytes}")
        context = self.retrieval_context
        require(context is None or context > 0, f"retrieval_context: expected null or > 0, got {context}")
        for name in ("fim_rate", "punctuation_split_rate"):
            require(0 <= getattr(self, name) <= 1, f"{name}: expected 0..1, got {getattr(self, name)}")
        require(0 < self.holdout_fraction < 1, f"holdout_fraction: expected 0 < fraction < 1, got {self.holdout_fraction}")


LAYOUTS = Literal["single", "report", "fully_sharded", "tensor_expert"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run lies on its devices [§3.1, §3.2]. Nothing here changes what is computed, only where.

    The mesh's axes are pipe, data, expert and tensor; a size of null is the layout's own (`parallel/mesh.py`).
    """

    layout: LAYOUTS = "single"
    mesh_pipe: int = 1  # carried; until pipeline schedules run, its ranks take further shares of the batch
    mesh_data: int | None = None
    mesh_expert: int | None = None
    mesh_tensor: int | None = None
    node_size: int = 8  # devices that share a fast link; what crosses it is counted apart
    exchange: Literal["auto", "ragged", "padded"] = "auto"  # auto: ragged wherever the backend has it
    exchange_buffer: float = 1.25  # rows that a rank receives in one round, over its share in perfect balance

    def __post_init__(self) -> None:
        require_choice(self)
        for name in ("mesh_pipe", "mesh_data", "mesh_expert", "mesh_tensor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: expected null or a positive number, got {value}")
        require_positive(self, "node_size", "exchange_buffer")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
