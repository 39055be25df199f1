"""The parts of `extend`: its phases as configs, its folder, and the order in which runs and maps are made."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.analysis.needles import Grid, measure
from dsv3_jax.config import Config, RopeScaling
from dsv3_jax.data.pipeline import build_data
from dsv3_jax.presets import extended
from dsv3_jax.settings import override, to_dict
from dsv3_jax.training.journal import write_json
from dsv3_jax.training.loop import train

ROOM = 1.25  # YaRN's factor over the ratio of the lengths: published 40 for 32 times
NEEDLE_SEED = 1_000_000  # haystacks of their own, which no document's seed gives
BEFORE, UNTRAINED = "before", "before, YaRN untrained"


def check(base: Config, lengths: Sequence[int], grid: Grid) -> None:
    """Raises ValueError, one line, for a base config or lengths that make no extension."""
    if base.model.rope_scaling is not None:
        raise ValueError("rope_scaling: expected null, for the model is extended from a training without YaRN")
    if not base.data.retrieval_bytes:
        raise ValueError("retrieval_bytes: expected more than 0, for needles are found by who has seen retrieval documents")
    if len(lengths) < 2 or list(lengths) != sorted(set(lengths)) or lengths[0] != base.data.seq_len:
        raise ValueError(f"--lengths: expected growing ones, at least 2, the first seq_len={base.data.seq_len}, got {lengths}")
    if grid.samples < 1 or len(grid.depths) < 2:
        raise ValueError(
            f"--samples, --depths: expected at least 1 needle and 2 depths, got {grid.samples} and {len(grid.depths)}"
        )


def evenly(n: int) -> tuple[float, ...]:
    """`n` depths from 0 to 1."""
    return tuple(i / max(1, n - 1) for i in range(n))


def measured_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The trained lengths, and between them powers of two times the first."""
    doubled = [lengths[0]]
    while 2 * doubled[-1] < lengths[-1]:
        doubled.append(2 * doubled[-1])
    return tuple(sorted({*lengths, *doubled}))


def phases(base: Config, lengths: Sequence[int], steps: int, tokenizer: str) -> list[Config]:
    """The base run, then a phase for every longer length; YaRN is the same in all of them, as published."""
    yarn = RopeScaling(factor=ROOM * lengths[-1] / lengths[0], original_max_position_embeddings=lengths[0])
    same_ids = override(base, {"tokenizer": tokenizer})
    return [base, *(extended(same_ids, length, yarn, steps) for length in lengths[1:])]


def kept_tokenizer(base: Config, workdir: Path) -> str:
    """The base run's tokenizer as a file of this experiment: the later phases read other text with the same ids."""
    if base.data.tokenizer != "train":
        return base.data.tokenizer
    path = workdir / "tokenizer.json"
    if not path.exists():
        store = build_data(base.data, base.model.vocab_size).store
        shutil.copyfile(store.folder / "tokenizer.json", path)
    return str(path)


def keep_plan(workdir: Path, resume: bool, plan: dict[str, Any]) -> None:
    """Writes what this experiment is. Raises ValueError if the folder holds another one, or `resume` is not given."""
    path = workdir / "plan.json"
    if path.exists():
        if not resume:
            raise ValueError(f"{workdir} holds an extension already; add --resume to continue it, or take another --workdir")
        stored = json.loads(path.read_text())
        for name, value in json.loads(json.dumps(plan)).items():
            if stored.get(name) != value:
                raise ValueError(f"{workdir} holds another extension: {name} differs (all flags as before)")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def plan_of(base: Config, lengths: Sequence[int], steps: int, grid: Grid) -> dict[str, Any]:
    return {"config": to_dict(base), "lengths": list(lengths), "phase_steps": steps, "grid": grid._asdict()}


def run_phases(
    base: Config, lengths: Sequence[int], steps: int, grid: Grid, workdir: Path, show: bool = True
) -> dict[str, list[list[float]]] | None:
    """Every run and every map that is not there yet; the maps by name. None after Ctrl-C."""
    maps: dict[str, list[list[float]]] = {}
    before: Path | None = None
    configs = phases(base, lengths, steps, kept_tokenizer(base, workdir))
    for number, config in enumerate(configs):
        length, folder = config.data.seq_len, workdir / str(config.data.seq_len)
        if show:
            what = f"phase {number}, from {before.name} to" if before else "training at"
            print(f"{what} {length:,} tokens, {config.train.steps:,} steps", flush=True)
        result = train(config, folder, resume=True, header=False, progress=show, init=before)
        if result.interrupted:
            return None
        params, bias = jax.device_get((result.state.params, result.state.bias))
        tokenizer = build_data(config.data, config.model.vocab_size).tokenizer
        models = {f"after phase {number}, {length:,}": config.model}
        if not number:
            models = {BEFORE: config.model, UNTRAINED: configs[-1].model}
        for name, model in models.items():
            path = folder / f"needles-{len(maps)}.json"
            if not path.exists():
                write_json(path, measure(params, bias, model, tokenizer, grid, NEEDLE_SEED, name, show))
            maps[name] = json.loads(path.read_text())
        before = folder
    return maps
