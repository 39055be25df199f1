"""tokamax's kernels for TPU as peers in `bench_kernels`, where it is installed: for Python 3.12 and up.

`pip install 'dsv3_jax[tokamax]'`. Where programs are compiled its inner modules are called, so that one program has known
blocks, and trips follow from their sources (0.0.17): each branch counts as often as it is taken, in the order of the program.
Where they are timed its public functions are, which choose an implementation.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from dsv3_jax.kernels.grouped.cost import Cost, entries_of
from experiments import _bench_attention
from experiments._bench_case import BF16, Case

GMM = (512, 512), (512, 256)  # rows, columns
GMM_V2 = (512, 512, 128), (512, 256, 128)  # rows, columns, and rows by which its branches differ
TGMM = (512, 1024, 1024), (256, 1024, 1024)  # rows, columns of either operand
TGMM_V2 = (256, 1024, 1024), (256, 7168, 512)
SUBLANES = 16  # rows of BF16 that a tile of the second version is aligned to

# Queries, keys, keys of one iteration; forward, where those are equal, what is beyond the diagonal is left out in 4 x 4 parts.
SPLASH = (1024, 1024, 1024), (2048, 2048, 2048)
SPLASH_BACKWARD = (1024, 1024, 1024), (1024, 2048, 1024)
GRID = 4


def installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def ragged_dot(x: Any, w: Any, count: Any) -> Any:
    """Of [R, I] and [G, I, O], in the implementation that it chooses."""
    import tokamax

    return tokamax.ragged_dot(x, w, count)


def dot_product_attention(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Causal, of [B, T, N, H], values of another width; in the implementation that it chooses."""
    import tokamax

    return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True)


def chosen(lowered: jax.stages.Lowered) -> str:
    """The implementations in a program, by their class."""
    from tokamax.autotuning import get_bound_args

    return " ".join(sorted({type(found.op).__name__ for found in get_bound_args(lowered)}))


def _auto(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` where axes of the mesh are explicit, which its kernels for several cores do not know."""
    return jax.sharding.auto_axes(run, axes=("x",), out_sharding=PartitionSpec())


def tiles_of(counts: Sequence[int], rows: int) -> list[tuple[int, int, int]]:
    """The second version's (group, first row of it, the one behind the last) of each tile, from a multiple of `SUBLANES` on."""
    found = []
    for group, (start, end) in enumerate(pairwise([0, *map(int, np.cumsum(counts))])):
        while start < end:
            local = start % SUBLANES
            stop = min(start + rows - local, end)
            found.append((group, local, local + stop - start))
            start = stop
    return found


def gmm_v2_cost(counts: Sequence[int], inner: int, outer: int, blocks: tuple[int, int, int], ours: Cost) -> Cost:
    """`trips`: of its branches for tiles full of rows, for those with `blocks[2]` rows less, and so on."""
    (height, columns, least), tiles, across = blocks, tiles_of(counts, blocks[0]), -(-outer // blocks[1])
    branches = height // least
    taken = Counter(min(end // least, branches - 1) for _, _, end in tiles)
    computed = sum(n * (branch + 1) * least for branch, n in taken.items())
    trips = tuple(taken[branch] / len(tiles) for branch in reversed(range(branches))) if branches > 1 else ()
    return ours._replace(steps=across * len(tiles), trips=trips, flops=2 * across * computed * inner * columns)


def outer_cost(
    groups: Sequence[int], counts: Sequence[int], inner: int, outer: int, blocks: tuple[int, int, int], order: str, ours: Cost
) -> Cost:
    """`groups`: of each step; `order`: the branches', for a group's first, middle, last, or only step, or for an empty one."""
    runs = Counter(groups)
    single, several = (sum(test(n) for n in runs.values()) for test in (lambda n: n == 1, lambda n: n > 1))
    kinds = {"single": single, "first": several, "last": several, "middle": len(groups) - single - 2 * several}
    kinds["empty"] = sum(n == 0 for n in counts) if "empty" in order else 0
    across, each = -(-inner // blocks[1]) * -(-outer // blocks[2]), len(groups) + kinds["empty"]
    flops = 2 * across * len(groups) * blocks[0] * blocks[1] * blocks[2]
    return ours._replace(steps=across * each, trips=tuple(kinds[kind] / each for kind in order.split()), flops=flops)


def splash_cost(length: int, blocks: tuple[int, int, int], *, backward: bool) -> Cost:
    """Its grid is of the blocks that see something. `trips`: of start, blocks seen whole, those on the diagonal, finish.

    Of the backward pass copies come first, a part of their own.
    """
    block_q, block_kv, compute = blocks
    n_q, n_kv, heads = length // block_q, length // block_kv, _bench_attention.HEADS
    seen = [(i, j) for i in range(n_q) for j in range(n_kv) if j * block_kv <= i * block_q + block_q - 1]
    whole = sum(j * block_kv + block_kv - 1 <= i * block_q for i, j in seen)
    ends, some = n_kv if backward else n_q, len(seen) - whole
    trips = (*[1.0] * backward, *(n / len(seen) for n in (ends, whole, some, ends)))
    of_pair = _bench_attention.BACKWARD if backward else _bench_attention.FORWARD
    left_out = 0 if backward or not block_q == block_kv == compute else some * (GRID - 1) / (2 * GRID)
    flops = round(heads * (len(seen) - left_out) * block_q * block_kv * of_pair)
    return Cost(heads * len(seen), trips, 0, 0, flops, _bench_attention.least_flops(length, of_pair))


def products(name: str, shape: str, operands: Any, counts: Sequence[int], ours: Cost, *, transposed: bool) -> list[Case]:
    """Of rows [R, I] and weights [G, I, O], or [G, O, I] if `transposed`; all of the contraction at once, as ours."""
    if not installed():
        return []
    (rows, inner), outer = operands[0].shape, operands[1].shape[1 if transposed else 2]

    def first(tiles: tuple[int, ...], x: Any, w: Any, count: Any) -> Any:
        from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernels

        precision = (jax.lax.Precision.DEFAULT,) * 2
        return kernels.gmm(x, w, count, precision=precision, out_dtype=BF16, tiling=tiles, transpose_rhs=transposed)

    def second(tiles: tuple[int, ...], x: Any, w: Any, count: Any) -> Any:
        from tokamax._src.ops.gmm_v2 import gmm_v2

        how: dict[str, Any] = dict(maybe_quantize_lhs=False, zero_initialize=False, preferred_element_type=BF16)
        run = partial(gmm_v2.gmm_v2, tile_info=gmm_v2.TileSizes(*tiles), transpose_rhs=transposed, **how)
        return _auto(run)(x, w, count)

    def case(run: Any, program: str, cost: Cost, tiles: tuple[int, ...], peer: str) -> Case:
        return Case(name, program, shape, partial(run, tiles), operands, cost, tiles, peer, parts=True)

    found, program = [], "pallas_tpu_ragged_dot_gmm" + "_transpose_rhs" * transposed
    for height, columns in GMM:
        steps = -(-outer // columns) * len(entries_of(counts, height))
        cost = ours._replace(steps=steps, trips=(), flops=2 * steps * height * inner * columns)
        found.append(case(first, program, cost, (height, inner, columns), "tokamax gmm"))
    for height, columns, least in GMM_V2:
        cost = gmm_v2_cost(counts, inner, outer, (height, columns, least), ours)
        program = f"gmm_v2-g_{len(counts)}-m_{rows}-k_{inner}-act_None-n_{outer}-tm_{height}-tk_{inner}-tn_{columns}"
        found.append(case(second, program, cost, (height, inner, columns, least), "tokamax gmm_v2"))
    return found


def outer_products(name: str, shape: str, operands: Any, counts: Sequence[int], ours: Cost) -> list[Case]:
    """Of [R, I] and [R, O] in each group."""
    if not installed():
        return []
    (rows, inner), (_, outer) = operands[0].shape, operands[1].shape

    def first(tiles: tuple[int, ...], x: Any, y: Any, count: Any) -> Any:
        from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernels

        how: dict[str, Any] = dict(precision=(jax.lax.Precision.DEFAULT,) * 2, out_dtype=BF16, combine_scopes=True)
        return kernels.tgmm(x.T, y, count, tiling=tiles, **how)

    def second(tiles: tuple[int, ...], x: Any, y: Any, count: Any) -> Any:
        from tokamax._src.ops.gmm_v2 import gmm_v2, tgmm_v2

        sizes = gmm_v2.TileSizes(*tiles, bucket_base=tiles[0])
        return _auto(partial(tgmm_v2.tgmm_v2, tile_info=sizes, preferred_element_type=BF16, num_actual_groups=len(counts)))(
            x, y, count
        )

    found = []
    for blocks in TGMM:
        groups = [group for group, *_ in entries_of(counts, blocks[0])]
        cost = outer_cost(groups, counts, inner, outer, blocks, "middle first last single empty", ours)
        how: dict[str, Any] = dict(parts=True, peer="tokamax tgmm")
        found.append(Case(name, "pallas_tpu_ragged_dot_tgmm", shape, partial(first, blocks), operands, cost, blocks, **how))
    for blocks in TGMM_V2:
        groups = [group for group, *_ in tiles_of(counts, blocks[0])]
        cost = outer_cost(groups, counts, inner, outer, blocks, "single first last middle", ours)
        sizes = "-".join(f"{letter}_{size}" for letter, size in zip(("tm", "tk", "tn"), blocks, strict=True))
        program = f"tgmm_v2-g_{len(counts)}-m_{rows}-k_{inner}-act_None-n_{outer}-{sizes}"
        how = dict(parts=True, peer="tokamax tgmm_v2")
        found.append(Case(name, program, shape, partial(second, blocks), operands, cost, blocks, **how))
    return found


def splash(length: int, blocks: tuple[int, int, int], *, backward: bool) -> Callable[..., Any]:
    """The function of q [H, T, 192], k and v [H, T, 128] that has tokamax's splash attention in it.

    With queries, and forward also keys, transposed, whose 192 then take no 256 lanes; to transpose them is not counted.
    """
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernels
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    across, skip = kernels.QKVLayout.SEQ_MINOR, len(set(blocks)) == 1
    if backward:
        config = kernels.SplashConfig(512, 512, 512, *blocks, q_layout=across, dq_reduction_steps=3)
    else:
        config = kernels.SplashConfig(
            *blocks, q_layout=across, k_layout=across, qk_diag_skip=skip, sv_diag_skip=skip, qk_diag_grid=GRID
        )
    mask = masks.CausalMask((length, length))
    kernel = kernels.make_splash_mha(mask, config=config, q_seq_shards=1, save_residuals=not backward)
    return (lambda q, k, v: jax.vjp(kernel, q, k, v)[1](v)) if backward else kernel


def attention(length: int, shape: str) -> list[Case]:
    if not installed():
        return []
    found = []
    for back, program, table in (
        (False, "splash_mha_fwd_residuals", SPLASH),
        (True, "splash_mha_dkv_no_residuals", SPLASH_BACKWARD),
    ):
        for blocks in table:

            def run(*operands: Any, blocks: tuple[int, int, int] = blocks, back: bool = back) -> Any:
                return splash(length, blocks, backward=back)(*operands)

            name, cost = "attention_backward" if back else "attention", splash_cost(length, blocks, backward=back)
            how: dict[str, Any] = dict(parts=True, small=(0,) if back else (), peer=f"tokamax {program}")
            found.append(Case(name, program, shape, run, _bench_attention.splash_arrays(length), cost, blocks, **how))
    return found
