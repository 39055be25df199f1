"""In which format does every operation of a training step run, and what does a layer keep for the backward pass?

    python -m experiments.precision --preset=deepseek_v3_671b --set=fp8=report
    python -m experiments.precision --preset=quick --set='fp8={"tile": 32, "gradient_format": "e5m2"}' [--out=runs/precision]

Seconds; nothing is computed. The first table is what the model follows: runs in FP32, BF16 and FP8 differ in it alone. The
second is read off the traced program of one layer, beside the same layer in BF16. `--out` leaves both in `precision.json`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import Config
from dsv3_jax.fp8.precision import LEGEND, Row, table
from dsv3_jax.planner.kept import kept_per_token
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override, parse_settings
from dsv3_jax.training.journal import write_json
from experiments import _cli

TITLES = Row("operation", "Fprop: x . W", "Dgrad: dy", "Wgrad: x . dy", "kept")


def kept_tables(config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """Layer -> run -> dtype -> bytes of a token."""
    model = config.model
    runs = {"this run": model, "BF16": replace(model, fp8=None, compute_dtype="bfloat16")}
    kinds = {"dense layer": model.n_dense_layers, "MoE layer": model.n_moe_layers}
    return {
        kind: {name: kept_per_token(run, dense=kind == "dense layer") for name, run in runs.items()}
        for kind, n_layers in kinds.items()
        if n_layers
    }


def rendered(rows: list[Row], kept: dict[str, Any]) -> str:
    widths = [max(len(row[i]) for row in (TITLES, *rows)) for i in range(len(TITLES))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (TITLES, *rows)]
    lines += ["", LEGEND, "", f"{'kept beside its input, bytes a token':<44}{'this run':>12}{'BF16':>12}{'ratio':>8}"]
    for kind, runs in kept.items():
        ours, theirs = runs["this run"], runs["BF16"]
        for dtype in sorted({*ours, *theirs}):
            lines.append(f"  {kind + ', ' + dtype:<42}{ours.get(dtype, 0):>12,.0f}{theirs.get(dtype, 0):>12,.0f}")
        sums = sum(ours.values()), sum(theirs.values())
        lines.append(f"  {kind:<42}{sums[0]:>12,.0f}{sums[1]:>12,.0f}{sums[0] / sums[1]:>8.3f}")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("preset", "deepseek_v3_671b", f"one of {', '.join(PRESETS)}", flag_values=values)
    flags.DEFINE_multi_string("set", [], "name=value; any field of config.py, may be given several times", flag_values=values)
    flags.DEFINE_string("out", None, "folder for precision.json", flag_values=values)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    config = override(preset(values.preset), parse_settings(values.set))
    rows, kept = table(config), kept_tables(config)
    print(rendered(rows, kept))
    if values.out:
        folder = Path(values.out)
        _cli.make_folder(folder)
        write_json(folder / "precision.json", {"table": [row._asdict() for row in rows], "kept_bytes_per_token": kept})
    return 0


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
