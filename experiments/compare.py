"""Compare values of one setting over seeds: same initialisation and data order for every arm of a seed, paired differences.

    python -m experiments.compare --preset=tiny --vary=controller=sign,none --seeds=3 --budget=10 --workdir=runs/compare

`--budget` minutes are turned into a number of steps, the same for every arm, by timing a few steps of each once;
`--set=steps=...` says it instead. `--resume` continues after a kill at any moment and computes no finished run again; given
while the first process is still at work, as in a second terminal, it takes a share of the runs.
Without `--workdir` the folder is runs/compare-PRESET-VARY.
Results: experiments/README.md.
"""

import contextlib
import fcntl
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dsv3_jax.analysis import comparison, figures
from dsv3_jax.config import Config
from dsv3_jax.settings import override, parse_settings, to_dict
from dsv3_jax.training.journal import read_metrics, write_json
from dsv3_jax.training.loop import train
from experiments import _cli

TIMED_STEPS = 6
LEAST_STEPS = 10
SLOWER = 1.15  # a long run's steps beside the timed ones: checkpoints, and what else the machine does
FIXED_BY_DESIGN = ("seed", "data_seed", "steps")  # --seeds varies the first two, all arms share the third


def parse_arms(vary: str, base: Config) -> dict[str, Config]:
    """`name=value,value,...` -> {"name=value": config}. Commas inside brackets belong to a value.

    Raises ValueError for fewer than two values, equal ones, or what `override` refuses.
    """
    name, equals, values = vary.partition("=")
    texts = [text.strip() for text in re.split(r",(?![^{\[]*[}\]])", values)]
    if not equals or len(texts) < 2 or "" in texts:
        raise ValueError(f"--vary: expected name=value,value,... with at least 2 values, got {vary!r}")
    if name in FIXED_BY_DESIGN:
        raise ValueError(f"--vary: {name} is not for arms to differ in; see --seeds, --budget and --set=steps=")
    if len(set(texts)) < len(texts):
        raise ValueError(f"--vary: the same value twice in {vary!r}")
    return {f"{name}={text}": override(base, {name: text}) for text in texts}


def folder_of(index: int, arm: str) -> str:
    return f"{index}-{_safe(arm)}"


def _safe(text: str) -> str:
    """`text` as a folder's name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", text)


def seeded(config: Config, seed: int) -> Config:
    return override(config, {"seed": config.train.seed + seed, "data_seed": config.data.data_seed + seed})


def steps_within(budget_s: float, timings: list[dict[str, float]], seeds: int) -> int:
    """Steps of every run such that all of them, validations included, take `budget_s` seconds.

    Raises ValueError if that leaves fewer than LEAST_STEPS.
    """
    per_step = SLOWER * seeds * sum(t["step"] for t in timings)
    fixed = seeds * sum(t["fixed"] for t in timings)
    steps = int((budget_s - fixed) / per_step)
    if steps < LEAST_STEPS:
        need = (fixed + LEAST_STEPS * per_step) / 60
        raise ValueError(
            f"--budget: too short; {LEAST_STEPS} steps of every run take about {need:.1f} minutes more than set-up"
        )
    return steps


def time_arm(config: Config, folder: Path) -> dict[str, float]:
    """Seconds of a step, and of what a run does besides its steps. A first run compiles, for all seeds; a second is timed."""
    shutil.rmtree(folder, ignore_errors=True)
    for attempt in ("compile", "timed"):
        start = time.perf_counter()
        train(override(config, {"steps": TIMED_STEPS}), folder / attempt, header=False, progress=False)
    wall, seconds = time.perf_counter() - start, [r["seconds"] for r in read_metrics(folder / "timed")]
    shutil.rmtree(folder)
    return {"step": float(np.median(seconds[1:])), "fixed": max(0.0, wall - sum(seconds))}


def make_plan(
    arms: dict[str, Config],
    base: Config,
    seeds: int,
    budget_s: float | None,
    workdir: Path,
    limits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What a resumed comparison keeps: arms, seeds, steps and the config around them.

    `limits`: arms of whose runs only so many steps are computed; their cost does not grow with the length of a run.
    """
    plan: dict[str, Any] = {"arms": list(arms), "seeds": seeds, "config": to_dict(base), "steps": base.train.steps}
    if budget_s is not None:
        start, timings = time.perf_counter(), []
        for i, (arm, config) in enumerate(arms.items()):
            print(f"timing {arm} ...", flush=True)
            timing, limit = time_arm(config, workdir / "timing" / folder_of(i, arm)), (limits or {}).get(arm)
            if limit is not None:
                timing = {"step": 0.0, "fixed": timing["fixed"] + SLOWER * limit * timing["step"]}
            timings.append(timing)
        plan["steps"] = steps_within(budget_s - (time.perf_counter() - start), timings, seeds)
        plan["timing"] = dict(zip(arms, timings, strict=True))
    return plan


def read_plan(workdir: Path, resume: bool, given: dict[str, Any]) -> dict[str, Any] | None:
    """The stored plan of this comparison, or None. Raises ValueError if it is another one, or `resume` is not given."""
    path = workdir / "plan.json"
    if not path.exists():
        return None
    if not resume:
        raise ValueError(f"{workdir} holds a comparison already; add --resume to continue it, or take another --workdir")
    plan = json.loads(path.read_text())
    for key, value in given.items():
        if plan.get(key) != value:
            raise ValueError(f"{workdir} holds another comparison: {key} differs (all flags as before)")
    return plan


@contextlib.contextmanager
def claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process alone holds the lock of file `path`, until the block's end or its own; `wait`: until it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


Observe = Callable[[Path, Config], Any]


def run_arms(
    arms: dict[str, Config], plan: dict[str, Any], workdir: Path, observe: Observe | None = None, wait: bool = True
) -> dict[str, list[dict[str, Any]]] | int:
    """Every run, seed by seed so that pairs complete early; finished ones are only read. What other processes are at is left to
    them. An exit status after Ctrl-C or, without `wait`, if all that is left is theirs.

    `observe(folder, config)` is called for every finished run. A run that stops at its limit has no validation: it is the
    beginning of one as long as the others.
    """
    waiting = [(seed, arm) for seed in range(plan["seeds"]) for arm in arms]
    while waiting:
        others = []
        for seed, arm in waiting:
            folder = run_folder(arms, arm, seed, workdir)
            with claimed(folder.with_suffix(".lock"), wait=False) as mine:
                if not mine:
                    others.append((seed, arm))
                elif not _complete(arms[arm], arm, seed, plan, folder, observe):
                    return _cli.INTERRUPTED
        if others and not wait:
            print(f"{len(others)} runs are left to other processes")
            return 0
        if len(others) == len(waiting):
            time.sleep(1)
        waiting = others
    return {arm: [read_run(run_folder(arms, arm, seed, workdir)) for seed in range(plan["seeds"])] for arm in arms}


def run_folder(arms: Mapping[str, Config], arm: str, seed: int, workdir: Path) -> Path:
    return workdir / folder_of(list(arms).index(arm), arm) / f"seed-{seed}"


def _complete(config: Config, arm: str, seed: int, plan: Mapping[str, Any], folder: Path, observe: Observe | None) -> bool:
    """Computes what is left of a run. False after Ctrl-C."""
    steps = plan["steps"]
    limit = min(steps, plan.get("limits", {}).get(arm, steps))
    config = override(seeded(config, seed), {"steps": steps})
    if not (folder / "validation.json").exists() and (limit == steps or len(read_metrics(folder)) < limit):
        print(f"seed {seed + 1} of {plan['seeds']}, {arm}, {limit} steps", flush=True)
        if train(config, folder, resume=True, header=False, step_limit=limit).interrupted:
            return False
    if observe is not None:
        observe(folder, config)
    return True


def read_run(folder: Path) -> dict[str, Any]:
    """`validation` (None before its end) and `metrics`, a record a step."""
    path = folder / "validation.json"
    return {"validation": json.loads(path.read_text()) if path.exists() else None, "metrics": read_metrics(folder)}


def planned_runs(
    arms: dict[str, Config], base: Config, workdir: Path, observe: Observe | None = None, **options: Any
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]] | int]:
    """The plan that the flags ask for, or the stored one, and all of its runs; or the status of a program that ends without.

    `options`, `limits` among them, are part of the plan: resumed with others, it is another one. Raises ValueError.
    """
    settings, seeds, budget = parse_settings(flags.FLAGS.set), flags.FLAGS.seeds, flags.FLAGS.budget
    if seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {seeds}")
    if "steps" not in settings and (budget is None or not 0 < budget < math.inf):
        raise ValueError(f"--budget: expected finite minutes > 0 (or --set=steps=...), got {budget}")
    given = {"arms": list(arms), "seeds": seeds, "config": to_dict(base), **options}
    with claimed(workdir / "plan.lock", wait=True):
        plan = read_plan(workdir, flags.FLAGS.resume, given)
        if plan is None:
            budget_s = None if "steps" in settings else budget * 60
            plan = make_plan(arms, base, seeds, budget_s, workdir, options.get("limits")) | options
            write_json(workdir / "plan.json", plan)
    runs = run_arms(arms, plan, workdir, observe, flags.FLAGS.wait)
    if runs == _cli.INTERRUPTED:
        print("stopped, checkpoint saved; go on with the same command and --resume", file=sys.stderr)
    return plan, runs


def main() -> int:
    base = _cli.config_from_flags()
    if not flags.FLAGS.vary:
        raise ValueError("--vary: expected name=value,value,..., got none")
    arms = parse_arms(flags.FLAGS.vary, base)
    workdir = Path(flags.FLAGS.workdir or f"runs/compare-{flags.FLAGS.preset}-{_safe(flags.FLAGS.vary)}")
    plan, runs = planned_runs(arms, base, workdir)
    if isinstance(runs, int):
        return runs
    result = comparison.compare(runs)
    write_json(workdir / "compare.json", {"steps": plan["steps"], **result})
    figures.save(comparison.draw(runs, result), workdir / "compare.png")
    print(comparison.table(result))
    print(f"figure: {workdir / 'compare.png'}")
    return 0


def define_run_flags() -> None:
    """Those of `planned_runs`."""
    flags.DEFINE_integer("seeds", 3, "runs of each arm")
    flags.DEFINE_float("budget", None, "minutes that the whole comparison may take")
    flags.DEFINE_bool("wait", True, "for runs that other processes are at; without, end when nothing else is left to do")


def define_flags() -> None:
    flags.DEFINE_string("vary", None, "name=value,value,...: the setting that the arms differ in; the first is the baseline")


if __name__ == "__main__":
    _cli.define_config_flags()
    flags.adopt_module_key_flags(_cli)  # so that --help lists them
    define_run_flags()
    define_flags()
    _cli.run(main)
