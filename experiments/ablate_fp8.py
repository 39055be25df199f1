"""What does FP8 training cost in loss, and which ingredient of the recipe buys what [§3.3]?

    python -m experiments.ablate_fp8 --preset=quick --seeds=3 --budget=60 [--arms=fp32,bf16,fp8,...] [--tile=32]

Every arm of a seed has the same data and initial parameters. Under test is the report's claim, |FP8 - BF16| / BF16 < 0.25 % in
smoothed training loss; `ulp`, FP32 from parameters one unit in the last place away, shows how far chaos alone carries a run.
The FP32 runs' final parameters then pass one held-out batch in every arm's formats: errors by layer, and routing flips.
`delayed` is not among these, for one batch has no history; it would be `tensor`.

`--tile` is that of all FP8 arms (in small models the recipe's 128 is a whole token); `--slow_steps=N` computes only the first N
steps of `accumulator` and `no_promotion`, whose products take some 20 times longer, and compares those. `--budget`, `--seeds`,
`--resume`: as in `experiments.compare`. A run that diverges goes on to its end without updates, and is reported as such.
Without `--workdir` the folder is runs/ablate_fp8-PRESET. Leaves fp8.json and .png, layers.png, flips.png and all runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dsv3_jax.analysis import comparison, figures, precision, precision_figure
from dsv3_jax.analysis.ablation import Claim, judge
from dsv3_jax.config import Config, Fp8Recipe
from dsv3_jax.data.pipeline import build_data
from dsv3_jax.inference.loaded import load
from dsv3_jax.model.count import count_parameters
from dsv3_jax.settings import override, to_dict
from dsv3_jax.training.journal import write_json
from experiments import _ablation, _cli, compare

UNROUNDED: dict[str, dict[str, Any]] = {
    "fp32": {"compute_dtype": "float32"},
    "ulp": {"compute_dtype": "float32", "init_ulps": 1},
    "bf16": {"compute_dtype": "bfloat16"},
}
INGREDIENTS: dict[str, dict[str, Any]] = {
    "fp8": {},  # the report's
    "tensor": {"scaling": "tensor"},
    "delayed": {"scaling": "delayed"},
    "e5m2": {"gradient_format": "e5m2"},
    "block": {"gradient_scaling": "block"},
    "accumulator": {"accumulation": "promoted"},
    "no_promotion": {"accumulation": "tensor_core"},
    "pow2": {"power_of_two": "everywhere"},
    "router": {"router": True},
}
ARMS = [*UNROUNDED, *INGREDIENTS]
SLOW = ("accumulator", "no_promotion")
NOT_ON_ONE_BATCH = ("fp32", "ulp", "delayed")  # the reference, the same formats again, and what needs a history
ROWS = 16  # of the held-out batch
QUESTION = "What does FP8 training cost in loss?"
CLAIM = Claim(
    text="FP8's training loss is BF16's, to 0.25 %; in percent", measure="gap", arm="fp8", expects="equal",
    within=precision.CLAIM, report="relative error below 0.25 % (15.7B and 229B), §3.3, appendix B.1",
)  # fmt: skip
NEVER = 10**9  # so many skipped updates in a row stop a run: here, a run that diverges is a result


def chosen_arms(names: Sequence[str], base: Config, tile: int | None) -> dict[str, Config]:
    """Name -> config, in the order of ARMS. Raises ValueError for an unknown name, or without both baselines."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"--arms: unknown arm {unknown[0]!r}; expected some of {', '.join(ARMS)}")
    if not {"fp32", "bf16"} <= set(names):
        raise ValueError(f"--arms: expected fp32 and bf16, the baselines, among them, got {','.join(names)}")
    size: dict[str, Any] = {} if tile is None else {"tile": tile}
    fp8 = {name: {"compute_dtype": "bfloat16", "fp8": Fp8Recipe(**size, **recipe)} for name, recipe in INGREDIENTS.items()}
    common = {"fp8": None, "nonfinite_limit": NEVER}
    return {name: override(base, common | settings) for name, settings in (UNROUNDED | fp8).items() if name in names}


def held_out(config: Config) -> dict[str, np.ndarray]:
    """ROWS held-out windows, evenly from all domains."""
    windows = list(build_data(config.data, config.model.vocab_size).eval_batches(1))
    picked = [windows[i] for i in np.linspace(0, len(windows) - 1, min(ROWS, len(windows))).astype(int)]
    return {name: np.concatenate([window[name][0] for window in picked]) for name in picked[0]}


def pass_through(arms: Mapping[str, Config], seeds: int, workdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of every arm: its layers' errors, mean over seeds, and its flips; from each seed's trained FP32 parameters."""
    on_batch = [arm for arm in arms if arm not in NOT_ON_ONE_BATCH]
    errors: dict[str, list[Any]] = {arm: [] for arm in on_batch}
    flips: dict[str, list[precision.Flips]] = {arm: [] for arm in on_batch}
    folder = workdir / compare.folder_of(list(arms).index("fp32"), "fp32")
    for seed in range(seeds):
        model, batch = load(folder / f"seed-{seed}", mtp=False), held_out(compare.seeded(arms["fp32"], seed))
        valid = batch["segment_ids"][:, :-1] != 0
        reference = precision.observe(model.params, model.bias_LE, batch, config=arms["fp32"])
        for arm in on_batch:
            print(f"layers and routing: seed {seed + 1} of {seeds}, {arm}", flush=True)
            ours = precision.observe(model.params, model.bias_LE, batch, config=arms[arm])
            errors[arm].append(precision.layer_errors(ours, reference, valid))
            if ours.routing is not None:
                flips[arm].append(precision.flips(ours.routing, reference.routing, valid))
    layers = {arm: {n: np.mean([e[n] for e in of_arm], axis=0).tolist() for n in of_arm[0]} for arm, of_arm in errors.items()}
    return layers, {arm: precision.summarise_flips(of_arm) for arm, of_arm in flips.items() if of_arm}


def summarise(arms: Mapping[str, Config], runs: Mapping[str, Any], layers: Any, flips: Any) -> dict[str, Any]:
    """The result's `arms`."""
    found = {}
    for arm in arms:
        final = [precision.smoothed(run["metrics"])[-1] for run in runs[arm]]
        found[arm] = {
            "fp8": to_dict(arms[arm])["model"]["fp8"],
            "loss": float(np.mean(final)) if np.isfinite(final).all() else None,
            "gaps": {base: precision.loss_gap(runs[arm], runs[base]) for base in ("bf16", "fp32") if base != arm},
            "layers": layers.get(arm),
            "flips": flips.get(arm),
            **count_parameters(arms[arm].model)._asdict(),
        }
    return found


def judged(arms: Mapping[str, Config], runs: Mapping[str, Any], plan: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What other ablations have too: measures of the arms that came to their end without diverging, and the report's claim."""
    whole = [
        arm for arm in arms if all(r["validation"] and r["validation"]["raw"]["loss"]["all"] is not None for r in runs[arm])
    ]
    scores = _ablation.scores_of(arms, whole, plan["seeds"], workdir)
    claims = []
    if "fp8" in arms:
        gaps = [precision.loss_gap([a], [b])["mean"] for a, b in zip(runs["fp8"], runs["bf16"], strict=True)]
        claims = [judge(CLAIM, {"fp8": [{"gap": gap} for gap in gaps]})] if None not in gaps else []
    differences = comparison.differences(scores) if scores else {"baseline": None, "scores": {}, "differences": {}}
    titles = {name: _ablation.TITLES[name] for name in _ablation.ALWAYS}
    return {"titles": titles, **differences, "claims": claims}


def main() -> int:
    base, slow = _cli.config_from_flags(), flags.FLAGS.slow_steps
    if slow is not None and slow < 1:
        raise ValueError(f"--slow_steps: expected at least 1, got {slow}")
    arms = chosen_arms(flags.FLAGS.arms, base, flags.FLAGS.tile)
    workdir = Path(flags.FLAGS.workdir or f"runs/ablate_fp8-{flags.FLAGS.preset}")
    limits = {} if slow is None else {arm: slow for arm in arms if arm in SLOW}
    with jax.default_matmul_precision("highest"):  # float32 is float32, also where products of it are made of less by default
        plan, runs = compare.planned_runs(arms, base, workdir, limits=limits, tile=flags.FLAGS.tile)
        if isinstance(runs, int):
            return runs
        layers, flips = pass_through(arms, plan["seeds"], workdir)
    others = [f"--{name}={value}" for name in ("tile", "slow_steps") if (value := flags.FLAGS[name].value) is not None]
    command = _ablation.command_of("fp8", plan, flags.FLAGS.arms, *others)
    result = {
        **_ablation.setting("fp8", QUESTION, command, plan, compare.run_folder(arms, "bf16", 0, workdir)),
        **{name: plan[name] for name in ("limits", "tile")},
        "claim_percent": precision.CLAIM,
        "smoothing": precision.COEFFICIENT,
        "moe_layers": list(range(base.model.n_dense_layers + 1, base.model.num_hidden_layers + 1)),
        "arms": summarise(arms, runs, layers, flips),
        **judged(arms, runs, plan, workdir),
    }
    write_json(workdir / "fp8.json", result)
    figures.save(precision_figure.draw_gaps(result), workdir / "fp8.png")
    figures.save(precision_figure.draw_layers(result), workdir / "layers.png")
    if flips:
        figures.save(precision_figure.draw_flips(result), workdir / "flips.png")
    print(precision_figure.table(result))
    print(f"figures: {', '.join(str(path) for path in sorted(workdir.glob('*.png')))}")
    return 0


def define_flags() -> None:
    flags.DEFINE_list("arms", ARMS, "what to run; fp32 and bf16 among them")
    flags.DEFINE_integer("tile", None, "tile of every FP8 arm; default: the recipe's 128")
    flags.DEFINE_integer("slow_steps", None, f"steps of {' and '.join(SLOW)}; default: as all")


if __name__ == "__main__":
    _ablation.same_sums_everywhere()
    _cli.define_config_flags()
    flags.adopt_module_key_flags(_cli)  # so that --help lists them
    compare.define_run_flags()
    flags.adopt_module_key_flags(compare)
    define_flags()
    _cli.run(main)
