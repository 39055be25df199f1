"""Redundant experts [§3.4.1, §3.4.2]: which device holds which expert, heavy ones more than once, by measured load.

The report duplicates the experts of high load and rearranges all of them within a node, so that devices have equal work and no
more traffic crosses nodes; the algorithm is that of DeepSeek's published balancer, EPLB. E *logical* experts become R
*physical* ones, replicas; with R / P of them on each of P devices, replica r is on device floor(r * P / R). Per layer:

1. Groups of experts go to nodes. Group-limited routing sends a token to few groups, hence to few nodes.
2. In each node replicas are added one by one, each to the expert whose replicas have the largest load at that moment.
3. In each node its replicas go to its devices.

Steps 1 and 3 are greedy: heaviest first, each to the least loaded bin that has room. This is *hierarchical*; with one group and
one node it is *global*. Placing is NumPy on the host, in float64, where the ties of integer loads are ties. What a running
model needs, `physical_indices`, is pure and can be traced.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike


class Replicas(NamedTuple):
    """Logical experts to physical ones and back, int32; arrays of NumPy or JAX, of all layers or of one (`layer`)."""

    phy2log: Int[Array | np.ndarray, "*layers R"]  # the expert that each replica is one of
    log2phy: Int[Array | np.ndarray, "*layers E copies"]  # each expert's replicas in order of creation, then -1
    logcnt: Int[Array | np.ndarray, "*layers E"]  # how many replicas each expert has, at least 1

    def layer(self, index: int | Array) -> "Replicas":
        """Those of one layer."""
        return Replicas(*(field[index] for field in self))


class DeviceLoads(NamedTuple):
    before: Float[np.ndarray, "L P"]  # each expert once, in order: expert e on device floor(e * P / E)
    after: Float[np.ndarray, "L P"]  # a replica has an equal share of its expert's load


def place_experts(loads: ArrayLike, *, num_replicas: int, num_gpus: int, num_groups: int = 1, num_nodes: int = 1) -> Replicas:
    """The placement of `num_replicas` physical experts for loads [L, E], any non-negative measure of work.

    Hierarchical if the nodes divide the groups, else global, as in EPLB; the default is one group on one node, which is global.
    Greedy, so close to even and not optimal: a placement that happens to be even already can become less so.

    Raises ValueError for sizes that do not divide each other and for loads that are not finite, non-negative and [L, E].
    """
    loads_LE = _checked_loads(loads)
    experts = loads_LE.shape[1]
    if min(num_replicas, num_gpus, num_groups, num_nodes) < 1:
        sizes = f"{num_replicas} replicas, {num_gpus} GPUs, {num_groups} groups, {num_nodes} nodes"
        raise ValueError(f"expected positive sizes, got {sizes}; use 1 group and 1 node for the global policy")
    if num_gpus % num_nodes:
        raise ValueError(f"num_gpus: expected a multiple of the {num_nodes} nodes, got {num_gpus}; give nodes of equal size")
    if num_replicas < experts:
        raise ValueError(f"num_replicas: expected at least the {experts} experts, got {num_replicas}; each needs a place")
    _require_multiple(num_replicas, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {experts} experts, got {num_groups}; make groups equal")
    placed = [_place_layer(loads_E, num_replicas, num_groups, num_nodes, num_gpus) for loads_E in loads_LE]
    phy2log_LR, copy_LR = (np.stack(field) for field in zip(*placed, strict=True))
    return _with_inverse(phy2log_LR, copy_LR, experts)


def device_loads(loads: ArrayLike, replicas: Replicas, num_gpus: int) -> DeviceLoads:
    """The load [L, P] of each of `num_gpus` devices under loads [L, E], without the placement and with it.

    Raises ValueError for loads of another shape than the placement's and for devices that do not divide the replicas.
    """
    loads_LE, logcnt_LE, phy2log_LR = _checked_loads(loads), np.asarray(replicas.logcnt), np.asarray(replicas.phy2log)
    if loads_LE.shape != logcnt_LE.shape:
        raise ValueError(f"loads: expected the placement's [L, E], {logcnt_LE.shape}, got {loads_LE.shape}; place these first")
    layers, experts = loads_LE.shape
    _require_multiple(phy2log_LR.shape[1], num_gpus)
    device_E = np.arange(experts) * num_gpus // experts
    before_LP = np.stack([np.bincount(device_E, loads_E, minlength=num_gpus) for loads_E in loads_LE])
    load_LR = np.take_along_axis(loads_LE / logcnt_LE, phy2log_LR, axis=1)
    return DeviceLoads(before_LP, load_LR.reshape(layers, num_gpus, -1).sum(axis=2))


def expert_rows(rows_LR: Int[np.ndarray, "L R"], replicas: Replicas) -> Int[np.ndarray, "L E"]:
    """The load of each expert, from rows that its replicas computed: what the next placement is made of."""
    total_LE = np.zeros(replicas.logcnt.shape, np.int64)
    layer = np.arange(len(rows_LR))[:, None]
    np.add.at(total_LE, (layer, np.asarray(replicas.phy2log)), rows_LR)
    return total_LE


def slot_rows_by_device(rows_LR: Int[np.ndarray, "L R"], num_gpus: int) -> Int[np.ndarray, "L P"]:
    """Rows that each device computed."""
    _require_multiple(rows_LR.shape[1], num_gpus)
    return rows_LR.reshape(len(rows_LR), num_gpus, -1).sum(axis=2)


def fullest_over_mean(rows_LP: Int[np.ndarray, "L P"] | Float[np.ndarray, "L P"]) -> Float[np.ndarray, " L"]:
    """Of each layer: 1 in perfect balance, P if one device does everything. NaN for a layer without rows."""
    mean = rows_LP.mean(axis=1)
    return np.divide(rows_LP.max(axis=1), mean, out=np.full(len(mean), np.nan), where=mean > 0)


def physical_indices(
    indices: Int[Array | np.ndarray, "*batch K"], tokens: Int[Array | np.ndarray, "*batch"], replicas: Replicas
) -> Int[Array, "*batch K"]:
    """The replica that serves each choice of the router: token t goes to replica t mod count of its expert.

    `indices` are logical, in [0, E], where E stands for no expert and becomes R; `tokens` are any numbers that differ from
    token to token, such as positions; `replicas` are those of one layer. Different experts have different replicas, so choices
    that are distinct stay distinct. It depends on no other token of the batch: a token's replica is the same in any batch.

    Raises ValueError for the replicas of several layers, or a number of tokens that is not that of the choices.
    """
    if replicas.logcnt.ndim != 1:
        raise ValueError(f"replicas: expected those of one layer, got {replicas.logcnt.ndim - 1} axes more; use .layer(index)")
    if tokens.shape != indices.shape[:-1]:
        raise ValueError(f"tokens: expected one for each token, {indices.shape[:-1]}, got {tokens.shape}; number the tokens")
    phy2log_R, log2phy, logcnt_E = (jnp.asarray(field, jnp.int32) for field in replicas)
    experts = logcnt_E.shape[0]
    logical = jnp.asarray(indices, jnp.int32)
    expert = jnp.minimum(logical, experts - 1)
    copy = jnp.asarray(tokens, jnp.int32)[..., None] % logcnt_E[expert]
    return jnp.where(logical < experts, log2phy[expert, copy], phy2log_R.shape[0])


def balanced_pack(loads: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """The pack of each item and its position there, `packs` of equally many items: heaviest first, to the lightest with room.

    Of equal items the first goes first, of equal packs it is the first one. The loads of two packs then differ by the heaviest
    item at most. Packs of a single item take them in order.
    """
    room = len(loads) // packs
    assert room * packs == len(loads)
    if room == 1:
        return np.arange(packs), np.zeros(packs, int)
    pack_of, position = np.empty(len(loads), int), np.empty(len(loads), int)
    load_of, held = np.zeros(packs), np.zeros(packs, int)
    for item in np.argsort(-loads, kind="stable"):
        pack = np.argmin(np.where(held < room, load_of, np.inf))
        pack_of[item], position[item] = pack, held[pack]
        load_of[pack] += loads[item]
        held[pack] += 1
    return pack_of, position


def replicate(loads: np.ndarray, replicas: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The expert of each replica, which of that expert's it is, and each expert's count: no counts have a lighter heaviest one.

    First come the experts in order; each further replica goes to the expert with the largest load per replica, of equals to the
    first.
    """
    count = np.ones(len(loads), int)
    expert_of, copy = [*range(len(loads))], [0] * len(loads)
    for _ in range(replicas - len(loads)):
        expert = int(np.argmax(loads / count))
        expert_of.append(expert)
        copy.append(int(count[expert]))
        count[expert] += 1
    return np.array(expert_of), np.array(copy), count


def _place_layer(loads_E: np.ndarray, replicas: int, groups: int, nodes: int, gpus: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert of each physical slot of one layer, and which of that expert's replicas it is."""
    node_G, position_G = balanced_pack(loads_E.reshape(groups, -1).sum(axis=1), nodes)
    group_in_slot = np.argsort(node_G * (groups // nodes) + position_G)
    experts_by_node = np.arange(len(loads_E)).reshape(groups, -1)[group_in_slot].reshape(nodes, -1)
    placed = []
    for expert_of in experts_by_node:
        local, copy, count = replicate(loads_E[expert_of], replicas // nodes)
        gpu, position = balanced_pack((loads_E[expert_of] / count)[local], gpus // nodes)
        in_slot = np.argsort(gpu * (replicas // gpus) + position)
        placed.append((expert_of[local[in_slot]], copy[in_slot]))
    phy2log, copies = zip(*placed, strict=True)
    return np.concatenate(phy2log), np.concatenate(copies)


def _with_inverse(phy2log_LR: np.ndarray, copy_LR: np.ndarray, experts: int) -> Replicas:
    layers, replicas = phy2log_LR.shape
    logcnt_LE = np.stack([np.bincount(phy2log_R, minlength=experts) for phy2log_R in phy2log_LR])
    log2phy = np.full((layers, experts, logcnt_LE.max()), -1, np.int32)
    log2phy[np.arange(layers)[:, None], phy2log_LR, copy_LR] = np.arange(replicas)[None, :]
    return Replicas(phy2log_LR.astype(np.int32), log2phy, logcnt_LE.astype(np.int32))


def _checked_loads(loads: ArrayLike) -> np.ndarray:
    """As float64 [L, E]."""
    loads_LE = np.asarray(loads, np.float64)
    if loads_LE.ndim != 2 or not loads_LE.size:
        raise ValueError(f"loads: expected [layers, experts], neither of them 0, got {loads_LE.shape}; give a row a layer")
    # Their sum too: an infinite one would make every device look equally full.
    with np.errstate(over="ignore"):
        finite = np.isfinite(loads_LE).all() and np.isfinite(loads_LE.sum())
    if not finite or loads_LE.min() < 0:
        found = f"{loads_LE.min()} to {loads_LE.max()}"
        raise ValueError(f"loads: expected finite non-negative numbers, got {found}; count the tokens of each expert")
    return loads_LE


def _require_multiple(replicas: int, gpus: int) -> None:
    if gpus < 1 or replicas % gpus:
        raise ValueError(f"num_gpus: expected a divisor of the {replicas} replicas, got {gpus}; each holds equally many")
