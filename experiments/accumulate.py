"""How large does the error of the tensor core's accumulation grow with K, and what does promotion to float32 gain?

    python -m experiments.accumulate --out=runs/accumulate [--seeds=5] [--longest=16384] [--size=64]

Products [size, K] x [K, size] of operands in E4M3, normal and uniform, for K = 32, 64, ..., longest: the tensor core as it is,
in both readings of what the report leaves open, promoted each 128 products, and float32; each against float64. Prints a table
and what it says of the report's 2 % at K = 4,096; leaves `accumulate.json` and `accumulate.png`. Some two minutes on two cores,
nearly all of it compilation.
"""

import sys
from pathlib import Path

from absl import flags

from dsv3_jax.analysis import accumulation
from dsv3_jax.analysis.figures import save
from dsv3_jax.training.journal import write_json
from experiments import _cli


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("out", None, "folder for accumulate.json and accumulate.png", flag_values=values)
    flags.DEFINE_integer("seeds", 5, "pairs of matrices for every input and K", flag_values=values)
    flags.DEFINE_integer("longest", 16384, "largest K, a power of two", flag_values=values)
    flags.DEFINE_integer("size", 64, "rows of the first matrix and columns of the second", flag_values=values)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    if not values.out:
        raise ValueError("--out: expected a folder, got none")
    for name in ("seeds", "size"):
        if getattr(values, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(values, name)}")
    ks = accumulation.lengths(values.longest)
    folder = Path(values.out)
    _cli.make_folder(folder)
    size, seeds = values.size, values.seeds
    summary = accumulation.summarise(accumulation.measure(size, ks, seeds, show=sys.stderr.isatty()), ks)
    command = f"python -m experiments.accumulate --out={values.out} --seeds={seeds} --longest={values.longest} --size={size}"
    said = accumulation.verdict(summary)
    write_json(
        folder / "accumulate.json", {"command": command, "seeds": list(range(seeds)), "size": size, **summary, "verdict": said}
    )
    save(accumulation.draw(summary, f"{size} x {size} products in E4M3, {seeds} seeds"), folder / "accumulate.png")
    print(accumulation.table(summary))
    print(f"\n{said}\n\nnumbers and figure: {folder}")
    return 0


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
