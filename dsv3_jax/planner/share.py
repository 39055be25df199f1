"""One device's share of a training step [§3.1, §3.2]: its pieces of every parameter, its sequences, its mesh neighbours.

Everything else in the planner is arithmetic on this.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.mla import core_implementation
from dsv3_jax.model.module import model_spec
from dsv3_jax.model.spec import Spec
from dsv3_jax.moe.experts import chosen_implementation
from dsv3_jax.parallel.all_to_all import buffer_rows
from dsv3_jax.parallel.mesh import AXES, BATCH_AXES, EXPERT, LAYOUTS, TENSOR, mesh_shape
from dsv3_jax.parallel.rules import compute_dims, map_specs, state_dims
from dsv3_jax.settings import override

FLOAT32 = 4
COMPONENTS = {
    "embedding": "embedding", "attention": "attention, its latents' norms with it", "dense_mlp": "dense MLPs",
    "routed_experts": "routed experts", "shared_experts": "shared experts", "router": "routers and their biases",
    "norms": "block norms and final norm", "head": "head", "mtp": "MTP modules, sharing embedding and head",
}  # fmt: skip
_BY_NAME = {
    "mtp": "mtp", "embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "experts": "routed_experts",
    "shared_experts": "shared_experts", "gate": "router", "mlp": "dense_mlp",
}  # fmt: skip


class Matrix(NamedTuple):
    """Equal matrices."""

    stack: int
    rows: int  # input channels
    columns: int  # output channels


class Weight(NamedTuple):
    """One parameter, stacked over layers as the model's tree has it, and a device's piece of it, in elements."""

    name: str
    spec: Spec
    compute: int  # the piece that the device multiplies with
    state: int  # the piece of it whose optimiser state the device keeps
    added: tuple[str, ...]  # mesh axes that cut the one into the other
    local: tuple[int, ...]  # shape of the compute piece

    @property
    def leaf(self) -> str:
        return self.name.split(".")[-1]

    @property
    def group(self) -> str:
        """The layers that it belongs to: dense_layers, moe_layers, mtp, or its own name."""
        return self.name.split(".")[0]

    @property
    def component(self) -> str:
        return component(self.name)

    @property
    def is_matrix(self) -> bool:
        return self.spec.init != "ones"

    @property
    def is_expert(self) -> bool:
        return "experts" in self.spec.axes

    @property
    def layers(self) -> int:
        return self.spec.shape[0] if self.spec.axes[0] == "layers" else 1

    @property
    def keeps_dtype(self) -> bool:
        """Gains and the router's matrix are used in the parameters' own dtype."""
        return not self.is_matrix or self.leaf == "gate"


class Share(NamedTuple):
    config: Config
    sizes: Mapping[str, int]  # of the mesh's axes
    sequences: int  # of one micro-batch on this device
    micro_batches: int
    weights: tuple[Weight, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def tokens(self) -> int:
        """Of one micro-batch on this device; tensor ranks share them."""
        return self.sequences * self.config.data.seq_len

    @property
    def rows(self) -> int:
        """(token, chosen expert) pairs of one micro-batch on this device."""
        return self.tokens * self.config.model.num_experts_per_tok

    @property
    def received_rows(self) -> int:
        """Rows that one round of the exchange has room for."""
        model, ranks, buffer = self.config.model, self.sizes[EXPERT], self.config.parallel.exchange_buffer
        if ranks == 1:
            return self.rows
        return buffer_rows(self.tokens, model.num_experts_per_tok, ranks, model.n_routed_experts, buffer)

    @property
    def tensor(self) -> int:
        return self.sizes[TENSOR]

    @property
    def param_bytes(self) -> int:
        return dtype_bytes(self.config.model.param_dtype)

    @property
    def compute_bytes(self) -> int:
        return dtype_bytes(self.config.model.compute_dtype)

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that the optimiser reads: a sum over micro-batches is float32."""
        return FLOAT32 if self.micro_batches > 1 else self.param_bytes

    @property
    def experts_bytes(self) -> int:
        """Of the experts' pre-activations, which `ragged_dot` keeps in float32."""
        return FLOAT32 if self.config.model.experts_implementation == "ragged_dot" else self.compute_bytes

    def in_pieces(self, weight: Weight) -> bool:
        """Whether a weight lies in the optimiser's pieces between uses, and is gathered for each: ZeRO-3, gains excepted."""
        return LAYOUTS[self.config.parallel.layout].shard_parameters and weight.is_matrix

    def stored(self, weight: Weight) -> int:
        """Elements of a weight, and of its gradient, that the device holds between uses."""
        return weight.state if self.in_pieces(weight) else weight.compute

    def used_bytes(self, weight: Weight) -> int:
        """Of one element of a weight as it is multiplied with."""
        return self.param_bytes if weight.keeps_dtype else self.compute_bytes

    def in_node(self, axis: str) -> int:
        """How many of an axis' ranks share this device's node: neighbours lie on the last axes."""
        stride = math.prod(self.sizes[inner] for inner in AXES[AXES.index(axis) + 1 :])
        return min(self.sizes[axis], max(1, self.config.parallel.node_size // stride))


def dtype_bytes(name: str) -> int:
    return np.dtype(jax.numpy.dtype(name)).itemsize


def component(name: str) -> str:
    """A parameter's component, by its dotted path: what the outermost name that says something says."""
    parts = name.split(".")
    inner = [_BY_NAME[p] for p in parts if p in _BY_NAME]
    if not inner:
        return "norms"
    return inner[0] if inner[0] != "dense_mlp" else inner[-1]


def matrix(axes: tuple[str, ...], shape: tuple[int, ...]) -> Matrix:
    """A parameter as matrices: layers and experts are counted, heads and their channels are one side."""
    stack = [size for axis, size in zip(axes, shape, strict=True) if axis in ("layers", "experts")]
    sides = [(axis, size) for axis, size in zip(axes, shape, strict=True) if axis not in ("layers", "experts")]
    names, sizes = [axis for axis, _ in sides], [size for _, size in sides]
    inputs = 2 if names[0] in ("heads", "kv_heads") else 1
    return Matrix(math.prod(stack), math.prod(sizes[:inputs]), math.prod(sizes[inputs:]))


def in_kernel(model: ModelConfig) -> bool:
    """Whether attention's scores never leave the chip; of a share's model, where "auto" is resolved."""
    return model.attention_implementation != "blockwise"


def make_share(config: Config, chips: int, platform: str = "gpu") -> Share:
    """What each of `chips` devices does of one step of `config`. `platform` (gpu, tpu) chooses what is left to choose.

    Raises ValueError if the mesh, a parameter or the batch does not divide over them.
    """
    model = config.model
    if model.fp8 is None:
        config = override(config, {"experts_implementation": chosen_implementation(model.experts_implementation, platform)})
    config = override(config, {"attention_implementation": core_implementation(model, platform)})
    if config.model.experts_implementation == "dense":
        raise ValueError("experts_implementation: dense computes every expert on every token, for tests; plan another one")
    if chips < 1:
        raise ValueError(f"--chips: expected at least 1, got {chips}")
    sizes = mesh_shape(config.parallel, chips, config.model.n_routed_experts)
    if math.prod(sizes.values()) != chips:
        others = ", ".join(name for name in LAYOUTS if name != config.parallel.layout)
        raise ValueError(
            f"--chips: layout {config.parallel.layout} uses {math.prod(sizes.values())} device, got {chips}; "
            f"--set=layout=... one of {others}"
        )
    micro = config.train.micro_batch_size or config.train.batch_size
    ranks = math.prod(sizes[axis] for axis in BATCH_AXES)
    if micro % ranks:
        below, name = micro // ranks * ranks, "micro_batch_size" if config.train.micro_batch_size else "batch_size"
        raise ValueError(
            f"{name}: {micro} sequences do not divide over {ranks} ranks ("
            + " x ".join(f"{axis} {sizes[axis]}" for axis in BATCH_AXES)
            + f"); the nearest that do are {f'{below} and ' if below else ''}{below + ranks}"
        )
    return Share(config, sizes, micro // ranks, config.train.batch_size // micro, _weights(config, sizes))


def _weights(config: Config, sizes: Mapping[str, int]) -> tuple[Weight, ...]:
    def weight(name: str, spec: Spec) -> Weight:
        compute, state = compute_dims(name, spec, sizes), state_dims(name, spec, sizes)
        local = tuple(size // math.prod(sizes[a] for a in dim) for size, dim in zip(spec.shape, compute, strict=True))
        used = [axis for dim in compute for axis in dim]
        added = tuple(axis for axis in BATCH_AXES if any(axis in dim for dim in state) and axis not in used)
        elements = math.prod(local)
        return Weight(name, spec, elements, elements // math.prod(sizes[a] for a in added), added, local)

    return tuple(jax.tree.leaves(map_specs(weight, model_spec(config.model)), is_leaf=lambda node: isinstance(node, Weight)))


def whole(config: Config) -> tuple[Weight, ...]:
    """Every parameter, on one device."""
    ones: dict[str, Any] = dict.fromkeys(AXES, 1)
    return _weights(config, ones)
