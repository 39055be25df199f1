"""A model onto a mesh to serve: experts into their slots, everything else by the table [§3.4]; and moved when loads change."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.mesh import ServingPlacement, placed
from dsv3_jax.inference.placement import Replicas
from dsv3_jax.inference.serving import Module, Serving, attention_laid_out
from dsv3_jax.inference.sharded import Stack
from dsv3_jax.interop.folder import Tensors
from dsv3_jax.interop.names import leaves
from dsv3_jax.interop.read import Dtype, load_bias, read_part, read_tree, target_dtype
from dsv3_jax.model.module import model_spec
from dsv3_jax.model.spec import Spec
from dsv3_jax.model.transformer import head_name
from dsv3_jax.parallel.arrays import Slices, aligned_empty, from_pieces, to_mesh
from dsv3_jax.parallel.rules import map_specs, partition_spec


class Supply(NamedTuple):
    """Where parameters come from. A `name` is one of the parameter tree's top level: a stack of layers, or a table."""

    whole: Callable[[str], Any]  # name -> its arrays on the mesh, but None for experts that have slots
    expert: Callable[[str, str, int, int], np.ndarray]  # (name, matrix, layer, logical expert) -> [in, out]
    expert_dtype: Callable[[str, str], Any]  # (name, matrix)
    bias_LE: Any


def stack_spec(config: ModelConfig, name: str, placement: ServingPlacement) -> Any:
    """Tree of Spec of one stack of layers as it serves: `k_up`, `v_up` and flat heads as in `serving`; experts are slots."""
    spec: Any = model_spec(config)[name]
    tree = spec.get("block", spec)
    attention, heads = dict(tree["self_attn"]), config.num_attention_heads
    layers = attention.pop("kv_b_proj").shape[0]
    nope, width, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    attention["k_up"] = Spec((layers, heads, nope, latent), ("layers", "heads", "head_dim", "kv_lora"))
    attention["v_up"] = Spec((layers, heads, latent, width), ("layers", "heads", "kv_lora", "head_dim"))
    for query in ("q_b_proj", "q_proj"):
        if query in attention:
            shape, axes = attention[query].shape, attention[query].axes
            attention[query] = Spec((layers, shape[1], heads * shape[3]), (*axes[:2], "heads"))
    attention["o_proj"] = Spec((layers, heads * width, config.hidden_size), ("layers", "heads", "embed"))
    mlp = dict(tree["mlp"])
    if "experts" in mlp:
        slots = placement.n_slots(config)
        mlp["experts"] = {m: Spec((layers, slots, *s.shape[2:]), s.axes) for m, s in mlp["experts"].items()}
        if placement.layout.shared_is_routed:
            mlp.pop("shared_experts", None)
    return {**tree, "self_attn": attention, "mlp": mlp}


def _sharding(placement: ServingPlacement, name: str, path: str, spec: Spec) -> NamedSharding:
    """Of a leaf of a stack or, with an empty path, of a table."""
    return placement.sharding(partition_spec(placement.stored_dims(f"{name}.{path}".rstrip("."), spec)))


def deployed(supply: Supply, config: ModelConfig, placement: ServingPlacement, replicas: Replicas | None = None) -> Serving:
    """On the mesh, each device with its own pieces; `replicas` of all MoE layers, the MTP modules' last (default: `placed`)."""
    replicas = placed(config, placement) if replicas is None else replicas
    check_replicas(replicas, config, placement)
    layers = []
    main = config.n_main_moe_layers
    if config.n_dense_layers:
        layers.append(_stack(supply, config, placement, "dense_layers", supply.whole("dense_layers"), None, None))
    rows = slice(0, main)
    layers.append(_stack(supply, config, placement, "moe_layers", supply.whole("moe_layers"), rows, replicas))
    depths: list[Module] = []
    if config.num_nextn_predict_layers:
        tree = supply.whole("mtp")
        rows = slice(main, main + config.num_nextn_predict_layers)
        chain = _stack(supply, config, placement, "mtp", tree["block"], rows, replicas)
        for k in range(config.num_nextn_predict_layers):
            params = {name: leaf[k] for name, leaf in tree.items() if name != "block"}
            depths.append(Module(params, _part(chain, k)))
    embed = supply.whole("embed_tokens")
    head = embed if config.tie_word_embeddings else supply.whole(head_name(config))
    return Serving(embed, supply.whole("norm"), head, tuple(layers), tuple(depths))


def _rows(replicas: Replicas, rows: slice) -> Replicas:
    """Those of some layers, with room for as many copies as one expert could have: another placement is the same program."""
    phy2log_LR, log2phy, logcnt_LE = (np.asarray(part)[rows] for part in replicas)
    most = phy2log_LR.shape[1] - logcnt_LE.shape[1] + 1
    return Replicas(phy2log_LR, np.pad(log2phy, ((0, 0), (0, 0), (0, most - log2phy.shape[2])), constant_values=-1), logcnt_LE)


def _part(stack: Stack, k: int) -> Stack:
    """One layer of a stack, by itself."""
    params, bias_LE, replicas = jax.tree.map(lambda a: a[k : k + 1], (stack.params, stack.bias_LE, stack.replicas))
    return Stack(params, bias_LE, replicas, stack.placement, stack.specs)


def _stack(
    supply: Supply, config: ModelConfig, placement: ServingPlacement, name: str, tree: Any, rows: slice | None,
    replicas: Replicas | None,
) -> Stack:  # fmt: skip
    spec = stack_spec(config, name, placement)
    shardings = map_specs(partial(_sharding, placement, name), spec)
    lay_out = jax.jit(jax.vmap(partial(attention_laid_out, config=config)), out_shardings=shardings["self_attn"])
    params = {**tree, "self_attn": lay_out(tree["self_attn"])}
    specs = tuple(sharding.spec for sharding in jax.tree.leaves(shardings))
    if rows is None or replicas is None:
        return Stack(params, None, None, placement, specs)
    own = _rows(replicas, rows)
    mlp = {part: leaves for part, leaves in params["mlp"].items() if part in shardings["mlp"]}
    mlp["experts"] = {
        matrix: _slots(supply, name, matrix, slots, shardings["mlp"]["experts"][matrix], np.asarray(own.phy2log))
        for matrix, slots in spec["mlp"]["experts"].items()
    }
    whole = placement.sharding(PartitionSpec())
    bias = jax.device_put(np.asarray(supply.bias_LE)[rows], whole)
    return Stack({**params, "mlp": mlp}, bias, jax.device_put(own, whole), placement, specs)


def _slots(supply: Supply, name: str, matrix: str, spec: Spec, sharding: Any, phy2log_LR: np.ndarray) -> Array:
    """[L, R, in, out]: each device reads the experts of its own slots, and nothing else."""

    def piece(index: Slices) -> np.ndarray:
        layers, slots = (range(*part.indices(size)) for part, size in zip(index, spec.shape[:2], strict=False))
        out = aligned_empty((len(layers), len(slots), *spec.shape[2:]), supply.expert_dtype(name, matrix))
        for i, layer in enumerate(layers):
            for j, slot in enumerate(slots):
                out[i, j] = supply.expert(name, matrix, layer, int(phy2log_LR[layer, slot]))
        return out

    return from_pieces(spec.shape, sharding, piece)


def check_replicas(replicas: Replicas, config: ModelConfig, placement: ServingPlacement) -> None:
    """Raises ValueError if these are other slots, experts or layers than the model's."""
    expected = (config.n_moe_layers, placement.n_slots(config)), (config.n_moe_layers, placement.n_experts(config))
    got = tuple(replicas.phy2log.shape), tuple(replicas.logcnt.shape)
    if got != expected:
        raise ValueError(f"replicas: expected [layers, slots] {expected[0]} of experts {expected[1]}, got {got[0]} of {got[1]}")


def from_params(
    params: Any, bias_LE: Any, config: ModelConfig, placement: ServingPlacement, replicas: Replicas | None = None
) -> Serving:
    """From whole parameters in memory."""
    tree = model_spec(config)

    def whole(name: str) -> Any:
        def put(path: str, spec: Spec) -> Any:
            leaf = params[name]
            for key in path.split(".") if path else ():
                leaf = leaf[key]
            if _has_slots(path, placement):
                return None
            return to_mesh(np.asarray(leaf), _sharding(placement, name, path, spec))

        return map_specs(put, tree[name])

    def mlp(name: str) -> Any:
        return params[name].get("block", params[name])["mlp"]

    def expert(name: str, matrix: str, layer: int, expert: int) -> np.ndarray:
        if expert < config.n_routed_experts:
            return np.asarray(mlp(name)["experts"][matrix][layer, expert])
        shared = np.asarray(mlp(name)["shared_experts"][matrix][layer])
        return shared[_shared_part(matrix, expert - config.n_routed_experts, config)]

    def kind(name: str, matrix: str) -> Any:
        return mlp(name)["experts"][matrix].dtype

    return deployed(Supply(whole, expert, kind, bias_LE), config, placement, replicas)


def _has_slots(path: str, placement: ServingPlacement) -> bool:
    return "mlp.experts." in path or (placement.layout.shared_is_routed and "mlp.shared_experts." in path)


def _shared_part(matrix: str, i: int, config: ModelConfig) -> tuple[slice, ...]:
    """One shared expert of the single MLP that all of them are."""
    own = slice(i * config.moe_intermediate_size, (i + 1) * config.moe_intermediate_size)
    every = slice(0, config.hidden_size)
    return (own, every) if matrix == "down_proj" else (every, own)


def read(
    source: Tensors, config: ModelConfig, dtype: Dtype, placement: ServingPlacement, replicas: Replicas | None = None
) -> Serving:
    """Straight from a folder; FP8 is multiplied out."""
    tree = leaves(config)

    def mlp(name: str) -> Any:
        return tree[name].get("block", tree[name])["mlp"]

    def whole(name: str) -> Any:
        def put(leaf: Any) -> Any:
            return None if _has_slots(leaf.path, placement) else read_tree(source, leaf, dtype, placement=placement)

        return jax.tree.map(put, tree[name])

    def kind(name: str, matrix: str) -> Any:
        return target_dtype(source, mlp(name)["experts"][matrix], dtype)

    def expert(name: str, matrix: str, layer: int, expert: int) -> np.ndarray:
        if expert < config.n_routed_experts:
            leaf = mlp(name)["experts"][matrix].at_layer(layer).at_expert(expert)
            sides: tuple[slice, ...] = tuple(slice(0, size) for size in leaf.sides)
        else:
            leaf = mlp(name)["shared_experts"][matrix].at_layer(layer)
            sides = _shared_part(matrix, expert - config.n_routed_experts, config)
        return read_part(source, leaf, sides, kind(name, matrix))

    return deployed(Supply(whole, expert, kind, load_bias(source, config)), config, placement, replicas)


def rearranged(model: Serving, replicas: Replicas) -> Serving:
    """The same model with its experts in other slots: each device fetches what it lacks from others, layer by layer.

    `replicas` of all MoE layers that are served, the main model's first.
    """
    first = 0

    def move(stack: Any) -> Any:
        nonlocal first
        if stack.replicas is None:
            return stack
        own = _rows(replicas, slice(first, first + stack.n_layers))
        first += stack.n_layers
        here = np.asarray(stack.replicas.log2phy)[..., 0]
        source_LR = np.take_along_axis(here, np.asarray(own.phy2log), axis=1)
        whole = stack.placement.sharding(PartitionSpec())
        experts = {
            name: _take_slots(weight.sharding)(weight, jnp.asarray(source_LR))
            for name, weight in stack.params["mlp"]["experts"].items()
        }
        params = {**stack.params, "mlp": {**stack.params["mlp"], "experts": experts}}
        return Stack(params, stack.bias_LE, jax.device_put(own, whole), stack.placement, stack.specs)

    layers = tuple(move(stack) for stack in model.layers)
    return model._replace(layers=layers, depths=tuple(Module(m.params, move(m.block)) for m in model.depths))


@lru_cache(maxsize=16)
def _take_slots(sharding: Any) -> Any:
    def take(weight_LRDF: Array, source_LR: Array) -> Array:
        return jax.lax.map(lambda layer: layer[0][layer[1]], (weight_LRDF, source_LR))

    return jax.jit(take, out_shardings=sharding)


def abstract(config: ModelConfig, placement: ServingPlacement, dtype: Any) -> Serving:
    """Shapes and shardings of a deployed model, for compiling without one; without MTP modules."""
    whole = placement.sharding(PartitionSpec())

    def struct(name: str) -> Callable[[str, Spec], Any]:
        def make(path: str, spec: Spec) -> Any:
            kind = jnp.float32 if "router" in spec.axes else dtype
            return jax.ShapeDtypeStruct(spec.shape, kind, sharding=_sharding(placement, name, path, spec))

        return make

    def stack(name: str, n_experts: int) -> Stack:
        tree = stack_spec(config, name, placement)
        params = map_specs(struct(name), tree)
        specs = tuple(leaf.sharding.spec for leaf in jax.tree.leaves(params))
        if not n_experts:
            return Stack(params, None, None, placement, specs)
        layers = params["input_layernorm"].shape[0]
        replicas = _rows(placed(config, placement), slice(None))
        like: Any = [jax.ShapeDtypeStruct((layers, *a.shape[1:]), jnp.int32, sharding=whole) for a in replicas]
        bias: Any = jax.ShapeDtypeStruct((layers, config.n_routed_experts), jnp.float32, sharding=whole)
        return Stack(params, bias, Replicas(*like), placement, specs)

    tree: Any = model_spec(config)
    embed, norm, head = (struct(name)("", tree[name]) for name in ("embed_tokens", "norm", head_name(config)))
    dense = (stack("dense_layers", 0),) if config.n_dense_layers else ()
    return Serving(embed, norm, head, (*dense, stack("moe_layers", config.n_routed_experts)), ())
