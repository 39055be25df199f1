"""Serve a model on a mesh as the report does: how even is the experts' load, and what do redundant experts change?

    python -m experiments.serve --checkpoint=DIR --tokens=T.npy [--layout=decode] [--spare=1] [--cpu_devices=8] [--out=DIR]

DIR: a released folder, one that `experiments.convert` wrote, or a training run's; T: integers [batch, seq], prompts. The first
half of the rows is continued by `--new` tokens to measure every expert's load; DeepSeek's balancer (EPLB) then places the
experts, heavy ones more than once; the other half is served under the placement from before and under the new one, to which
the running model is rearranged. Printed for each MoE layer: rows (token, expert) of the fullest device over the mean, measured.
`--out` leaves `serve.json`, with the rows of every device, and `serve.png`.
`--layout=prefill` keeps shared experts on every device, and a redundant expert on each; `decode` routes to shared experts too.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dsv3_jax.analysis import load_figure
from dsv3_jax.analysis.figures import save
from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import deploy
from dsv3_jax.inference.generate import Generated, generate
from dsv3_jax.inference.mesh import ServingPlacement, expected_loads, placed
from dsv3_jax.inference.placement import Replicas, device_loads, expert_rows, fullest_over_mean, slot_rows_by_device
from dsv3_jax.inference.score import check_tokens, mapped_array
from dsv3_jax.inference.serving import Serving
from dsv3_jax.interop.source import open_source
from dsv3_jax.training.journal import write_json
from experiments import _cli
from experiments._mesh import define_mesh_flags, placement_from, split_cpu

DTYPES = ("float32", "bfloat16")
ONCE, BEFORE, AFTER = "each expert once", "before", "after"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("checkpoint", None, "folder of a model", flag_values=values)
    flags.DEFINE_string("tokens", None, ".npy file, integers [batch, seq]", flag_values=values)
    flags.DEFINE_integer("new", 16, "tokens by which every row is continued", flag_values=values)
    flags.DEFINE_string("dtype", "float32", f"of weights and products: {' or '.join(DTYPES)}", flag_values=values)
    flags.DEFINE_string("out", None, "folder for serve.json and serve.png", flag_values=values)
    define_mesh_flags(values, "decode")


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    split_cpu(values)
    for name in ("checkpoint", "tokens"):
        if not getattr(values, name):
            raise ValueError(f"--{name}: expected a path, got none")
    if values.dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {values.dtype!r}")
    tokens = np.asarray(mapped_array(Path(values.tokens), "--tokens"))
    if values.out:
        _cli.make_folder(Path(values.out))
    source = open_source(values.checkpoint, compute_dtype=values.dtype, mtp=False)
    config = source.config
    check_tokens(tokens, config)
    if len(tokens) < 2:
        raise ValueError(f"--tokens: expected two rows or more, one to measure and one to serve, got {len(tokens)}")
    placement = placement_from(values, config)
    assert placement is not None
    print(described(placement, config), flush=True)
    model = deploy.read(source.tensors, config, values.dtype, placement)
    found = rebalance(model, config, placement, tokens, values.new)
    print("\n" + table(found["rows"]))
    print(
        f"\nloads of {found['measured_rows']:,} rows placed the experts; {found['served_rows']:,} others were served twice, "
        f"{found['changed']} of {found['sequences']} sequences changed"
    )
    if values.out:
        write(Path(values.out), found, placement, config)
    return 0


def described(placement: ServingPlacement, config: ModelConfig) -> str:
    sizes, slots = placement.sizes, placement.n_slots(config)
    shared = f" + {config.n_shared_experts} shared" if placement.layout.shared_is_routed else ""
    return (
        f"{placement.mesh.size} devices: {sizes['data']} data x {sizes['expert']} expert x {sizes['tensor']} tensor ranks; "
        f"{config.n_routed_experts}{shared} experts in {slots} slots, {slots // placement.expert_ranks} a device"
    )


def rebalance(model: Serving, config: ModelConfig, placement: ServingPlacement, tokens: np.ndarray, new: int) -> dict[str, Any]:
    """Half of the rows measured, the others served under the model's placement and under the one by measured loads."""
    half = len(tokens) // 2
    measured, served = tokens[:half].tolist(), tokens[half:].tolist()
    first = placed(config, placement)

    def serve(model: Serving, prompts: list[list[int]]) -> tuple[Generated, np.ndarray]:
        result = generate(model, config, prompts, max_new_tokens=new)
        assert result.count_LR is not None
        return result, result.count_LR

    loads = np.array(expected_loads(config, placement))
    _, counts = serve(model, measured)
    loads[: len(counts)] = expert_rows(counts, _main(first, config))
    second = placed(config, placement, loads)
    before, before_LR = serve(model, served)
    after, after_LR = serve(deploy.rearranged(model, second), served)
    served_LE = expert_rows(before_LR, _main(first, config))
    ranks = placement.expert_ranks
    rows = {
        ONCE: device_loads(served_LE, _main(second, config), ranks).before,
        BEFORE: slot_rows_by_device(before_LR, ranks),
        AFTER: slot_rows_by_device(after_LR, ranks),
    }
    changed = sum(a != b for a, b in zip(before.tokens, after.tokens, strict=True))
    return {
        "rows": rows, "loads": loads[: len(counts)], "phy2log": second.phy2log[: len(counts)],
        "measured_rows": int(counts.sum()), "served_rows": int(after_LR.sum()), "changed": changed, "sequences": len(served),
    }  # fmt: skip


def _main(replicas: Replicas, config: ModelConfig) -> Replicas:
    """Without the MTP modules' layers."""
    return Replicas(*(part[: config.n_main_moe_layers] for part in replicas))


def table(rows: dict[str, np.ndarray]) -> str:
    """The fullest device over the mean, by layer and placement; and the mean over layers."""
    shares = {name: fullest_over_mean(rows_LP) for name, rows_LP in rows.items()}
    lines = [f"{'fullest device / mean':<24}" + "".join(f"{name:>20}" for name in shares)]
    for layer in range(len(shares[AFTER])):
        lines.append(f"{f'MoE layer {layer}':<24}" + "".join(f"{share[layer]:>20.3f}" for share in shares.values()))
    lines.append(f"{'mean of layers':<24}" + "".join(f"{np.nanmean(share):>20.3f}" for share in shares.values()))
    return "\n".join(lines)


def write(folder: Path, found: dict[str, Any], placement: ServingPlacement, config: ModelConfig) -> None:
    plain = {**found, "rows": {name: rows.tolist() for name, rows in found["rows"].items()}}
    plain |= {name: np.asarray(found[name]).tolist() for name in ("loads", "phy2log")}
    layout = dataclasses.asdict(placement.parallel) | placement.layout._asdict() | {"mesh": dict(placement.sizes)}
    write_json(folder / "serve.json", {"layout": layout, **plain})
    save(load_figure.draw(found["rows"], described(placement, config).split("; ")[1]), folder / "serve.png")
    print(f"rows of every device and figure: {folder}")


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
