"""What a run says about itself before its first step: machine, model, corpus, and where it leaves the published recipe."""

import importlib.metadata
import math
import platform
from typing import Any

import jax

from dsv3_jax.config import Config
from dsv3_jax.model.count import count_parameters
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.settings import RECIPE, recipe_differences, to_dict
from dsv3_jax.training.schedules import total_steps, total_tokens

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grain", "orbax-checkpoint", "tokenizers")


def describe(
    config: Config, domains: list[str], data_summary: dict[str, Any], placement: Placement | None = None
) -> dict[str, Any]:
    """JSON-able record of everything that a run's numbers depend on: `run.json`."""
    sizes = dict.fromkeys(AXES, 1) if placement is None else dict(placement.sizes)
    return {
        "config": to_dict(config),
        "recipe_differences": recipe_differences(config),
        "parameters": count_parameters(config.model)._asdict(),
        "total_steps": total_steps(config),
        "total_tokens": total_tokens(config),
        "domains": domains,
        "data": data_summary,
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "mesh": {
            "layout": config.parallel.layout,
            "axes": sizes,
            "devices": math.prod(sizes.values()),
            "processes": jax.process_count(),
        },
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
    }


def header_lines(run: dict[str, Any]) -> list[str]:
    """`run` (from `describe`) for a terminal, at most 100 columns wide."""
    counts = run["parameters"]
    lines = [
        f"devices     {len(run['devices'])} x {run['devices'][0]}; "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items() if name in ("python", "jax", "jaxlib")),
        *_mesh_line(run),
        _precision_line(run["config"]),
        f"parameters  {counts['total']:,} in the main model, {counts['active_with_head']:,} activated per token, "
        f"{counts['mtp']:,} in MTP",
        f"corpus        {'bytes':>9} {'held out':>9}  SHA-256",
        *(
            f"  {name[:11]:<11}{row['bytes']:>10,}{row['held_out_bytes']:>10,}  {row['sha256']}"
            for name, row in run["data"]["domains"].items()
        ),
        f"length      {run['total_steps']:,} steps, {run['total_tokens']:,} tokens",
        "counts      experts' loads and balance losses: over a step's whole batch, none in micro-batch scope",
    ]
    differences = run["recipe_differences"]
    lines.append(f"recipe      {len(differences)} differences from the published one in router, balancing, MTP and schedules")
    for topic in RECIPE:
        inside = [line.removeprefix(f"{topic}: ") for line in differences if line.startswith(f"{topic}: ")]
        lines += [f"  {topic if i == 0 else '':<10}{line}" for i, line in enumerate(inside)]
    return lines


def _precision_line(config: dict[str, Any]) -> str:
    model, train = config["model"], config["train"]
    linear = "FP8 (experiments.precision prints the table)" if model.get("fp8") else model["compute_dtype"]
    rest = f"other operations {model['compute_dtype']}, moments {train['moment_dtype']}"
    return f"precision   linear layers {linear}, {rest}"


def _mesh_line(run: dict[str, Any]) -> list[str]:
    """Nothing for one device, which is all there is to say about it."""
    mesh = run.get("mesh")  # runs from before there were meshes have none
    if mesh is None or mesh["devices"] == 1:
        return []
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh["axes"].items() if size > 1)
    processes = f", {mesh['processes']} processes" if mesh["processes"] > 1 else ""
    return [f"mesh        {mesh['layout']}: {axes} = {mesh['devices']} devices{processes}"]
