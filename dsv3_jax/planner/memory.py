"""Memory of one device by cause, and the moment of the step at which it peaks [§3.2.3].

A cause is alive at some of four moments: while the loss is computed, in the backward pass of one layer's attention, in that
of its feed-forward, and in the optimiser. The peak is the largest sum. Nothing here describes the compiler: it may keep copies
that this leaves out, or reuse what this counts.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.precision import attention_cache, products, swiglu_cache
from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.model.attention import MAX_BLOCKS, MIN_BLOCK
from dsv3_jax.model.transformer import head_name
from dsv3_jax.parallel.mesh import EXPERT
from dsv3_jax.planner.rows import Number
from dsv3_jax.planner.share import FLOAT32, Share, Weight, dtype_bytes, in_kernel
from dsv3_jax.training.loss import chunk_length

LOSS, ATTENTION, EXPERTS, OPTIMISER = MOMENTS = ("loss", "attention", "feed-forward", "optimiser")
BACKWARD, GRADIENT = (ATTENTION, EXPERTS), (LOSS, ATTENTION, EXPERTS)


class Cause(NamedTuple):
    key: str
    label: str
    bytes: float
    moments: tuple[str, ...]

    @property
    def when(self) -> str:
        names = {MOMENTS: "always", GRADIENT: "gradient", BACKWARD: "backward", (*BACKWARD, OPTIMISER): "backward, optimiser"}
        return names.get(self.moments, ", ".join(self.moments))


def causes(share: Share) -> tuple[Cause, ...]:
    return (*_state(share), *_saved(share), *_loss(share), *_backward(share), *_optimiser(share))


def at(moment: str, found: tuple[Cause, ...]) -> Number:
    """Bytes alive at one moment."""
    return sum(cause.bytes for cause in found if moment in cause.moments)


def peak(found: tuple[Cause, ...]) -> tuple[str, Number]:
    """The moment of the peak, and its bytes."""
    return max(((moment, at(moment, found)) for moment in MOMENTS), key=lambda pair: pair[1])


def held(share: Share) -> int:
    """Elements of parameters, and of their gradients, that the device holds."""
    return sum(map(share.stored, share.weights))


def _state(share: Share) -> list[Cause]:
    config, pieces = share.config, sum(w.state for w in share.weights)
    masters = FLOAT32 * pieces if config.model.param_dtype != "float32" else 0
    bias = FLOAT32 * config.model.n_moe_layers * config.model.n_routed_experts
    sums = FLOAT32 * held(share) if share.micro_batches > 1 else 0
    batch = 3 * FLOAT32 * share.micro_batches * share.sequences * (config.data.seq_len + 1)  # tokens, segments, domains: int32
    return [
        Cause("weights", "weights", held(share) * share.param_bytes + bias, MOMENTS),
        Cause("moments", "both moments", 2 * pieces * dtype_bytes(config.train.moment_dtype), MOMENTS),
        Cause("masters", "float32 masters", masters, MOMENTS),
        Cause("batch", "the step's batch", batch, MOMENTS),
        Cause("gradient_sums", "gradients summed over micro-batches", sums, MOMENTS),
    ]


def saved_per_token(model: ModelConfig, kind: str, share: Share) -> dict[str, Number]:
    """Bytes of a token that one layer (dense, moe or mtp) keeps for the backward pass, by the policy's names."""
    compute, tensor, hidden = share.compute_bytes, share.tensor, model.hidden_size
    heads, policy, exchanged = model.num_attention_heads / tensor, model.remat, share.sizes[EXPERT] > 1
    latent = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim if model.attention == "mla" else 0
    width = model.intermediate_size if kind == "dense" else model.n_shared_experts * model.moe_intermediate_size
    choices = model.num_experts_per_tok if kind != "dense" and not exchanged else 0
    expert_width = choices * model.moe_intermediate_size / tensor
    swiglu = row_bytes(swiglu_cache(model), width / tensor, compute)
    plain = compute if model.fp8 else share.experts_bytes
    expert_swiglu = choices * row_bytes(swiglu_cache(model), model.moe_intermediate_size / tensor, plain)
    saved = {
        "carry": hidden * compute * (2 if kind == "mtp" else 1),  # an MTP module also reads an embedding
        "latent": latent * compute,
        "attention": row_bytes(attention_cache(model), heads * model.v_head_dim, compute) + heads * FLOAT32,
        "residual": hidden * compute,
        "swiglu_input": 2 * swiglu + 2 * expert_swiglu,
        "router": model.n_routed_experts * FLOAT32 if kind != "dense" else 0,
        "operations": 0.0,
    }
    if policy == "full":
        return {name: value if name in ("carry", "router") else 0 for name, value in saved.items()}
    if policy == "none":
        qk, values = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
        keys = model.n_key_value_heads / tensor * (qk + values)
        # both normalised streams and latents, heads, o_proj's input, the shared MLP's activation
        kept = 2 * hidden + latent - (model.qk_rope_head_dim if latent else 0) + heads * (qk + values) + keys + width / tensor
        if kind == "mtp":
            kept += 2 * hidden  # the normalised pair
        saved["operations"] = compute * (kept + choices * hidden + expert_width)
        if model.fp8:
            saved["operations"] = compute * (heads * (qk + values) + keys)
            saved["operations"] += _fp8_inputs(model, width / tensor, heads * values, bool(choices))
            if kind == "mtp":
                saved["operations"] += 2 * hidden * compute
        if kind != "dense":
            chosen = model.num_experts_per_tok * model.n_routed_experts  # which gate is whose, a byte each
            swiglu_steps = 4 * expert_width if share.experts_bytes == FLOAT32 and not model.fp8 else 0
            saved["operations"] += FLOAT32 * (hidden + model.n_routed_experts + swiglu_steps) + chosen
    return saved


def row_bytes(how: Quantiser | None, size: Number, otherwise: int) -> Number:
    """Of `size` values of a row as `how` packs them, or `otherwise` bytes each."""
    return how.row_bytes(size) if how else size * otherwise


def _fp8_inputs(model: ModelConfig, width: Number, attended: Number, routed: bool) -> Number:
    """Bytes of a token's inputs of linear operations, each operation's own: one byte a value, and scales.

    `width` of the dense or shared MLP, `attended` channels after attention. What a cache holds already is left out.
    """
    per_layer = {
        "q_a_proj": model.hidden_size, "q_b_proj": model.q_lora_rank, "kv_b_proj": model.kv_lora_rank,
        "o_proj": attended, "down_proj": width,
    }  # fmt: skip
    query = ["q_a_proj", "q_b_proj"] if model.q_lora_rank else ["q_proj"]
    names = [*query, "kv_a_proj_with_mqa", "kv_b_proj"] if model.attention == "mla" else ["q_proj", "k_proj", "v_proj"]
    names += ["gate_proj", "up_proj"] if width else []
    names += ["experts.up_proj"] if routed else []
    names += [] if attention_cache(model) else ["o_proj"]
    names += [] if swiglu_cache(model) or not width else ["down_proj"]
    how = {name: products(model, name) for name in names}
    return sum(row_bytes(h.x if h else None, per_layer.get(n) or model.hidden_size, FLOAT32) for n, h in how.items())


SAVED = {
    "carry": "inputs of the layers", "latent": "latents", "attention": "attention's output and log-sum-exp",
    "residual": "residual stream after attention", "swiglu_input": "SwiGLU inputs", "router": "router logits",
    "operations": "operands of everything else",
}  # fmt: skip


def _saved(share: Share) -> list[Cause]:
    model, depths = share.config.model, share.config.model.num_nextn_predict_layers
    layers = {"dense": model.n_dense_layers, "moe": model.n_main_moe_layers, "mtp": depths}
    per_token = dict.fromkeys(SAVED, 0.0)
    for kind, count in layers.items():
        for name, value in saved_per_token(model, kind, share).items():
            per_token[name] += count * value
    # each depth's stream before its final norm, and the gradient of its normed hidden states, which the loss hands over early
    ends = 2 * (1 + depths) * model.hidden_size * share.compute_bytes
    named = [Cause(f"saved_{name}", SAVED[name], share.tokens * value, GRADIENT) for name, value in per_token.items()]
    return [*named, Cause("saved_ends", "hidden states at the heads", share.tokens * ends, GRADIENT), _kept_weights(share)]


def saved_bytes(share: Share, policy: Literal["none", "report", "full"]) -> Number:
    """All that would be saved for the backward pass under another policy of rematerialisation."""
    model = replace(share.config.model, remat=policy)
    return sum(cause.bytes for cause in _saved(share._replace(config=replace(share.config, model=model))))


def _kept_weights(share: Share) -> Cause:
    """Without rematerialisation what was gathered, or cast, to be multiplied with stays for the backward pass."""
    model = share.config.model
    used = [w for w in share.weights if w.group != "embed_tokens" or model.tie_word_embeddings]
    kept = sum(_working_copy(share, w) for w in used) if model.remat == "none" else 0
    return Cause("saved_weights", "working copies of all weights", kept, GRADIENT)


def _working_copy(share: Share, weight: Weight) -> Number:
    """Bytes of a weight gathered, or cast, to be multiplied with; 0 if it is used as it lies."""
    used = share.used_bytes(weight)
    return weight.compute * used if share.stored(weight) < weight.compute or used != share.param_bytes else 0


def largest_layer(share: Share) -> Number:
    """Bytes of the working copies of the layer that has most."""
    groups: dict[str, Number] = {}
    for weight in share.weights:
        if "layers" in weight.spec.axes:
            groups[weight.group] = groups.get(weight.group, 0) + _working_copy(share, weight) / weight.layers
    return max(groups.values(), default=0)


def vocabulary(share: Share) -> int:
    """Elements of a device's piece of the head."""
    return share.config.model.vocab_size // share.tensor * share.config.model.hidden_size


def _loss(share: Share) -> list[Cause]:
    model, length = share.config.model, share.config.data.seq_len
    local = model.vocab_size // share.tensor
    chunk = chunk_length(share.sequences, length, local, share.config.train.loss_chunk_elements)
    logits = share.sequences * chunk * local * (2 * FLOAT32 + share.compute_bytes)
    depths = 1 + model.num_nextn_predict_layers
    name = head_name(model)
    copy = sum(_working_copy(share, w) for w in share.weights if w.group == name) if model.remat != "none" else 0
    gradients = vocabulary(share) * (FLOAT32 + depths * share.compute_bytes)
    return [
        Cause("head_weights", "working copy of the head", copy, (LOSS,)),
        Cause("head_gradients", "gradients of the head, each depth's and the running one", gradients, (LOSS,)),
        Cause("logits", "a chunk's logits, log-probabilities and their gradient", logits, (LOSS,)),
    ]


def _backward(share: Share) -> list[Cause]:
    model = share.config.model
    layer = largest_layer(share)
    copy = layer if model.remat != "none" else 0
    moments = BACKWARD if share.micro_batches > 1 else (*BACKWARD, OPTIMISER)
    exchanged = share.sizes[EXPERT] > 1
    sums = max((w.compute // w.layers for w in share.weights if w.is_expert), default=0) * 3 * FLOAT32 if exchanged else 0
    return [
        Cause("layer_weights", "working copy of the largest layer", copy, BACKWARD),
        Cause("layer_gradients", "its gradients before they are reduced or widened", layer, BACKWARD),
        Cause("gradients", "gradients of one micro-batch", held(share) * share.param_bytes, moments),
        Cause("attention_buffers", "heads, their gradients, a block's scores", attention_buffers(share), (ATTENTION,)),
        Cause("expert_buffers", "rows and products of the feed-forward", feed_forward_buffers(share), (EXPERTS,)),
        Cause("repeated_layer", "what a layer's repeated forward pass keeps", _repeated(share), (EXPERTS,)),
        Cause("expert_sums", "its experts' gradients, summed over rounds", sums, (EXPERTS,)),
    ]


def _repeated(share: Share) -> Number:
    """Where the whole layer is run again, it keeps all that its backward pass reads, attention's part for last."""
    model = share.config.model
    if model.remat != "full":
        return 0
    kind = "moe" if model.n_moe_layers else "dense"
    kept = saved_per_token(replace(model, remat="none"), kind, share)
    return share.tokens * sum(value for name, value in kept.items() if name not in ("carry", "router"))


def attention_buffers(share: Share) -> Number:
    """Queries, keys and values expanded, and their gradients; blockwise, keys' and values' in float32 too, and three blocks
    of scores.
    """
    model, compute, length = share.config.model, share.compute_bytes, share.config.data.seq_len
    heads, groups = (n / share.tensor for n in (model.num_attention_heads, model.n_key_value_heads))
    qk, values = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    expanded = 2 * compute * (heads * qk + groups * (qk + values))
    if in_kernel(model):
        return share.tokens * expanded
    expanded += FLOAT32 * groups * (qk + values)
    block = min(length, max(MIN_BLOCK, -(-length // MAX_BLOCKS)))
    return share.tokens * expanded + share.sequences * heads * block * length * (2 * FLOAT32 + compute)


def feed_forward_buffers(share: Share) -> Number:
    """The larger of a dense layer's and a mixture's: x, dy and dx of every row on both sides of the exchange, and products."""
    model, compute, hidden = share.config.model, share.compute_bytes, share.config.model.hidden_size
    per_width = 3 * FLOAT32 + 3 * compute  # both pre-activations and the product's gradient; activation and both gradients
    dense = share.tokens * model.intermediate_size / share.tensor * 4 * compute if model.n_dense_layers else 0
    if not model.n_moe_layers:
        return dense
    sent, received = share.rows, share.received_rows
    rows = hidden * (3 * compute * received + FLOAT32 * received)
    if share.sizes[EXPERT] > 1:
        rows += hidden * 3 * compute * sent
    return max(dense, rows + received * model.moe_intermediate_size / share.tensor * per_width)


def _optimiser(share: Share) -> list[Cause]:
    """The new weights take the old ones' place: the step is given its state to overwrite."""
    pieces = share.gradient_bytes * sum(w.state for w in share.weights if w.state < share.stored(w))
    return [Cause("reduced_gradients", "gradients reduced to the optimiser's pieces", pieces, (OPTIMISER,))]
