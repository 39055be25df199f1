"""A layout over this process' eight devices, for what has no whole run."""

import dataclasses

from dsv3_jax.config import Config, ParallelConfig
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import make_mesh


def placement_of(layout: str, n_experts: int, **sizes: int) -> Placement:
    config, parallel = Config(), ParallelConfig(layout=layout, **sizes)
    model = dataclasses.replace(config.model, n_routed_experts=n_experts, n_group=1, topk_group=1, num_experts_per_tok=1)
    return Placement(make_mesh(dataclasses.replace(config, parallel=parallel, model=model)), parallel)
