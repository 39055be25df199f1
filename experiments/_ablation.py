"""What the ablations share: arms, measures and claims in, runs by `experiments.compare`, a verdict for every claim out.

An ablation is one program, `experiments/ablate_NAME.py`: its arms as functions of the base configuration, what it measures of a
finished run, and the claims of the report that it puts to the test. It leaves NAME.json, NAME.png and every run in its folder.
"""

import datetime
import functools
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dsv3_jax.analysis import comparison, figures, metrics, results_page, specialisation
from dsv3_jax.analysis.ablation import Claim, judge
from dsv3_jax.config import Config
from dsv3_jax.model.count import count_parameters
from dsv3_jax.settings import override
from dsv3_jax.training.journal import write_json
from experiments import _cli, compare

OBSERVED = "observed.json"  # in a run's folder: what its ablation measured of it
# What `measures` gives of every run, with units; ALWAYS is shown by every ablation.
TITLES = {
    "loss": "validation loss, nats per token",
    "train_loss": "loss at training's end, nats per token",
    "bits_per_byte": "validation bits per byte",
    "max_vio": "MaxVio of batches, second half of training",
    "max_vio_global": "MaxVio of all held-out text",
    "domain_bits": "domain information, bits per choice",
}
ALWAYS = ("loss", "train_loss")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """`arms(base)`: name -> configuration, the first is what others are compared with. `shows`: which of TITLES beside
    ALWAYS. `observe(folder, config)`: further measures of a finished run, computed once, and `titles` of them with units."""

    name: str
    question: str
    arms: Callable[[Config], dict[str, Config]]
    claims: tuple[Claim, ...]
    shows: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    observe: Callable[[Path, Config], dict[str, float]] | None = None
    preset: str = "tiny"
    base: Mapping[str, Any] = field(default_factory=dict)  # settings of all arms, beneath those of --set

    @property
    def all_titles(self) -> dict[str, str]:
        return {name: TITLES[name] for name in (*ALWAYS, *self.shows)} | dict(self.titles)


def measures(folder: Path, config: Config) -> dict[str, float]:
    """Of a finished run: loss and bits per byte of held-out text, loss of the last tenth of training, MaxVio of training's
    batches and of all held-out text, bits that an expert says of the domain."""
    run = compare.read_run(folder)
    found, records = comparison.scores(run), run["metrics"]
    last = [r["main_loss"] for r in records[-max(1, len(records) // 10) :] if r["main_loss"] is not None]
    found["train_loss"] = float(np.mean(last)) if last else math.nan
    load_LME = np.load(folder / "validation_load.npy")[: config.model.n_main_moe_layers]
    if len(load_LME):
        found["max_vio_global"] = float(metrics.max_violation(load_LME.sum(axis=1)).mean())
        found["domain_bits"] = float(np.mean([specialisation.mutual_information(load_ME) for load_ME in load_LME]))
    return found


def observed(ablation: Ablation, folder: Path, config: Config) -> dict[str, float]:
    """What `ablation.observe` says of the run, from its file if it was computed before."""
    if ablation.observe is None:
        return {}
    path = folder / OBSERVED
    if not path.exists():
        print(f"observing {folder}", flush=True)
        write_json(path, ablation.observe(folder, config))
    return json.loads(path.read_text())


def corpus_of(folder: Path) -> dict[str, Any]:
    """Of the text that the run in `folder` read: bytes, tokens to train on, and one SHA-256 over its domains'."""
    domains = json.loads((folder / "run.json").read_text())["data"]["domains"]
    digest = hashlib.sha256(json.dumps({name: row["sha256"] for name, row in sorted(domains.items())}).encode())
    sums = {name: sum(row[name] for row in domains.values()) for name in ("bytes", "train_tokens")}
    return {"sha256": digest.hexdigest()[:16], **sums}


def chosen(arms: dict[str, Config], names: Sequence[str] | None) -> dict[str, Config]:
    """Those of `names`, in the ablation's order. Raises ValueError for an unknown name or fewer than two."""
    if not names:
        return arms
    unknown = [name for name in names if name not in arms]
    if unknown or len(set(names)) < 2:
        raise ValueError(f"--arms: expected at least 2 of {', '.join(arms)}, got {','.join(names)}")
    return {name: config for name, config in arms.items() if name in names}


def command_of(name: str, plan: Mapping[str, Any], arms: Sequence[str] | None, *others: str) -> str:
    """With the number of steps that a budget became, so that it gives the same anywhere; without folders."""
    settings = [*(s for s in flags.FLAGS.set if not s.startswith("steps=")), f"steps={plan['steps']}"]
    words = [f"--preset={flags.FLAGS.preset}", f"--seeds={plan['seeds']}", *([f"--arms={','.join(arms)}"] if arms else [])]
    return shlex.join(["python", "-m", f"experiments.ablate_{name}", *words, *others, *(f"--set={s}" for s in settings)])


def setting(name: str, question: str, command: str, plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """JSON-able: what the numbers of an ablation hang on; `folder`: any of its runs."""
    run = json.loads((folder / "run.json").read_text())
    return {
        "name": name,
        "question": question,
        "command": command,
        "preset": flags.FLAGS.preset,
        "date": datetime.date.today().isoformat(),
        "seeds": plan["seeds"],
        "steps": plan["steps"],
        "tokens": run["total_tokens"],
        "corpus": corpus_of(folder),
        "versions": run["versions"],
        "device": run["devices"][0],
        "config": plan["config"],
    }


def scores_of(
    arms: Mapping[str, Config],
    names: Iterable[str],
    seeds: int,
    workdir: Path,
    more: Callable[[Path, Config], dict[str, float]] = lambda folder, config: {},
) -> dict[str, list[dict[str, float]]]:
    """Measures of the arms `names`, a seed each."""
    found = {}
    for arm in names:
        runs = [compare.run_folder(arms, arm, seed, workdir) for seed in range(seeds)]
        found[arm] = [measures(run, arms[arm]) | more(run, arms[arm]) for run in runs]
    return found


def result_of(
    ablation: Ablation, arms: Mapping[str, Config], plan: Mapping[str, Any], workdir: Path, command: str
) -> dict[str, Any]:
    """JSON-able: setting, every run's measures, differences from the first arm, and a verdict for each claim."""
    scores = scores_of(arms, arms, plan["seeds"], workdir, functools.partial(observed, ablation))
    return {
        **setting(ablation.name, ablation.question, command, plan, compare.run_folder(arms, next(iter(arms)), 0, workdir)),
        "arms": {arm: count_parameters(config.model)._asdict() for arm, config in arms.items()},
        "titles": ablation.all_titles,
        **comparison.differences(scores),
        "claims": [judge(claim, scores) for claim in ablation.claims if set(claim.arms) <= set(arms)],
    }


def table(result: Mapping[str, Any]) -> str:
    """For a terminal: measures by arm, then the verdicts."""
    lines = [comparison.table(result, result["titles"]), ""]
    for claim in result["claims"]:
        lines.append(f"{claim['verdict'].upper()}: {claim['text']}")
        lines.append(f"  {results_page.difference_text(claim)}; report: {claim['report']}")
    return "\n".join(lines)


def main(ablation: Ablation) -> int:
    base = _cli.config_from_flags()
    base = override(base, {k: v for k, v in ablation.base.items() if k not in compare.parse_settings(flags.FLAGS.set)})
    names = flags.FLAGS.arms
    arms = chosen(ablation.arms(base), names)
    workdir = Path(flags.FLAGS.workdir or f"runs/ablate_{ablation.name}-{flags.FLAGS.preset}")
    plan, runs = compare.planned_runs(arms, base, workdir, functools.partial(observed, ablation))
    if isinstance(runs, int):
        return runs
    result = result_of(ablation, arms, plan, workdir, command_of(ablation.name, plan, names))
    write_json(workdir / f"{ablation.name}.json", result)
    figures.save(comparison.draw(runs, result, result["titles"]), workdir / f"{ablation.name}.png")
    print(table(result))
    print(f"figure: {workdir / f'{ablation.name}.png'}")
    return 0


def same_sums_everywhere() -> None:
    """One thread for XLA on a CPU, unless NPROC says otherwise; to be called before the first array.

    How many there are decides in which order some sums are taken, and training makes of a last bit a third digit: so the
    command beside a result gives its numbers on a machine with more cores, too. More cores take more processes.
    """
    os.environ.setdefault("NPROC", "1")


def run(ablation: Ablation) -> None:
    """The program."""
    same_sums_everywhere()
    _cli.define_config_flags()
    flags.adopt_module_key_flags(_cli)  # so that --help lists them
    compare.define_run_flags()
    flags.adopt_module_key_flags(compare)
    flags.DEFINE_list("arms", None, "some of the arms; default: all")
    flags.FLAGS.set_default("preset", ablation.preset)
    flags.FLAGS.set_default("seeds", 5)
    _cli.run(functools.partial(main, ablation))
