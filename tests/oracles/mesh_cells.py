"""One training step of the same model from the same state, on any mesh: what every cell of the mesh matrix computes.

`python mesh_cells.py <coordinator> <process> <folder> <cell...>` runs one cell as one of two processes, four devices each.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # where this file is the program

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import Config
from dsv3_jax.model.module import model_spec
from dsv3_jax.moe.balance import controller_of
from dsv3_jax.parallel.collectives import BATCH_SPEC, Placement
from dsv3_jax.parallel.mesh import BATCH_AXES, make_mesh
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training import step as training
from dsv3_jax.training.objective import run_model
from oracles.compiling import quick_jit

LAYOUTS: dict[str, dict[str, Any]] = {
    "one device": {"layout": "single"},
    "DP 8": {"layout": "report", "mesh_data": 8, "mesh_expert": 1},
    "EP 8": {"layout": "report"},
    "DP 2 x EP 4": {"layout": "report", "mesh_expert": 4},
    "EP 4 x TP 2": {"layout": "tensor_expert", "mesh_tensor": 2},
    "FSDP 8": {"layout": "fully_sharded"},
    "FSDP 2 x EP 4": {"layout": "fully_sharded", "mesh_expert": 4},
    "PP 2 x EP 4": {"layout": "report", "mesh_pipe": 2, "mesh_expert": 4},
}
ROWS, LENGTH, VOCAB = 32, 8, 64
SPEED = 2.0**-7


class Result(NamedTuple):
    """Of one step, or of several: leading axis. Everything on the host."""

    indices: Any  # [L, rows, T, K] the experts, sorted
    scores: Any  # [L, rows, T, E]
    load: Any
    bias: Any
    loss: Any
    gradients: Any  # tree, of the first step


def cell_config(cell: str, micro_batches: int = 1, remat: str = "none", **settings: Any) -> Config:
    """Groups, a shared expert and MTP: every term of the objective, on dimensions that eight devices divide."""
    base = override(preset("tiny"), {
        "num_hidden_layers": 2, "vocab_size": VOCAB, "seq_len": LENGTH, "cross_document_attention": "false",
        "batch_size": ROWS, "batch_size_start": ROWS, "micro_batch_size": ROWS // micro_batches, "remat": remat,
        "aux_loss_alpha": 0.05, "mtp_loss_weight": 0.3, "moment_dtype": "float32",
    })  # fmt: skip
    return override(base, LAYOUTS[cell] | settings)


def cell_batch(seed: int, micro_batches: int) -> dict[str, np.ndarray]:
    """Documents of different lengths, padding, one row that is nothing but padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = 1 + (np.arange(LENGTH + 1)[None] >= rng.integers(1, LENGTH, (ROWS, 1))).astype(np.int32)
    segments[3, 5:] = 0
    segments[-1] = 0
    batch = {"tokens": tokens, "segment_ids": segments, "domain_ids": (segments == 2).astype(np.int32)}
    return {name: a.reshape(micro_batches, -1, LENGTH + 1) for name, a in batch.items()}


def skewed(state: training.TrainState, config: Config, expert: int = 3) -> training.TrainState:
    """Every token to the same experts: those around `expert` get a bias that no score can overcome."""
    bias = np.zeros(state.bias.shape, np.float32)
    bias[:, expert : expert + config.model.num_experts_per_tok - 1] = 8.0
    return state._replace(bias=jnp.asarray(bias))


class Cell:
    """The compiled step of one cell, which also hands out its gradients, and the router's choices beside it."""

    def __init__(self, config: Config):
        mesh = make_mesh(config)
        self.config, self.mesh = config, mesh
        self.placement = placement = None if mesh.size == 1 else Placement(mesh, config.parallel)

        def stepped(state: Any, batch: Any, hyper: Any) -> Any:
            seen, sound = [], training.gradients

            def spying(*args: Any) -> Any:
                seen.append(sound(*args))
                return seen[-1]

            training.gradients = spying
            try:
                state, metrics = training.train_step(
                    state, batch, hyper, config=config, controller=controller_of(config), n_domains=2, placement=placement
                )
            finally:
                training.gradients = sound
            return state, metrics, seen[0][0]

        def routed(params: Any, bias: Any, batch: Any) -> Any:
            flat = {name: a.reshape(-1, a.shape[-1]) for name, a in batch.items()}
            chosen = run_model(params, bias, flat, config, lambda r, _: (r.indices, r.scores), None, placement)
            return chosen[2]

        if placement is None:
            self.step, self.route = quick_jit(stepped), quick_jit(routed)
            return
        stored, rows = placement.stored_specs(model_spec(config.model)), P(None, BATCH_AXES)
        mapped = jax.shard_map(routed, mesh=mesh, in_specs=(stored, P(), BATCH_SPEC), out_specs=rows)
        # as `make_train_step`: what comes out lies as what goes in, or a second step would be another program
        out_shardings = training.state_shardings(config, placement), placement.sharding(P()), None
        self.step, self.route = quick_jit(stepped, out_shardings=out_shardings), quick_jit(mapped)

    def put(self, state: training.TrainState) -> training.TrainState:
        if self.placement is None:
            return state
        return jax.tree.map(_global, state, training.state_shardings(self.config, self.placement))

    def put_batch(self, batch: Any) -> Any:
        if self.placement is None:
            return batch
        return jax.tree.map(lambda a: _global(a, self.placement.sharding(BATCH_SPEC)), batch)

    def run(self, state: training.TrainState, seeds: list[int], learning_rate: float = 3e-4) -> Result:
        """A step for each of `seeds`' batches, from `state`."""
        hyper = training.Hyper(jnp.float32(learning_rate), jnp.float32(SPEED), jnp.float32(0.3))
        state, first, kept = self.put(state), None, []
        for seed in seeds:
            n_micro = self.config.train.n_micro_batches
            batch = self.put_batch(cell_batch(seed, n_micro))
            # the forward pass over the whole batch has one row order, whatever the micro-batches
            indices, scores = self.route(state.params, state.bias, self.put_batch(cell_batch(seed, 1)))
            state, metrics, gradients = self.step(state, batch, hyper)
            first = gradients if first is None else first
            kept.append(_host((indices, scores, metrics["load"], state.bias, metrics["loss"])))
        indices, scores, load, bias, loss = (np.stack(parts) for parts in zip(*kept, strict=True))
        return Result(np.sort(indices, axis=-1), scores, load, bias, loss, _host(first))


def _global(array: Any, sharding: Any) -> jax.Array:
    """Of a host array, on a mesh of any number of processes."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _host(tree: Any) -> Any:
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def first_state(config: Config) -> training.TrainState:
    return training.init_state(config)


def main(
    coordinator: str, process: str, folder: str, cell: str, micro_batches: str, remat: str, seed: str, *batches: str
) -> None:
    """Writes what steps on `batches` (seeds) give from the state of `seed` as `<folder>/<process>.npz`."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(process))
    config = cell_config(cell, int(micro_batches), remat, seed=int(seed))
    result = Cell(config).run(first_state(config), [int(batch) for batch in batches])
    leaves = {f"gradient{i}": leaf for i, leaf in enumerate(jax.tree.leaves(result.gradients))}
    arrays = {name: value for name, value in result._asdict().items() if name != "gradients"}
    np.savez(Path(folder) / f"{process}.npz", **arrays, **leaves, devices=np.array(jax.device_count()))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main(*sys.argv[1:])
