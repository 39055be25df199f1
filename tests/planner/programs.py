"""The real training objective as JAX sees it, without running it: what its gradient multiplies and what it keeps."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.model.module import abstract_variables
from dsv3_jax.moe.balance import controller_of
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training.objective import batch_totals, objective
from dsv3_jax.training.step import Hyper, abstract_state, make_train_step
from oracles.jaxprs import sub_jaxprs


def small(**settings: Any) -> Config:
    """`tiny` with XLA's operations as accelerators run them, two sequences, and rows that no two dimensions share."""
    how = {"experts_implementation": "ragged_dot", "attention_implementation": "blockwise"}
    fixed = {"batch_size": 2, "batch_size_start": 2, "num_hidden_layers": 4}
    return override(preset("tiny"), {**how, **fixed, **settings})


def _loss(config: Config) -> tuple[Any, tuple[Any, ...]]:
    """The objective as a function of parameters, and shapes of the other arguments."""
    variables, window = abstract_variables(config.model), config.data.seq_len + 1
    batch = {
        name: jax.ShapeDtypeStruct((config.train.batch_size, window), jnp.int32)
        for name in ("tokens", "segment_ids", "domain_ids")
    }

    def loss(params: Any, bias: Any, batch: Any) -> Any:
        totals = batch_totals(batch, config)
        return objective(params, bias, batch, totals, jnp.float32(0.3), config, controller_of(config), 2)[0]

    return loss, (variables.params, variables.bias_LE, batch)


def gradient_flops(config: Config) -> float:
    """Two for every multiply-add of every product in the gradient's program on one device."""
    loss, shapes = _loss(config)
    return flops(jax.make_jaxpr(jax.grad(loss))(*shapes).jaxpr)


def step_jaxpr(config: Config) -> Any:
    """The whole step's program, on the mesh of the config."""
    window, micro = config.data.seq_len + 1, config.train.micro_batch_size or config.train.batch_size
    shape = config.train.n_micro_batches, micro, window
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "segment_ids", "domain_ids")}
    step = make_train_step(config, 2, Placement(make_mesh(config), config.parallel))
    return jax.make_jaxpr(step)(abstract_state(config), batch, Hyper(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3)).jaxpr


def executed(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation and how often it runs: a scan's body as often as it is long, a loop over data's once."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner_times = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for inner in sub_jaxprs(value):
                yield from executed(inner, inner_times)


def flops(jaxpr: Any) -> float:
    total = 0.0
    for equation, times in executed(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += times * _products(equation, contracted)
        elif equation.primitive.name.startswith("ragged_dot"):
            numbers = equation.params["ragged_dot_dimension_numbers"]
            (contracted, _), _ = numbers.dot_dimension_numbers
            # a weight's gradient: the rows, each in one group, are contracted, and the groups are a dimension of the result
            groups = equation.outvars[0].aval.shape[0] if numbers.lhs_ragged_dimensions[0] in contracted else 1
            total += times * _products(equation, contracted) / groups
    return total


def sent_bytes(jaxpr: Any, sizes: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """(collective, axis) -> bytes of floats, FP8's among them, that a device sends; rows of an exchange spread evenly."""
    kinds = {"all_gather": lambda n: n - 1, "reduce_scatter": lambda n: (n - 1) / n, "ragged_all_to_all": lambda n: (n - 1) / n}
    found: dict[tuple[str, str], float] = {}
    for equation, times in executed(jaxpr):
        name = equation.primitive.name
        if name in kinds and (jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating) or _is_bytes(equation)):
            axes = equation.params["axis_name"]
            (axis,) = (axes,) if isinstance(axes, str) else axes
            sent, operand = kinds[name](sizes[axis]), equation.invars[0].aval
            key = name, axis
            found[key] = found.get(key, 0) + times * sent * math.prod(operand.shape) * operand.dtype.itemsize
    return found


def _is_bytes(equation: Any) -> bool:
    return equation.invars[0].aval.dtype == jnp.uint8


def _products(equation: Any, contracted: Any) -> int:
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[i] for i in contracted)


def kept_bytes(config: Config) -> int:
    """Of all arrays that the forward pass hands to the backward pass, weights included."""
    loss, (params, *others) = _loss(config)
    pull_back = jax.eval_shape(lambda p, *rest: jax.vjp(lambda q: loss(q, *rest), p)[1], params, *others)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))
