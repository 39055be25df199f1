"""All ablations, with all cores: which of the report's claims hold at a size that one can afford?

    python -m experiments.ablations --preset=tiny --budget=120 [--seeds=5] [--only=balance,mtp,...] [--workers=2] [--resume]

Runs every `experiments.ablate_NAME` and writes their verdicts to RESULTS.md, with numbers and figures in results/, in the
folder --results. `--budget`: minutes for all of it, divided by the number of runs; `--set=steps=...` says it instead. A worker
is a process that takes one run at a time, on one core (or NPROC); on an accelerator, take as many as its memory holds.
Ctrl-C saves every run; `--resume` goes on, and is also how a longer list (`--only`) continues a shorter one.
"""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from absl import flags
from tqdm import tqdm

from dsv3_jax.analysis import results_page
from dsv3_jax.config import Config
from dsv3_jax.settings import override, parse_settings
from dsv3_jax.training.console import Interrupt
from dsv3_jax.training.journal import write_text
from experiments import _cli

NAMES = ("balance", "mtp", "attention", "experts", "groups", "controllers", "fp8")
FP8_ARMS = ("fp32", "bf16", "fp8")  # its ingredients are a question by themselves
POLL_S = 1.0


def arms_of(name: str, base: Config) -> int:
    """How many runs a seed has. Raises ValueError where the base has not what the ablation takes away."""
    if name == "fp8":
        return len(FP8_ARMS)
    ablation = importlib.import_module(f"experiments.ablate_{name}").ABLATION
    return len(ablation.arms(override(base, dict(ablation.base))))


def chosen(names: Sequence[str]) -> list[str]:
    """In the order of NAMES. Raises ValueError for an unknown one."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"--only: expected some of {', '.join(NAMES)}, got {','.join(names)}")
    return [name for name in NAMES if name in names]


def command(name: str, workdir: Path, budget: float | None) -> list[str]:
    """Of an ablation's program; `budget`: minutes of one core."""
    words = [f"--preset={flags.FLAGS.preset}", f"--seeds={flags.FLAGS.seeds}", f"--workdir={workdir / name}", "--resume"]
    words += [f"--set={setting}" for setting in flags.FLAGS.set]
    words += [f"--arms={','.join(FP8_ARMS)}"] if name == "fp8" else []
    words += [] if budget is None else [f"--budget={budget}"]
    return [sys.executable, "-m", f"experiments.ablate_{name}", *words]


class Workers:
    """Processes that compute the ablations' runs, each going through all of them; and what went wrong."""

    def __init__(self, commands: Mapping[str, list[str]], workdir: Path):
        self.commands, self.workdir = commands, workdir
        self.failed: dict[str, str] = {}
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def work(self, number: int, cores: set[int]) -> None:
        """Worker `number`; another one begins with another ablation, so that they meet late."""
        names = list(self.commands)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if self.stopped or name in self.failed:
                continue
            log = self.workdir / name / f"worker-{number}.log"
            status = self._call([*self.commands[name], "--nowait"], log, cores)
            if status not in (0, _cli.INTERRUPTED) and not self.stopped:
                self.failed[name] = last_line(log)

    def _call(self, words: list[str], log: Path, cores: set[int]) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            with self._lock:
                if self.stopped:
                    return _cli.INTERRUPTED
                process = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)
                self._running.add(process)
            if cores:
                with suppress(OSError):  # it may have ended
                    os.sched_setaffinity(process.pid, cores)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        return status

    def stop(self, at_once: bool = False) -> None:
        """Every process finishes its step, saves, and ends."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                # not SIGINT, which whatever a shell begins in the background inherits as ignored
                process.kill() if at_once else process.terminate()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def compute(workers: Workers, count: int, total: int) -> None:
    """All runs, with a bar. After Ctrl-C or SIGTERM those that were begun are saved; a second one ends them at once."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    threads = [threading.Thread(target=workers.work, args=(i, set(cores[i::count]))) for i in range(count)]
    for thread in threads:
        thread.start()
    folders = [workers.workdir / name for name in workers.commands]
    try:
        with Interrupt() as interrupt, tqdm(total=total, unit="run", disable=None) as bar:
            while any(thread.is_alive() for thread in threads):
                time.sleep(POLL_S)
                finished = sum(1 for folder in folders for _ in folder.glob("*/seed-*/validation.json"))
                bar.update(finished - bar.n)
                if interrupt.asked and not workers.stopped:
                    workers.stop()
    except KeyboardInterrupt:
        workers.stop(at_once=True)
        raise
    for thread in threads:
        thread.join()


def collect(workers: Workers, results: Path) -> None:
    """Verdicts of every ablation whose runs are there, into `results`."""
    for name, words in workers.commands.items():
        if name in workers.failed:
            continue
        folder = workers.workdir / name
        ended = subprocess.run(words, capture_output=True, text=True)
        if ended.returncode:
            workers.failed[name] = (ended.stderr.strip() or ended.stdout.strip() or "no output").splitlines()[-1]
            continue
        print(ended.stdout, flush=True)
        for kind in ("json", "png"):
            target = results / "results" / f"{name}-{flags.FLAGS.preset}.{kind}"
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(target.name + ".tmp")
            shutil.copyfile(folder / f"{name}.{kind}", beside)
            beside.replace(target)


def write_page(results: Path) -> Path:
    """RESULTS.md from every result that is there, also of earlier calls with other presets."""
    paths = sorted((results / "results").glob("*.json"), key=lambda path: path.name)
    found = [json.loads(path.read_text()) for path in paths]
    found.sort(key=lambda r: (NAMES.index(r["name"]) if r["name"] in NAMES else len(NAMES), r["tokens"]))
    pictures = {path.stem: f"results/{path.stem}.png" for path in paths if path.with_suffix(".png").exists()}
    write_text(results / "RESULTS.md", results_page.page(found, pictures))
    return results / "RESULTS.md"


def main() -> int:
    base, names = _cli.config_from_flags(), chosen(flags.FLAGS.only)
    workdir, results = Path(flags.FLAGS.workdir or f"runs/ablations-{flags.FLAGS.preset}"), Path(flags.FLAGS.results)
    count = flags.FLAGS.workers or os.cpu_count() or 1
    if count < 0 or flags.FLAGS.seeds < 1:
        raise ValueError(f"--workers, --seeds: expected 0 or more and at least 1, got {count} and {flags.FLAGS.seeds}")
    budget, fixed = flags.FLAGS.budget, "steps" in parse_settings(flags.FLAGS.set)
    if not fixed and (budget is None or not 0 < budget < math.inf):
        raise ValueError(f"--budget: expected finite minutes > 0 (or --set=steps=...), got {budget}")
    if workdir.exists() and any(workdir.iterdir()) and not flags.FLAGS.resume:
        raise ValueError(f"{workdir} holds ablations already; add --resume to continue them, or take another --workdir")
    arms = {name: arms_of(name, base) for name in names}
    minutes = {name: None if fixed else budget * count * n / sum(arms.values()) for name, n in arms.items()}
    workers = Workers({name: command(name, workdir, minutes[name]) for name in names}, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    compute(workers, count, sum(arms.values()) * flags.FLAGS.seeds)
    if workers.stopped:
        print("stopped, checkpoints saved; go on with the same command and --resume", file=sys.stderr)
        return _cli.INTERRUPTED
    collect(workers, results)
    print(f"written: {write_page(results)}")
    for name, line in workers.failed.items():
        print(f"error: {name}: {line.removeprefix('error: ')}; see {workdir / name}", file=sys.stderr)
    return _cli.FAILED if workers.failed else 0


def define_flags() -> None:
    flags.DEFINE_integer("seeds", 5, "runs of each arm")
    flags.DEFINE_float("budget", None, "minutes that all of it may take")
    flags.DEFINE_list("only", list(NAMES), "some of the ablations")
    flags.DEFINE_integer("workers", 0, "processes at a time; 0: one a core")
    flags.DEFINE_string("results", "experiments", "folder of RESULTS.md and results/")


if __name__ == "__main__":
    _cli.define_config_flags()
    flags.adopt_module_key_flags(_cli)  # so that --help lists them
    flags.FLAGS.set_default("preset", "tiny")
    define_flags()
    _cli.run(main)
