"""What does a DeepSeek-V3 need on given chips: memory, communication, time, dollars? And do the published figures add up?

    python -m experiments.plan --preset=deepseek_v3_671b --chips=512 --chip=v5p --set=layout=fully_sharded \\
        --set=mesh_expert=64 --set=batch_size=512 --set=batch_size_start=512 [--mfu=0.4] [--out=runs/plan]
    python -m experiments.plan --schedule=all --stages=16 --micro_batches=120 [--schedule_set=F=1.13 ...] [--out=runs/plan]
    python -m experiments.plan --aot=tpu:v5p:8x8x8 --set=layout=fully_sharded ... [--out=runs/plan]
    python -m experiments.plan --aot=tpu:v5p:8x8x5 --decode [--requests=32] [--context=4096] [--set=mesh_tensor=4]
    python -m experiments.plan --receipts

Seconds, without an accelerator. Prints tables of at most 100 columns, every figure an input or derived, then what was
assumed; `--out` leaves `plan.json` and `plan.png`. `--schedule` simulates pipelines, and `--out` draws each of them.
`--aot` also compiles the training step for that many chips (minutes, 4 GB of memory), sets XLA's figures beside the
planner's, and counts the kernels in it by name; it needs `pip install 'dsv3_jax[aot]'`. With `--decode` it compiles one step of
decoding instead, `--requests` sequences a device with room for `--context` tokens each, laid out as the report serves.
`--receipts` derives DeepSeek-V3's published figures and sets them beside the sources'.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.analysis import plan_figure, schedule_figure
from dsv3_jax.analysis.figures import save
from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import PIPE
from dsv3_jax.parallel.schedules import SCHEDULES, Costs
from dsv3_jax.planner import aot, aot_decode, memory
from dsv3_jax.planner.chips import CHIPS, NUMBERS, Chip, chip_named
from dsv3_jax.planner.pipelines import costs_of, timelines
from dsv3_jax.planner.plan import make_plan
from dsv3_jax.planner.question import Question, check
from dsv3_jax.planner.receipts import Phases, Receipt, Run, receipts
from dsv3_jax.planner.rows import Plan
from dsv3_jax.planner.share import make_share
from dsv3_jax.planner.table import render, render_receipts
from dsv3_jax.planner.targets import Target, topology
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override, parse_settings, to_dict
from dsv3_jax.training.journal import write_json
from experiments import _cli

# Given or measured, from the report and tables 1 to 4 of the ISCA'25 paper; the production rates from DeepSeek's own account.
PUBLISHED_RUN = Run(
    config=Config(), devices=2048, pipe=16, tflops=989, step_seconds=19.926,
    phases=Phases(forward=1.13, bubble=2.06, backward=1.99, weight=0.48, overlapped=13.95, optimiser=0.29),
    hours_per_trillion=180e3, tokens=14.8e12, other_hours=(119e3, 5e3), dollars_per_hour=2.0, others_devices=16384, gqa_heads=8,
    decode_tokens=32, decode_hidden=7000, network_bytes_per_second=50e9, node=8, output_tokens_per_second=14.8e3,
    input_tokens_per_second=73.7e3,
)  # fmt: skip

# The sources' own figures, in the receipts' units.
PUBLISHED = {
    "total": 671.03e9, "active": 36.6e9, "stored_elements": 684_531_386_000, "stored_bytes": 688_574_839_360, "tensors": 91_991,
    "int4": 377e9, "cache": 70_272, "over_mha": 56.9, "over_gqa": 3.6, "quoted": 32, "flops": 250.45e9, "flops_full": 281.15e9,
    "flops_mtp": 260.64e9, "tokens_per_day": 272.80e9, "hours_per_trillion": 180e3, "step_back": 19.926, "mfu": 0.3894,
    "mfu_full": 0.4373, "hours": 2664e3, "hours_measured": 2664e3, "dollars": 5.328e6, "dollars_all": 5.576e6, "fewer": 0.875,
    "pipelines": 120, "phases": 19.926, "step": 19.926, "step_pairs": 19.926, "bubble": 2.06, "decode": 14.76e-3,
    "decode_rate": 67, "decode_exact": 14.76e-3,
}  # fmt: skip


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("preset", "deepseek_v3_671b", f"one of {', '.join(PRESETS)}", flag_values=values)
    flags.DEFINE_multi_string("set", [], "name=value; any field of config.py, may be given several times", flag_values=values)
    flags.DEFINE_integer("chips", 1, "devices", flag_values=values)
    flags.DEFINE_string("chip", "h800", f"one of {', '.join(CHIPS)}", flag_values=values)
    flags.DEFINE_multi_string("chip_set", [], f"name=value; any of {', '.join(NUMBERS)}", flag_values=values)
    flags.DEFINE_string("compute", "bf16", "bf16 or fp8: the peak that linear layers run at", flag_values=values)
    flags.DEFINE_float("tokens", None, "tokens of the run (default: the config's)", flag_values=values)
    flags.DEFINE_float("dollars_per_hour", 2.0, "price of a device", flag_values=values)
    flags.DEFINE_float("mfu", None, "plan with this share of the BF16 peak, beside the bounds", flag_values=values)
    flags.DEFINE_integer("context", 4096, "tokens cached of a sequence that is served", flag_values=values)
    flags.DEFINE_integer("requests", 32, "sequences that a device serves at a time", flag_values=values)
    flags.DEFINE_float("output_tokens_per_second", None, "measured serving rate of a device", flag_values=values)
    flags.DEFINE_string("schedule", None, f"simulate {', '.join(SCHEDULES)} or all; --out draws them", flag_values=values)
    flags.DEFINE_integer("stages", None, "of the schedules (default: mesh_pipe, or 8)", flag_values=values)
    flags.DEFINE_integer("micro_batches", None, "of the schedules (default: 20, or two a stage)", flag_values=values)
    flags.DEFINE_multi_string("schedule_set", [], f"name=value; any of {', '.join(Costs._fields)}", flag_values=values)
    flags.DEFINE_string("aot", None, "compile for tpu:v5p:8x8x8, gpu:h100:64x8, ...; gives chips and chip", flag_values=values)
    flags.DEFINE_bool("decode", False, "with --aot: compile a decoding step instead, --requests a device", flag_values=values)
    flags.DEFINE_string("out", None, "folder for plan.json and plan.png", flag_values=values)
    flags.DEFINE_bool("receipts", False, "print the published figures, derived, and nothing else", flag_values=values)


def question(values: flags.FlagValues) -> Question:
    given = {name: getattr(values, name) for name in Question._fields if name != "costs"}
    return Question(**given, costs=costs_of(values.schedule_set))


def published_receipts() -> tuple[Receipt, ...]:
    return receipts(PUBLISHED_RUN)


def write(folder: Path, config: Config, chip: Chip, asked: Question, plan: Plan) -> None:
    """`plan.json`, `plan.png` and a figure of every schedule, each whole or not at all."""
    question = asked._asdict() | {"costs": asked.costs._asdict()}
    write_json(folder / "plan.json", {"config": to_dict(config), "question": question, **plan.to_dict()})
    title = f"{asked.chips} x {chip.name}, layout {config.parallel.layout}, remat {config.model.remat}"
    share = make_share(config, asked.chips, chip.platform)
    save(plan_figure.draw(plan, memory.causes(share), chip.hbm_gib, title), folder / "plan.png")
    for timeline in timelines(share.sizes[PIPE], asked) if asked.schedule else ():
        save(schedule_figure.draw(timeline), folder / f"schedule-{timeline.schedule.name}.png")


def plan_decode(config: Config, target: Target, asked: Question) -> Plan:
    check(asked)
    print(f"compiling a decoding step for {target.spec}, {len(target.devices)} devices: half a minute or more ...", flush=True)
    batch = aot_decode.Batch(asked.requests, asked.context)
    compiled, model = aot_decode.compile_decode(config, target, batch)
    return Plan(aot_decode.sections(config, compiled, model, batch), (aot_decode.ASSUMPTION,))


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    if values.receipts:
        print(render_receipts(published_receipts(), PUBLISHED))
        return 0
    if values.decode and not values.aot:
        raise ValueError("--decode: expected together with --aot=TARGET, for which a step is compiled")
    config = override(preset(values.preset), parse_settings(values.set))
    if values.out:
        _cli.make_folder(Path(values.out))  # first, and not after minutes of compiling
    target = topology(values.aot) if values.aot else None  # first: a GPU's compiler must come before JAX looks for GPUs
    chip, asked = chip_named(values.aot.split(":")[1] if target else values.chip, values.chip_set), question(values)
    if target:
        asked = asked._replace(chips=len(target.devices))
    if target and values.decode:
        plan = plan_decode(config, target, asked)
        print("\n" + render(Plan(aot.shortened(plan.sections), plan.assumptions)))
        if values.out:
            write_json(Path(values.out) / "plan.json", {"config": to_dict(config), "target": target.spec, **plan.to_dict()})
            print(f"\nplan: {values.out}")
        return 0
    plan = make_plan(config, chip, asked)
    print(render(plan), flush=True)
    if target:
        print(f"\ncompiling the step for {target.spec}, {len(target.devices)} devices: minutes ...", flush=True)
        compiled = aot.compile_step(config, target)
        added = aot.sections(plan, compiled)
        reasons = aot.reasons(make_share(config, asked.chips, chip.platform), compiled, added[0])
        plan = Plan((*plan.sections, *added), (*plan.assumptions, *reasons))
        print("\n" + render(Plan(aot.shortened(added), tuple(reasons))))
    if values.out:
        write(Path(values.out), config, chip, asked, plan)
        print(f"\nplan and figures: {values.out}")
    return 0


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
