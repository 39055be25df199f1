"""A run's state and weights on its mesh [§3.2]: what fits, the first state, and how arrays lie. No placement: one device."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from dsv3_jax.config import Config
from dsv3_jax.model.initial import initial_values
from dsv3_jax.model.module import model_spec
from dsv3_jax.parallel.arrays import check_batch, check_streams, from_pieces, to_mesh, told_by_first, zeros_on_mesh
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.checkpoint import check_weights, read_weights
from dsv3_jax.training.ema import Ema, whole_average
from dsv3_jax.training.step import TrainState, abstract_state, init_state, state_shardings


def placement_of(config: Config) -> Placement | None:
    """The mesh of `config.parallel` over all devices; None where it is one device.

    Raises ValueError, one line, if it does not multiply to the devices, or leaves a process without work.
    """
    mesh = make_mesh(config)
    if mesh.size == 1 and jax.process_count() > 1:
        raise ValueError(
            f"layout {config.parallel.layout} uses one device, got {jax.process_count()} processes with "
            f"{jax.device_count()} devices; set layout=report or fully_sharded"
        )
    return Placement(mesh, config.parallel) if mesh.size > 1 else None


def micro_rows(config: Config) -> int:
    """Sequences of a micro-batch."""
    return config.train.micro_batch_size or config.train.batch_size


def check_placement(config: Config, placement: Placement | None) -> None:
    """Raises ValueError, one line, if the mesh does not divide the batch, the data or a parameter, or memory is too small."""
    if placement is not None:
        check_batch(placement, micro_rows(config), "micro_batch_size" if config.train.micro_batch_size else "batch_size")
        if jax.process_count() > 1:
            check_streams(placement, micro_rows(config), config.data.data_streams)
    _require_memory(config, placement)


def _require_memory(config: Config, placement: Placement | None) -> None:
    """Raises ValueError if parameters and optimiser state alone are more than a device holds."""

    def size(leaf: Any, sharding: Any) -> int:
        return int(np.prod(sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize

    like, device = abstract_state(config), jax.local_devices()[0]
    sizes = jax.tree.map(size, like, shardings_of(config, placement))
    needed, limit = sum(jax.tree.leaves(sizes)), (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:  # its memory is the host's, which other devices of the mesh share
        sharing = 1 if placement is None else jax.local_device_count()
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / sharing
    if needed > limit:
        each = "this device" if placement is None else f"each of {placement.mesh.size} devices"
        larger = "" if placement is None else ", or more devices"
        raise ValueError(
            f"parameters and optimiser state take {needed / 1e9:,.0f} GB, {each} holds {limit / 1e9:,.0f} GB; "
            f"take a smaller --preset or smaller sizes{larger}"
        )


def shardings_of(config: Config, placement: Placement | None) -> Any:
    """A TrainState of shardings. Raises ValueError, naming the parameter and the axis, where a mesh axis does not divide."""
    if placement is not None:
        return state_shardings(config, placement)
    here = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: here, abstract_state(config))


def abstract_placed(config: Config, placement: Placement | None) -> TrainState:
    """Shapes, dtypes and shardings of the state."""

    def described(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(described, abstract_state(config), shardings_of(config, placement))


def first_state(config: Config, placement: Placement | None) -> TrainState:
    """`init_state`, the same numbers; on a mesh every process draws its devices' pieces alone."""
    if placement is None:
        # committed to the device as restored arrays are: a fresh and a resumed run compile the same program
        return jax.device_put(init_state(config), jax.local_devices()[0])
    like = abstract_placed(config, placement)
    spread, train = config.model.initializer_range, config.train
    draws = initial_values(model_spec(config.model), spread, train.seed, train.init_ulps)
    param_dtype = jnp.dtype(config.model.param_dtype)

    def drawn(draw: Any, leaf: Any) -> Array:
        # a master starts as the parameter that it stands for, rounded
        return from_pieces(leaf.shape, leaf.sharding, lambda index: draw(index).astype(param_dtype).astype(leaf.dtype))

    return _state_around(jax.tree.map(drawn, draws, _weights(like)), _zeros(like.bias), like)


def state_from(run: str | Path, config: Config, placement: Placement | None) -> TrainState:
    """The first state of a run that begins with the parameters and the router bias of the run in folder `run`.

    Nothing else of that run is read: a fresh optimiser, step 0. Raises ValueError as `check_weights` and `read_weights` do.
    """
    like = abstract_placed(config, placement)
    step = told_by_first(check_weights(run, like.params, like.bias))
    weights, bias = read_weights(run, step, _weights(like), like.bias)
    return _state_around(weights, bias, like)


def _weights(like: TrainState) -> Any:
    """The parameters at full precision."""
    return like.params if like.opt_state.master is None else like.opt_state.master


def _zeros(leaf: Any) -> Array:
    return zeros_on_mesh(leaf.shape, leaf.dtype, leaf.sharding)


def _state_around(weights: Any, bias: Array, like: TrainState) -> TrainState:
    """Step 0 with these parameters, at full precision, and this bias."""
    others = like._replace(params=None, opt_state=like.opt_state._replace(master=None))
    zeros = jax.tree.map(_zeros, others)._replace(bias=bias)
    if like.opt_state.master is None:
        return zeros._replace(params=weights)
    dtypes, stored = (jax.tree.map(lambda leaf, name=name: getattr(leaf, name), like.params) for name in ("dtype", "sharding"))
    rounded = jax.jit(lambda tree: jax.tree.map(lambda a, dtype: a.astype(dtype), tree, dtypes), out_shardings=stored)
    return zeros._replace(params=rounded(weights), opt_state=zeros.opt_state._replace(master=weights))


def averaged_params(ema: Ema, state: TrainState) -> Any:
    """The average as parameters: in their dtype, lying as they do."""

    def put(average: Any, p: Any) -> Any:
        if isinstance(p.sharding, SingleDeviceSharding):
            return jnp.asarray(average, p.dtype)
        return to_mesh(average, p.sharding, p.dtype)

    if jax.process_count() == 1:
        return jax.tree.map(put, ema.average, state.params)
    shardings = jax.tree.map(lambda p: p.sharding, state.params)

    def rounded(arrays: Any) -> Any:
        return jax.tree.map(lambda a, p: a.astype(p.dtype), arrays, state.params)

    return jax.jit(rounded, out_shardings=shardings)(whole_average(ema))
