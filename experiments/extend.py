"""Extend a model's context in two phases with YaRN, and map which needles it finds before and after [§4.3].

    python -m experiments.extend --workdir=runs/extend [--resume] [--set=seed=1 --set=data_seed=1]

A small DeepSeek-V3 is trained at 256 tokens without YaRN, on text and key-value retrieval documents; then two short runs,
each with the weights of the one before, go to 1,024 and to 4,096 tokens. Each model has to find needles at every depth of
contexts up to 4,096 tokens. Fewer than 95 % of them found at 256 before extension make the result void, and the exit status 1.
`--resume` continues after a kill at any moment. Leaves needles.json, needles.png and a run's folder for each length.
Time and results: experiments/README.md.
"""

import sys
from pathlib import Path

from absl import flags

from dsv3_jax.analysis import figures, needles
from dsv3_jax.training.journal import write_json
from experiments import _cli, _extend

VOID = 1


def numbers(name: str, text: str) -> list[int]:
    """`256,1024` -> [256, 1024]. Raises ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between them, got {text!r}") from None


def main() -> int:
    workdir, base = Path(_cli.workdir_from_flags()), _cli.config_from_flags()
    lengths, steps = numbers("lengths", flags.FLAGS.lengths), flags.FLAGS.phase_steps
    grid = needles.Grid(_extend.measured_lengths(lengths), _extend.evenly(flags.FLAGS.depths), flags.FLAGS.samples)
    _extend.check(base, lengths, grid)
    _extend.keep_plan(workdir, flags.FLAGS.resume, _extend.plan_of(base, lengths, steps, grid))
    maps = _extend.run_phases(base, lengths, steps, grid, workdir)
    if maps is None:
        print("stopped, checkpoint saved; go on with the same command and --resume", file=sys.stderr)
        return _cli.INTERRUPTED
    result = needles.summarise(maps, grid, lengths[0])
    line = needles.verdict(result, lengths[0])
    write_json(workdir / "needles.json", result)
    figures.save(needles.draw(result, line), workdir / "needles.png")
    print(f"{needles.table(result)}\n{line}\nfigure: {workdir / 'needles.png'}")
    return VOID if result["void"] else 0


def define_flags() -> None:
    flags.DEFINE_string("lengths", "256,1024,4096", "tokens of the base training (its seq_len) and of every phase after it")
    flags.DEFINE_integer("phase_steps", 150, "steps of each phase")
    flags.DEFINE_integer("depths", 9, "depths at which needles lie, from the first line to the last")
    flags.DEFINE_integer("samples", 10, "needles at each depth of each length")


if __name__ == "__main__":
    _cli.define_config_flags()
    flags.FLAGS.set_default("preset", "needles")
    flags.adopt_module_key_flags(_cli)  # so that --help lists them
    define_flags()
    _cli.run(main)
