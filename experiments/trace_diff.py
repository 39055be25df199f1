"""Where do two routing traces of one text choose other experts: checkpoints, precisions, meshes, seeds?

    python -m experiments.trace_diff --a=TRACE --b=TRACE --out=FOLDER

Prints the share of tokens whose experts differ by layer, by domain and by the margin that the first trace has, and leaves
`diff.json` and `diff.png` in FOLDER.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.analysis.figures import save
from dsv3_jax.tracing import diff
from dsv3_jax.tracing.store import open_trace
from dsv3_jax.training.journal import write_json
from experiments import _cli


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("a", None, "folder of a trace", flag_values=values)
    flags.DEFINE_string("b", None, "folder of another one, of the same text", flag_values=values)
    flags.DEFINE_string("out", None, "folder for diff.json and diff.png", flag_values=values)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    for name in ("a", "b", "out"):
        if not getattr(values, name):
            raise ValueError(f"--{name}: expected a folder, got none")
    folder = Path(values.out)
    found = diff.compare(open_trace(values.a), open_trace(values.b))
    print(diff.table(found))
    _cli.make_folder(folder)
    command = f"python -m experiments.trace_diff --a={values.a} --b={values.b} --out={values.out}"
    write_json(folder / "diff.json", {"command": command, **found})
    save(diff.draw(found), folder / "diff.png")
    print(f"diff: {folder}")
    return 0


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
