"""The plan of one run on one kind of chip: every section of figures, from parameters to dollars [Table 1, §3, §4.2]."""

from typing import Literal

from dsv3_jax.config import Config
from dsv3_jax.model.count import count_parameters
from dsv3_jax.model.flops import training_flops_per_token
from dsv3_jax.parallel.mesh import EXPERT, PIPE
from dsv3_jax.planner import memory, pipelines, serving, timing, wire
from dsv3_jax.planner.assumptions import assumptions
from dsv3_jax.planner.chips import NUMBERS, UNITS, Chip
from dsv3_jax.planner.parameters import cache_bytes_per_token, component_counts, stored_checkpoint
from dsv3_jax.planner.question import Question, check
from dsv3_jax.planner.rows import Number, Plan, Row, Section, figure
from dsv3_jax.planner.share import COMPONENTS, Share, make_share
from dsv3_jax.planner.work import executed, full_window_flops, padding
from dsv3_jax.training.schedules import total_tokens

GIB, COUNTED = 2**30, ("parameters",)
POLICIES: tuple[Literal["none", "report", "full"], ...] = ("none", "report", "full")


def make_plan(config: Config, chip: Chip, question: Question) -> Plan:
    """Raises ValueError if the run does not divide over the chips, or a number makes no sense."""
    check(question)
    share = make_share(config, question.chips, chip.platform)
    pipeline = pipelines.section(share.sizes[PIPE], question) if question.schedule else None
    sections = (
        _inputs(share, chip, question),
        _parameters(config),
        _flops(share),
        _memory(share, chip, question),
        _communication(share, chip),
        _time(share, chip, question),
        _cost(share, chip, question),
        _serving(share, chip, question),
        *([pipeline] if pipeline else []),
    )
    return Plan(sections, assumptions(share, chip, question, pipeline))


def _inputs(share: Share, chip: Chip, q: Question) -> Section:
    config = share.config
    rows = [
        figure("chip", "chip", chip.name),
        *(figure(name, f"  {name}", getattr(chip, name), UNITS[name]) for name in NUMBERS),
        figure("layout", "layout", config.parallel.layout),
        figure("mesh", "mesh, pipe x data x expert x tensor", " x ".join(map(str, share.sizes.values()))),
        figure("seq_len", "sequence", config.data.seq_len, "tokens"),
        figure("batch", "batch", config.train.batch_size, "sequences"),
        figure("micro_batches", "micro-batches of a step", share.micro_batches),
        figure("dtypes", "parameters / compute / moments",
               f"{config.model.param_dtype} / {config.model.compute_dtype} / {config.train.moment_dtype}"),
        figure("linear", "peak of linear layers", q.compute),
        figure("remat", "rematerialisation", config.model.remat),
        figure("dollars_per_hour", "price of a device", q.dollars_per_hour, "$/h"),
    ]  # fmt: skip
    return Section("inputs", "Inputs", tuple(row._replace(origin="input") for row in rows))


def _parameters(config: Config) -> Section:
    counts, count, stored = component_counts(config), count_parameters(config.model), stored_checkpoint(config)
    rows = [Row(key, COMPONENTS[key], (c.total, c.active), COUNTED) for key, c in counts.items() if c.total]
    rows += [
        Row("main", "main model, head active", (count.total, count.active_with_head), COUNTED),
        Row("main_both", "  the same, embedding counted too", (count.total, count.active_with_head_and_embedding), COUNTED),
        Row("main_bare", "  the same, neither counted", (count.total, count.active), COUNTED),
        Row("stored", "elements of an FP8 checkpoint with scales", (stored.elements, None), ("elements",)),
        Row("stored_bytes", "  its bytes", (stored.bytes, None), ("B",)),
    ]
    return Section("parameters", "Parameters", tuple(rows), ("total", "active"))


def _flops(share: Share) -> Section:
    model, length = share.config.model, share.config.data.seq_len
    work, useful = executed(share), timing.useful_flops(share)
    tokens = timing.step_tokens(share) / share.devices
    rows = [
        figure("published", "useful, main model, causal", training_flops_per_token(model, length, mtp=False), "FLOP"),
        figure("full_window", "  if attention read the whole window", full_window_flops(model, length), "FLOP"),
        figure("useful", "useful, with MTP", useful, "FLOP"),
        figure("linear", "executed: linear layers", work.linear, "FLOP"),
        figure("attention", "  attention's core", work.attention, "FLOP"),
        figure("other", "  head, routers, MTP's projection", work.other, "FLOP"),
        figure("linear_repeated", "  linear layers again", work.linear_repeated, "FLOP"),
        figure("attention_repeated", "  scores again, and beyond the diagonal", work.attention_repeated, "FLOP"),
        figure("other_repeated", "  others again", work.other_repeated, "FLOP"),
        figure("executed", "executed, all of it", work.total, "FLOP"),
        figure("useful_share", "  useful share of it", useful / work.total, "%"),
        figure("device_step", "executed by a device in a step", work.total * tokens, "FLOP"),
    ]
    if extra := padding(share):
        rows.append(figure("buffers", "  if its experts multiplied whole buffers", (work.total + extra) * tokens, "FLOP"))
    return Section("flops", "FLOPs of a token in training", tuple(rows))


def _memory(share: Share, chip: Chip, q: Question) -> Section:
    found = memory.causes(share)
    rows = [figure(c.key, c.label, c.bytes, "B", note=c.when) for c in found]
    for moment in memory.MOMENTS:
        key, label = f"at_{moment.replace('-', '_')}", f"sum at its {moment} moment"
        rows.append(figure(key, label, memory.at(moment, found), "B"))
    moment, peak = memory.peak(found)
    limit = chip.hbm_gib * GIB
    arguments = sum(c.bytes for c in found if c.key in ("weights", "moments", "masters", "batch"))
    verdict = "fits" if peak <= limit else "does not fit"
    rows += [
        figure("arguments", "state and batch, what a step is given", arguments, "B"),
        figure("temporaries", "all else at the peak", peak - arguments, "B"),
        figure("peak", "peak", peak, "B", note=moment),
        figure("fits", f"{verdict}: {peak / GIB:,.1f} of {chip.hbm_gib:,.1f} GiB", peak / limit, "%"),
        *(figure(f"saved.{p}", f"all that is saved with remat={p}", memory.saved_bytes(share, p), "B") for p in POLICIES),
        figure("latent_cache", "latent cache when serving, beside weights alone", _cache(share, q), "B", note="serving"),
    ]
    return Section("memory", "Memory of a device", tuple(rows))


def _cache(share: Share, q: Question) -> int:
    return cache_bytes_per_token(share.config.model) * q.context * q.requests


def _communication(share: Share, chip: Chip) -> Section:
    found = wire.traffic(share, chip)
    rows = tuple(Row(t.key, f"{t.label}: {t.axis}, {t.link}", (t.bytes, wire.seconds(t, chip)), ("B", "s")) for t in found)
    return Section("communication", "Sent by a device in a step, by axes and link", rows, ("bytes", "seconds"))


def _time(share: Share, chip: Chip, q: Question) -> Section:
    found = timing.bounds(share, chip, wire.traffic(share, chip), q.compute)
    tokens = timing.step_tokens(share)
    moved = timing.memory_traffic(share)
    rows = [
        figure("compute", "compute bound", found.compute, "s"),
        figure("memory", "memory bound", found.memory, "s"),
        *(
            figure(f"memory.{name}", f"  of it {MOVED[name]}", size / (1e9 * chip.hbm_gbs), "s")
            for name, size in moved.items()
            if size
        ),
        *(figure(f"link.{link}", f"link bound, {link}", size, "s") for link, size in found.links.items()),
        figure("overlapped", "step if the slowest hides the rest", found.overlapped, "s"),
        figure("sequential", "step if nothing overlaps", found.sequential, "s"),
        figure("rate_overlapped", "tokens per second, slowest bound", tokens / found.overlapped, "tokens/s"),
        figure("rate_sequential", "tokens per second, nothing overlapped", tokens / found.sequential, "tokens/s"),
    ]
    if q.mfu:
        rows.append(figure("rate_mfu", f"tokens per second at an MFU of {q.mfu:.1%}", _rate_at(share, chip, q), "tokens/s"))
    return Section("time", "Time of a step", tuple(rows))


MOVED = {
    "weights": "weights and gradients", "optimiser": "optimiser", "activations": "activations", "scores": "attention scores",
    "rows": "rows of the experts",
}  # fmt: skip


def _rate_at(share: Share, chip: Chip, q: Question) -> Number:
    """The published convention: the main model's causal FLOPs over the BF16 peak."""
    flops = training_flops_per_token(share.config.model, share.config.data.seq_len, mtp=False)
    assert q.mfu is not None
    return timing.tokens_per_second(flops, share.devices, chip.bf16_tflops, q.mfu)


def _cost(share: Share, chip: Chip, q: Question) -> Section:
    found = timing.bounds(share, chip, wire.traffic(share, chip), q.compute)
    step = timing.step_tokens(share)
    rates = {"overlapped": step / found.overlapped, "sequential": step / found.sequential}
    if q.mfu:
        rates["mfu"] = _rate_at(share, chip, q)
    tokens = q.tokens or total_tokens(share.config)
    hours = {name: timing.hours_per_trillion(rate, share.devices) for name, rate in rates.items()}
    total = [h * tokens / timing.TERA for h in hours.values()]
    rows = [
        Row("tokens", "tokens of the run", (tokens,) * len(rates), ("tokens",), "input"),
        Row("steps", "optimiser steps", (timing.steps(share.config, tokens),) * len(rates), ("steps",)),
        Row("hours_per_trillion", "device hours per 10^12 tokens", tuple(hours.values()), ("h",)),
        Row("hours", "device hours of the run", tuple(total), ("h",)),
        Row("days", "days", tuple(h / 24 / share.devices for h in total), ("days",)),
        Row("dollars", "dollars", tuple(h * q.dollars_per_hour for h in total), ("$",)),
    ]
    return Section("cost", "Cost of the run", tuple(rows), tuple(rates))


def _serving(share: Share, chip: Chip, q: Question) -> Section:
    model = share.config.model
    rows = [
        figure("cache_per_token", "latent cache of a token", cache_bytes_per_token(model), "B"),
        figure("context", "tokens cached of a sequence", q.context, "tokens", "input"),
        figure("requests", "sequences of a device", q.requests, "sequences", "input"),
        figure("cache", "latent cache of a device", _cache(share, q), "B"),
    ]
    if model.n_main_moe_layers and share.devices > 1:
        link = chip.links[-1]
        experts = serving.experts_reached(model)
        layers = model.num_hidden_layers
        speed = chip.link_bytes_per_second(link) / wire.exchange_hops(chip, share.sizes[EXPERT])
        bound = serving.decode_bound(q.requests, experts, model.hidden_size, layers, speed)
        price = serving.dollars_per_million(q.requests * bound.tokens_per_second, q.dollars_per_hour)
        rows += [
            figure("decode", "exchange bound of one decoded token", bound.seconds, "s", note=link),
            figure("decode_rate", "  its rate, each sequence", bound.tokens_per_second, "tokens/s"),
            figure("dollars_bound", "  dollars per 10^6 tokens at it", price, "$"),
        ]
    if q.output_tokens_per_second:
        rows += [
            figure("served", "measured rate of a device", q.output_tokens_per_second, "tokens/s", "input"),
            figure("dollars", "dollars per 10^6 served tokens",
                   serving.dollars_per_million(q.output_tokens_per_second, q.dollars_per_hour), "$"),
        ]  # fmt: skip
    return Section("serving", "Serving", tuple(rows))
