"""Runs on any mesh reduced to their state: what a checkpoint must carry from one mesh to another, filled with random bits.

`python checkpoint_cells.py <coordinator> <process> <root> <from> <to>` reads a checkpoint in two processes, writes it again.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.settings import override
from dsv3_jax.training.checkpoint import Checkpoint, Checkpoints, Progress
from dsv3_jax.training.ema import Pieces, init_ema, whole_average
from dsv3_jax.training.placed import abstract_placed, placement_of
from oracles.micro import micro_config

LAYOUTS = {
    "one device": {"layout": "single"},
    "eight": {"layout": "report"},
    "2x4": {"layout": "report", "mesh_expert": 4},
    "fully sharded": {"layout": "fully_sharded"},
    "tensor": {"layout": "tensor_expert", "mesh_tensor": 2},
    "two processes": {"layout": "report", "mesh_expert": 4},
}
DIVISIBLE = dict(
    n_routed_experts=8, batch_size=16, batch_size_start=8, micro_batch_size=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, data_streams=2, param_dtype="bfloat16",
)  # fmt: skip
STEP = 3


def cell_config(root: Path, name: str, **settings: object) -> Config:
    return override(micro_config(root, **{**DIVISIBLE, **settings}), LAYOUTS[name])


def restore(root: Path, folder: Path, name: str) -> Checkpoint:
    config = cell_config(root, name)
    like = abstract_placed(config, placement_of(config))
    with Checkpoints(folder, config) as checkpoints:
        return checkpoints.restore(like, init_ema(like.opt_state.mu))


def save(root: Path, folder: Path, name: str, checkpoint: Checkpoint) -> None:
    with Checkpoints(folder, cell_config(root, name)) as checkpoints:
        checkpoints.save(checkpoint)


def random_checkpoint(root: Path) -> Checkpoint:
    """On one device. Every leaf differs from every other, and from what a run would start with."""
    config, rng = cell_config(root, "one device"), np.random.default_rng(0)
    like = abstract_placed(config, None)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put((100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding)

    average = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), like.params)
    streams = [{"origin": {"document": i, "offset": 7}, "block": i, "given": 1} for i in range(2)]
    ema = init_ema(like.params)._replace(average=average, n_updates=STEP)
    return Checkpoint(jax.tree.map(fill, like), ema, Progress(STEP, 384, {"streams": streams}))


def main(coordinator: str, process: str, root: str, source: str, target: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(process))
    checkpoint = restore(Path(root), Path(source), "two processes")
    # each process holds its own pieces, of the state on its devices and of the average on the host
    pieces = [p for p in jax.tree.leaves(checkpoint.ema.average) if isinstance(p, Pieces)]
    held, whole = sum(sum(a.size for a in p.parts.values()) for p in pieces), sum(int(np.prod(p.shape)) for p in pieces)
    assert pieces and held < 0.6 * whole, (held, whole)
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(whole_average(checkpoint.ema)))
    save(Path(root), Path(target), "two processes", checkpoint)
    print(f"pieces {held / whole:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
