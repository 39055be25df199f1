"""A step's bounds, each on its own: compute, memory, every link; and what rates and hours follow [§3.1, §4.2, Table 1]."""

import math
from typing import NamedTuple

from dsv3_jax.config import Config
from dsv3_jax.model.flops import training_flops_per_token
from dsv3_jax.parallel.mesh import EXPERT
from dsv3_jax.planner.chips import Chip
from dsv3_jax.planner.memory import held
from dsv3_jax.planner.rows import Number
from dsv3_jax.planner.share import FLOAT32, Share, dtype_bytes, in_kernel, matrix
from dsv3_jax.planner.wire import COMBINES, DISPATCHES, Traffic, seconds
from dsv3_jax.planner.work import Work, causal_pairs, executed, repeats, visited

TERA, HOUR, DAY = 1e12, 3600, 86400
# Trips of one attention score to memory and back, unfused as the attention stands: (as float32, in the compute dtype).
# Forward: the score is written, read for its maximum and for the exponential; its weight is written and read. Backward: the
# score and its weight's gradient are written and read, and so are the weight, and the score's gradient for two products.
FORWARD_TRIPS, BACKWARD_TRIPS = (3, 2), (4, 5)


class Bounds(NamedTuple):
    """Seconds of one step, were nothing else to limit it."""

    compute: float
    memory: float
    links: dict[str, Number]  # link -> all traffic on it

    @property
    def overlapped(self) -> Number:
        """If everything else hides behind the slowest."""
        return max(self.compute, self.memory, *self.links.values())

    @property
    def sequential(self) -> Number:
        """If nothing overlaps."""
        return self.compute + self.memory + sum(self.links.values())


def bounds(share: Share, chip: Chip, found: tuple[Traffic, ...], compute: str) -> Bounds:
    links = dict.fromkeys(chip.links, 0.0)
    for t in found:
        links[t.link] += seconds(t, chip)
    memory = sum(memory_traffic(share).values()) / (1e9 * chip.hbm_gbs)
    return Bounds(compute_seconds(share, chip, executed(share), compute), memory, links)


def step_tokens(share: Share) -> int:
    return share.config.train.batch_size * share.config.data.seq_len


def steps(config: Config, tokens: Number) -> Number:
    """Optimiser steps until `tokens` are seen: the ramp's, linear in tokens, as an integral, the rest at the full batch."""
    train, length = config.train, config.data.seq_len
    ramp = train.batch_ramp_tokens * tokens / train.schedule_tokens
    start, end = train.batch_size_start, train.batch_size
    if start == end or not ramp:
        return tokens / (end * length)
    return ramp / length / (end - start) * math.log(end / start) + (tokens - ramp) / (end * length)


def useful_flops(share: Share) -> int:
    """Of one token, MTP modules included."""
    return training_flops_per_token(share.config.model, share.config.data.seq_len)


def compute_seconds(share: Share, chip: Chip, work: Work, compute: str) -> Number:
    """Executed FLOPs of a step over the peak; with `compute` "fp8", linear layers at the FP8 peak."""
    tokens = step_tokens(share) / share.devices
    linear = work.linear + work.linear_repeated
    narrow = chip.fp8_tflops if compute == "fp8" else chip.bf16_tflops
    return tokens * (linear / narrow + (work.total - linear) / chip.bf16_tflops) / TERA


def memory_traffic(share: Share) -> dict[str, Number]:
    """Bytes that a device moves to and from its memory in a step.

    Every product reads its operands and writes its result once; elementwise work rides along. Scores are counted apart,
    because a fused kernel would not move them.
    """
    return {
        "weights": share.micro_batches * _weight_traffic(share),
        "optimiser": _optimiser_traffic(share),
        "activations": share.micro_batches * share.tokens * _activation_traffic(share),
        "scores": share.micro_batches * _score_traffic(share),
        "rows": share.micro_batches * _row_traffic(share),
    }


def _weight_traffic(share: Share) -> Number:
    """Both passes read each weight, after gathering or casting it; gradients are written, and summed over micro-batches."""
    total = 0.0
    for w in share.weights:
        used = share.used_bytes(w)
        gathered = share.stored(w) < w.compute
        cast = 0 if used == share.param_bytes else share.param_bytes + used
        total += w.compute * (2 * (used + (used if gathered else cast)) + used)
    return total + (2 * FLOAT32 * held(share) if share.micro_batches > 1 else 0)


def _optimiser_traffic(share: Share) -> Number:
    train = share.config.train
    master = FLOAT32 if share.param_bytes != FLOAT32 else 0
    per_element = share.gradient_bytes + 4 * dtype_bytes(train.moment_dtype) + 2 * (master or share.param_bytes)
    return sum(w.state for w in share.weights) * (per_element + (share.param_bytes if master else 0))


def _activation_traffic(share: Share) -> Number:
    """Of one token: inputs and outputs of each product, three products a weight and those repeated."""
    model, total = share.config.model, 0.0
    for w in share.weights:
        if w.is_matrix and w.group != "embed_tokens":
            m = matrix(w.spec.axes, w.local)
            times = m.stack * visited(share, w) / w.compute
            passes = 3 + repeats(w, model.remat, exchanged=share.sizes[EXPERT] > 1)
            total += passes * times * (m.rows + m.columns) * share.compute_bytes
    return total


def _score_traffic(share: Share) -> Number:
    model = share.config.model
    if in_kernel(model):
        return 0
    layers, heads = model.num_hidden_layers + model.num_nextn_predict_layers, model.num_attention_heads / share.tensor
    scores = layers * share.sequences * heads * causal_pairs(share.config.data.seq_len)
    forwards = 2 if model.remat == "full" else 1
    wide, narrow = (forwards * f + b for f, b in zip(FORWARD_TRIPS, BACKWARD_TRIPS, strict=True))
    return scores * (wide * FLOAT32 + narrow * share.compute_bytes)


def _row_traffic(share: Share) -> Number:
    """Dispatched and combined rows, read and written on both sides."""
    model = share.config.model
    rows = model.n_moe_layers * share.rows * (DISPATCHES + COMBINES)
    sides = 2 if share.sizes[EXPERT] > 1 else 1
    return 2 * sides * rows * model.hidden_size * share.compute_bytes


def tokens_per_second(flops_per_token: Number, devices: int, tflops: Number, mfu: Number) -> Number:
    return mfu * tflops * TERA * devices / flops_per_token


def hours_per_trillion(rate: Number, devices: int) -> Number:
    """Device hours that 10^12 tokens take at `rate` tokens per second over all of them."""
    return devices * TERA / rate / HOUR
