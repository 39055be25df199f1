"""How a model lies on a mesh to serve [§3.4]: the report's layouts for prompts and for decoding.

Sequences are divided over the data and expert axes. Within a group of tensor ranks attention is divided by heads; every rank
has the group's latent cache, which all heads share. Between attentions each of these ranks takes a share of the group's tokens
(sequence parallelism) through norms, dense layers and experts, and routed experts lie over expert and tensor ranks together:
4 tensor ranks x 8 expert ranks are TP4, DP8 and EP32, the report's unit for prompts; 4 x 80 its unit for decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from dsv3_jax.config import ModelConfig, ParallelConfig
from dsv3_jax.inference.placement import Replicas, place_experts
from dsv3_jax.model.spec import Spec
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.parallel.mesh import EXPERT, TENSOR, make_axes
from dsv3_jax.parallel.rules import RULES, Dims, Rules, compute_dims


class Layout(NamedTuple):
    """A named choice. A device has ceil(E / P) experts, E counting shared ones that are routed, and `spare` more."""

    description: str
    tensor: int  # the most ranks of the tensor axis; as many as divide devices and heads
    shared_is_routed: bool  # shared experts are some more that every token chooses, or every rank's own
    spare: int


LAYOUTS = {
    "prefill": Layout("prompts: one redundant expert a device, shared experts on each", 4, False, 1),
    "decode": Layout("decoding: shared experts are routed ones, copies fill the slots", 4, True, 0),
}  # fmt: skip

# Dense layers are whole everywhere (TP1), and so are an expert's matrices.
SERVING_RULES: Rules = {**RULES, "mlp": None, "expert_mlp": None, "experts": (EXPERT, TENSOR)}


@dataclass(frozen=True)
class ServingPlacement(Placement):
    """A mesh that serves; hashable, the same for every device."""

    layout: Layout

    @property
    def expert_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in (EXPERT, TENSOR) if self.sizes[axis] > 1)

    @property
    def token_axes(self) -> tuple[str, ...]:
        return (*self.batch_axes, TENSOR) if self.tensor_axis else self.batch_axes

    @property
    def expert_ranks(self) -> int:
        """Devices that share one set of experts."""
        return self.sizes[EXPERT] * self.sizes[TENSOR]

    def stored_dims(self, name: str, spec: Spec) -> Dims:
        rules = SERVING_RULES
        if spec.axes[0] == "vocab" and spec.shape[0] % self.sizes[TENSOR]:
            rules = {**rules, "vocab": None}  # an odd vocabulary is whole everywhere
        return compute_dims(name, spec, self.sizes, rules)

    def n_experts(self, config: ModelConfig) -> int:
        """Logical ones: routed, then shared if they are routed too."""
        return config.n_routed_experts + (config.n_shared_experts if self.layout.shared_is_routed else 0)

    def n_slots(self, config: ModelConfig) -> int:
        """Physical experts, as many on each device."""
        each = -(-self.n_experts(config) // self.expert_ranks) + self.layout.spare
        return each * self.expert_ranks


def serving_placement(
    layout: str,
    config: ModelConfig,
    devices: Sequence[Any] | None = None,
    *,
    tensor: int | None = None,
    data: int = 1,
    spare: int | None = None,
    parallel: ParallelConfig | None = None,
) -> ServingPlacement:
    """`devices` (default: all) as `layout` has them: `data` groups with all experts each, `tensor` ranks within them, expert
    ranks for the rest; `spare` slots a device. None: the layout's. `parallel`: exchange, its buffer and the size of a node.

    Raises ValueError, one line, for an unknown layout, other attention than MLA, and sizes that do not divide.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if config.attention != "mla":
        raise ValueError(
            f"attention: expected mla, whose cache all heads share, got {config.attention!r}; serve it on one device"
        )
    if not config.n_main_moe_layers:
        raise ValueError("a mesh divides routed experts, and this model has none; serve it on one device")
    found, devices = LAYOUTS[layout], list(jax.devices() if devices is None else devices)
    heads, count = config.num_attention_heads, len(devices)
    if data < 1 or count % data:
        raise ValueError(f"data: expected a divisor of the {count} devices, got {data}")
    fitting = [t for t in range(1, count + 1) if heads % t == 0 and count // data % t == 0]
    if tensor is None:
        tensor = max(t for t in fitting if t <= found.tensor)
    if tensor not in fitting:
        group = f"{count} devices" if data == 1 else f"{count // data} devices, those of one of {data} data ranks"
        raise ValueError(f"tensor: expected a divisor of {heads} heads and of {group}, got {tensor}; take one of {fitting}")
    if spare is not None:
        if spare < 0:
            raise ValueError(f"spare: expected 0 or more slots a device, got {spare}")
        found = found._replace(spare=spare)
    mesh = make_axes(devices, data=data, expert=len(devices) // (tensor * data), tensor=tensor)
    return ServingPlacement(mesh, parallel or ParallelConfig(), found)


def expected_loads(config: ModelConfig, placement: ServingPlacement) -> list[list[float]]:
    """Rows that each expert has of a token in perfect balance, by MoE layer: what to place by before anything is measured."""
    routed = [config.num_experts_per_tok / config.n_routed_experts] * config.n_routed_experts
    shared = [1.0] * (placement.n_experts(config) - config.n_routed_experts)
    return [routed + shared] * config.n_moe_layers


def placed(config: ModelConfig, placement: ServingPlacement, loads: Any = None) -> Replicas:
    """Which expert is in which slot, for loads [L, E] (default: perfect balance): by groups and nodes where they divide.

    Raises ValueError for loads of another shape.
    """
    loads = expected_loads(config, placement) if loads is None else loads
    nodes = max(1, placement.expert_ranks // placement.parallel.node_size)
    grouped = placement.n_experts(config) == config.n_routed_experts and placement.expert_ranks % nodes == 0
    return place_experts(
        loads,
        num_replicas=placement.n_slots(config),
        num_gpus=placement.expert_ranks,
        num_groups=config.n_group if grouped else 1,
        num_nodes=nodes if grouped else 1,
    )
