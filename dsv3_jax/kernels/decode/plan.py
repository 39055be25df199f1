"""What the kernel for TPU reads, writes and multiplies, counted from its list of work, and the least possible."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels.decode import pallas_tpu
from dsv3_jax.kernels.decode.work import make_work
from dsv3_jax.kernels.tiles import LANES, up


class Problem(NamedTuple):
    length: tuple[int, ...]  # of each sequence, the new tokens included
    queries: int  # new tokens
    heads: int
    width: int  # of a key; rows of the cache are as wide in whole lanes
    latent: int
    page: int  # rows; the whole cache where it is contiguous
    pages: int  # of a sequence, at most
    itemsize: int = 2
    splits: int = 1


class Cost(NamedTuple):
    cache: int  # bytes read of it
    rest: int  # bytes of queries, results, log-sum-exps and, between splits and their combination, parts
    flops: int  # of both matrix products

    @property
    def bytes(self) -> int:
        return self.cache + self.rest


def least(problem: Problem) -> Cost:
    """Each row that is seen read once, each query and result moved once, products only with rows that a query sees."""
    most, sequences, n = problem.page * problem.pages, len(problem.length), problem.queries * problem.heads
    rows = sum(min(max(length, 0), most) for length in problem.length)
    seen = sum(min(max(length - problem.queries + t + 1, 0), most) for length in problem.length for t in range(problem.queries))
    moved = (problem.width + problem.latent) * problem.itemsize + 4
    products = 2 * (problem.width + problem.latent) * problem.heads * seen
    return Cost(rows * problem.width * problem.itemsize, sequences * n * moved, products)


def performed(problem: Problem, blocks: pallas_tpu.Blocks) -> Cost:
    """As the grid performs them. A row occupies whole lanes; of a block whole pieces are copied."""
    most, n = problem.page * problem.pages, problem.queries * problem.heads
    blocks, piece = pallas_tpu.fitted(blocks, most), pallas_tpu.piece_of(problem.page)
    parts, row = len(problem.length) * problem.splits, up(problem.width, LANES) * problem.itemsize
    visible = np.clip(np.array(problem.length), 0, most)
    work = make_work(jnp.asarray(visible, jnp.int32), blocks.rows, problem.splits, most, pallas_tpu.cores_for(parts))
    part_E, block_E, first_L = (np.asarray(v) for v in work)
    cache = flops = loads = 0
    for core_begin, core_end in zip(first_L, first_L[1:], strict=False):
        before = -1
        for part, block in zip(part_E[core_begin:core_end], block_E[core_begin:core_end], strict=True):
            b = int(part) // problem.splits
            left = min(max(int(visible[b]) - int(block) * blocks.rows, 0), blocks.rows)
            whole = problem.length[b] - problem.queries + 1 - int(block) * blocks.rows >= blocks.rows
            cache += -(-left // piece) * piece * row
            height = blocks.rows if whole and left == blocks.rows else -(-left // blocks.height) * blocks.height
            flops += 2 * n * height * (problem.width + problem.latent)
            loads += before != b
            before = b
    result, item = n * up(problem.latent, LANES), problem.itemsize if problem.splits == 1 else 4
    lse = up(n, LANES) * 4
    rest = loads * n * row + parts * (result * item + lse)
    if problem.splits > 1:  # read again, combined, written
        rest += parts * (result * item + lse) + len(problem.length) * (result * problem.itemsize + lse)
    return Cost(cache, rest, flops)
