"""The published figures of DeepSeek-V3, derived [Table 1, §3.1-3.2, §4.2; tables 1, 2 and 4 of the ISCA'25 paper].

Everything here follows from a config and from what was measured or given, which callers pass in: no published answer is
written down in this package.
"""

from collections import Counter
from typing import NamedTuple

from dsv3_jax.config import Config
from dsv3_jax.model.count import count_parameters
from dsv3_jax.model.flops import training_flops_per_token
from dsv3_jax.parallel.schedules import SCHEDULES, Costs
from dsv3_jax.planner.parameters import cache_bytes_per_token, cache_elements, quantised_bytes, stored_checkpoint
from dsv3_jax.planner.rows import Number
from dsv3_jax.planner.serving import decode_bound, dollars_per_million, experts_reached
from dsv3_jax.planner.timing import DAY, TERA, hours_per_trillion
from dsv3_jax.planner.work import full_window_flops


class Phases(NamedTuple):
    """Seconds of a measured step by phase, as the ISCA'25 paper's table 4 lists them.

    Read as totals of one rank over a step: forwards, backwards and weight gradients that ran alone, pairs that ran overlapped,
    idle time, optimiser. Read as single chunks they could not be: 120 micro-batches would take minutes.
    """

    forward: float  # "1F"
    bubble: float
    backward: float  # "1B"
    weight: float  # "1W"
    overlapped: float  # "1F1B"
    optimiser: float


class Run(NamedTuple):
    """What is given about a published run."""

    config: Config
    devices: int
    pipe: int  # pipeline stages
    tflops: float  # peak of a device in BF16
    step_seconds: float
    phases: Phases
    hours_per_trillion: float
    tokens: float
    other_hours: tuple[float, ...]  # of the phases after pre-training
    dollars_per_hour: float
    others_devices: int  # of the run that it is compared with
    gqa_heads: int  # key/value heads of the attention that it is compared with
    decode_tokens: int  # sequences of a device in decoding
    decode_hidden: int  # channels, rounded as the source does
    network_bytes_per_second: float
    node: int
    output_tokens_per_second: float  # of a node, in production
    input_tokens_per_second: float


class Receipt(NamedTuple):
    key: str
    label: str
    value: float
    unit: str
    inputs: str


class Chunks(NamedTuple):
    """Seconds of one micro-batch on one stage."""

    forward: float
    backward: float  # both halves
    weight: float
    overlapped: float  # a forward and a backward together

    def costs(self, *, saving: bool) -> Costs:
        """For the schedules; without `saving` a pair takes as long as its parts."""
        pair = self.overlapped if saving else self.forward + self.backward
        return Costs(F=self.forward, B=self.backward, W=self.weight, FB=pair)


def chunk_times(phases: Phases, pipe: int, micro_batches: int) -> Chunks:
    """A phase's total over how often DualPipe's first rank runs it. Input gradients alone take the backward's rest."""
    schedule = SCHEDULES["dualpipe"].build(pipe, micro_batches)
    runs = Counter("".join(chunk.kind for chunk in action) for action in schedule.actions[0])
    weight = phases.weight / runs["W"]
    # B runs of both halves and I of the first alone: phases.backward = (B + I) * backward - I * weight
    backward = (phases.backward + runs["I"] * weight) / (runs["B"] + runs["I"])
    return Chunks(phases.forward / runs["F"], backward, weight, phases.overlapped / runs["FB"])


def bubble(chunks: Chunks, pipe: int, *, saving: bool) -> Number:
    """Of DualPipe, by the report's formula."""
    return SCHEDULES["dualpipe"].bubble(pipe, chunks.costs(saving=saving))


def step_from_chunks(phases: Phases, pipe: int, micro_batches: int, *, saving: bool) -> Number:
    """Every micro-batch's forward and backward, the formula's bubble, the optimiser."""
    chunks = chunk_times(phases, pipe, micro_batches)
    busy = micro_batches * (chunks.forward + chunks.backward)
    if saving:
        busy = phases.forward + phases.backward + phases.weight + phases.overlapped
    return busy + bubble(chunks, pipe, saving=saving) + phases.optimiser


def mfu(flops_per_token: Number, rate: Number, devices: int, tflops: Number) -> Number:
    return flops_per_token * rate / (devices * tflops * TERA)


def receipts(run: Run) -> tuple[Receipt, ...]:
    return (*_counts(run), *_flops(run), *_cost(run), *_pipeline(run), *_serving(run))


def _counts(run: Run) -> list[Receipt]:
    model = run.config.model
    count, stored = count_parameters(model), stored_checkpoint(run.config)
    mla = cache_elements(model, "mla")

    def over(scheme: str, groups: int = 0) -> Number:
        return cache_elements(model, scheme, groups) / mla

    channels = model.num_attention_heads * model.v_head_dim
    return [
        Receipt("total", "parameters", count.total, "parameters", "config"),
        Receipt("active", "activated, with the head", count.active_with_head, "parameters", "config"),
        Receipt("stored_elements", "elements stored", stored.elements, "elements", "config, FP8 blocks of 128 x 128"),
        Receipt("stored_bytes", "bytes stored", stored.bytes, "B", "the same"),
        Receipt("tensors", "tensors stored", stored.tensors, "tensors", "config"),
        Receipt("int4", "weights as int4", quantised_bytes(count.total, 4, 32, 16), "B", "groups of 32, 16-bit scales"),
        Receipt("cache", "latent cache of a token", cache_bytes_per_token(model), "B", "config, BF16"),
        Receipt("over_mha", "compression over MHA", over("mha"), "x", "config, heads of its size"),
        Receipt("over_gqa", "compression over GQA", over("gqa", run.gqa_heads), "x", f"{run.gqa_heads} key/value heads"),
        Receipt("quoted", "compression as quoted", channels / model.kv_lora_rank, "x", "all heads' values / latent"),
    ]


def _flops(run: Run) -> list[Receipt]:
    model, length = run.config.model, run.config.data.seq_len
    main, with_mtp = (training_flops_per_token(model, length, mtp=mtp) for mtp in (False, True))
    return [
        Receipt("flops", "training FLOPs of a token", main, "FLOP", "config, causal"),
        Receipt("flops_full", "the same, full window", full_window_flops(model, length), "FLOP", "config"),
        Receipt("flops_mtp", "the same, causal with MTP", with_mtp, "FLOP", "config"),
    ]


def _cost(run: Run) -> list[Receipt]:
    step_tokens = run.config.train.batch_size * run.config.data.seq_len
    rate = step_tokens / run.step_seconds
    flops = training_flops_per_token(run.config.model, run.config.data.seq_len, mtp=False)
    full = full_window_flops(run.config.model, run.config.data.seq_len)
    hours = run.hours_per_trillion * run.tokens / TERA
    measured = hours_per_trillion(rate, run.devices)
    back = step_tokens / TERA * run.hours_per_trillion * 3600 / run.devices
    step, given = "measured step", "given hours per 10^12"
    return [
        Receipt("tokens_per_day", "tokens per day", rate * DAY, "tokens", f"{step}, batch"),
        Receipt("hours_per_trillion", "GPU hours per 10^12 tokens", measured, "h", f"{step}, batch, GPUs"),
        Receipt("step_back", "step, back from the hours", back, "s", f"{given}, batch, GPUs"),
        Receipt("mfu", "MFU, causal", mfu(flops, rate, run.devices, run.tflops), "", f"{step}, FLOPs, BF16 peak"),
        Receipt("mfu_full", "MFU, full window", mfu(full, rate, run.devices, run.tflops), "", "the same"),
        Receipt("hours", "GPU hours of pre-training", hours, "h", f"{given}, tokens"),
        Receipt("hours_measured", "the same from the measured step", measured * run.tokens / TERA, "h", f"{step}, tokens"),
        Receipt("dollars", "dollars of pre-training", hours * run.dollars_per_hour, "$", "hours, price"),
        Receipt(
            "dollars_all", "dollars with the two later phases", (hours + sum(run.other_hours)) * run.dollars_per_hour, "$",
            "their given hours, price",
        ),
        Receipt("fewer", "fewer GPUs than the other run", 1 - run.devices / run.others_devices, "", "both numbers given"),
    ]  # fmt: skip


def micro_batches(run: Run) -> int:
    """Of one pipeline and step, of one sequence each: the only size at which an overlapped pair takes about its parts' time."""
    return run.config.train.batch_size * run.pipe // run.devices


def _pipeline(run: Run) -> list[Receipt]:
    n, phases = micro_batches(run), run.phases
    chunks = chunk_times(phases, run.pipe, n)
    alone, paired = (step_from_chunks(phases, run.pipe, n, saving=saving) for saving in (False, True))
    times = "1F, 1B, 1W of table 4"
    return [
        Receipt("pipelines", "sequences of a pipeline and step", n, "", "batch, GPUs, stages"),
        Receipt("phases", "step, sum of its phases", sum(phases), "s", "all of table 4"),
        Receipt("step", "step from F, B, W", alone, "s", f"{times}, bubble formula"),
        Receipt("step_pairs", "step with pairs as measured", paired, "s", "and 1F1B"),
        Receipt("bubble", "bubble by the formula", bubble(chunks, run.pipe, saving=False), "s", times),
    ]


def _serving(run: Run) -> list[Receipt]:
    model = run.config.model

    def decode(hidden: int) -> Number:
        experts, layers = experts_reached(model), model.num_hidden_layers
        return decode_bound(run.decode_tokens, experts, hidden, layers, run.network_bytes_per_second).seconds

    rounded, exact = decode(run.decode_hidden), decode(model.hidden_size)
    inputs = f"{run.decode_tokens} tokens a GPU, hidden"
    rates = run.output_tokens_per_second, run.input_tokens_per_second
    written, read = (dollars_per_million(rate / run.node, run.dollars_per_hour) for rate in rates)
    return [
        Receipt("decode", "decode bound of a token", rounded, "s", f"{inputs} ~ {run.decode_hidden}"),
        Receipt("decode_rate", "the same, as a rate", 1 / rounded, "tokens/s", "the same"),
        Receipt("decode_exact", "the same bound", exact, "s", f"{inputs} {model.hidden_size}"),
        Receipt("output_price", "10^6 tokens written", written, "$", "production rate, price"),
        Receipt("input_price", "10^6 tokens read", read, "$", "production rate, price"),
    ]
