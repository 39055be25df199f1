"""Bytes that a device sends in one step, by mesh axes and link [§3.2.2].

Gathers and reductions go axis by axis, as the program says; along one axis, what is needed from other nodes enters a node once,
spread over the axis' ranks in it. The exchange of expert parallelism sends every row to its expert's device on its own.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dsv3_jax.fp8.precision import wire
from dsv3_jax.parallel.mesh import EXPERT, TENSOR
from dsv3_jax.planner.chips import Chip
from dsv3_jax.planner.rows import Number
from dsv3_jax.planner.share import FLOAT32, Share, Weight

# Of one layer: x forward, x and dy in the backward pass; y and dx on the way back. Gates go with x, their gradients with dx.
DISPATCHES, COMBINES = 3, 2
DISPATCHED_GATES, COMBINED_GATES = 2, 1


class Traffic(NamedTuple):
    what: str
    label: str
    axis: str
    link: str  # node, network or ici
    bytes: float
    hops: float  # links that a byte crosses, where devices form a torus

    @property
    def key(self) -> str:
        return ".".join((self.what, self.axis, self.link))


def traffic(share: Share, chip: Chip) -> tuple[Traffic, ...]:
    found = [*_weights(share), *_exchange(share, chip), *_tensor(share)]
    if not chip.torus_dims:
        return tuple(t for t in found if t.bytes)
    merged: dict[str, Traffic] = {}
    for t in found:
        t = t._replace(link="ici")
        merged[t.key] = t._replace(bytes=t.bytes + (merged[t.key].bytes if t.key in merged else 0))
    return tuple(t for t in merged.values() if t.bytes)


def seconds(t: Traffic, chip: Chip) -> Number:
    return t.bytes * t.hops / chip.link_bytes_per_second(t.link)


def _weights(share: Share) -> Iterator[Traffic]:
    """Gathers of weights and reductions of gradients over the axes that cut the optimiser's pieces, one after the other."""
    gathered: dict[str, Number] = {}
    scattered: dict[str, Number] = {}
    for weight in share.weights:
        gather, scatter = _per_step(share, weight)
        whole = weight.state
        for axis in weight.added:  # as the program gathers: the outermost axis first, while the pieces are small
            whole *= share.sizes[axis]
            gathered[axis] = gathered.get(axis, 0) + whole * gather
            scattered[axis] = scattered.get(axis, 0) + whole * scatter
    for axis in gathered:
        yield from _collective(share, "gather", "weights gathered", axis, gathered[axis])
        yield from _collective(share, "scatter", "gradients reduced", axis, scattered[axis])


def _per_step(share: Share, weight: Weight) -> tuple[int, int]:
    """Bytes of one element of the compute piece that all gathers, and all reductions, of a step move."""
    if not share.in_pieces(weight):
        return share.param_bytes, share.gradient_bytes
    model, used = share.config.model, share.micro_batches * share.used_bytes(weight)
    if weight.group == "embed_tokens":  # looked up for each depth; read by the head too where it is tied
        lookups = 1 + model.num_nextn_predict_layers + model.tie_word_embeddings
        return used * lookups, used * lookups
    again = model.remat != "none" and "layers" in weight.spec.axes
    return used * (1 + again), used


def _collective(share: Share, what: str, label: str, axis: str, whole: Number, passes: int = 1) -> Iterator[Traffic]:
    """A gather or reduction whose whole is `whole` bytes, over the ranks of one axis."""
    ranks, near = share.sizes[axis], share.in_node(axis)
    nodes = ranks / near
    network = whole * (nodes - 1) / nodes / near
    node = whole * (ranks - 1) / ranks - network
    for link, size in (("node", node), ("network", network)):
        yield Traffic(what, label, axis, link, passes * size, 1)


def exchange_hops(chip: Chip, ranks: int) -> Number:
    """Links that a row crosses on the shortest way, on average: a quarter of each side of the ranks' own torus."""
    return max(1.0, chip.torus_dims * ranks ** (1 / chip.torus_dims) / 4) if chip.torus_dims else 1


def _exchange(share: Share, chip: Chip) -> Iterator[Traffic]:
    """Rows of tokens, and their gradients, between the ranks of the expert axis; in balance each goes to every rank alike."""
    ranks, model = share.sizes[EXPERT], share.config.model
    if ranks == 1 or not model.n_moe_layers:
        return
    row = model.hidden_size * share.compute_bytes
    x, dy = (how.row_bytes(model.hidden_size) if how else row for how in wire(model))
    rows = share.micro_batches * model.n_moe_layers * share.rows
    near = share.in_node(EXPERT)
    hops = exchange_hops(chip, ranks)
    sizes = {
        "dispatch": 2 * x + dy + DISPATCHED_GATES * FLOAT32,
        "combine": COMBINES * row + COMBINED_GATES * FLOAT32,
    }
    for what, size in sizes.items():
        for link, share_of_ranks in (("node", (near - 1) / ranks), ("network", (ranks - near) / ranks)):
            yield Traffic(what, f"rows, {what}", EXPERT, link, rows * size * share_of_ranks, hops)


def _tensor(share: Share) -> Iterator[Traffic]:
    """All-reduces: a block's two results and the gradients of what its divided products read, the embedding's, the head's."""
    if share.tensor == 1:
        return
    model, depths = share.config.model, 1 + share.config.model.num_nextn_predict_layers
    blocks = model.num_hidden_layers + model.num_nextn_predict_layers
    forward = 3 if model.remat == "full" else 2  # which repeats the one after attention
    query = model.hidden_size if model.attention != "mla" or model.q_lora_rank is None else model.q_lora_rank
    attention = query + model.kv_lora_rank + model.qk_rope_head_dim if model.attention == "mla" else query
    channels = blocks * ((forward + 1) * model.hidden_size + attention) + 2 * depths * model.hidden_size
    whole = share.micro_batches * share.tokens * (channels * share.compute_bytes + 3 * FLOAT32 * depths)
    yield from _collective(share, "all_reduce", "hidden states summed", TENSOR, whole, passes=2)
