"""What the kernel for TPU reads, writes and multiplies, counted from its list of work, and the least possible."""

from collections.abc import Iterator
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


class _Entry(NamedTuple):
    """Of the list of work: a part's block, by one core."""

    core: int
    place: int  # in the core's run
    part: int
    left: int  # rows of the block that are seen
    whole: bool  # all of it, by all queries
    first: bool  # of its part
    fresh: bool  # of its sequence's


def _entries(problem: Problem, blocks: pallas_tpu.Blocks) -> Iterator[_Entry]:
    most, parts = problem.page * problem.pages, len(problem.length) * problem.splits
    visible = np.clip(np.array(problem.length), 0, most)
    work = make_work(jnp.asarray(visible, jnp.int32), blocks.rows, problem.splits, most, pallas_tpu.cores_for(parts))
    part_E, block_E, first_L = (np.asarray(v) for v in work)
    for core, (begin, end) in enumerate(zip(first_L, first_L[1:], strict=False)):
        before = -1
        for place, (part, block) in enumerate(zip(part_E[begin:end], block_E[begin:end], strict=True)):
            b = int(part) // problem.splits
            left = min(max(int(visible[b]) - int(block) * blocks.rows, 0), blocks.rows)
            seen = problem.length[b] - problem.queries + 1 - int(block) * blocks.rows
            whole = seen >= blocks.rows and left == blocks.rows
            fresh = before // problem.splits != b if before >= 0 else True
            yield _Entry(core, place, int(part), left, whole, before != part, fresh)
            before = int(part)


def performed(problem: Problem, blocks: pallas_tpu.Blocks) -> Cost:
    """As the grid performs them. A row occupies whole lanes; of a block whole pieces are copied."""
    n = problem.queries * problem.heads
    blocks, piece = pallas_tpu.fitted(blocks, problem.page * problem.pages), pallas_tpu.piece_of(problem.page)
    parts, row = len(problem.length) * problem.splits, up(problem.width, LANES) * problem.itemsize
    cache = flops = loads = 0
    for entry in _entries(problem, blocks):
        cache += -(-entry.left // piece) * piece * row
        height = blocks.rows if entry.whole else -(-entry.left // blocks.height) * blocks.height
        flops += 2 * n * height * (problem.width + problem.latent)
        loads += entry.fresh
    result, item = n * up(problem.latent, LANES), problem.itemsize if problem.splits == 1 else 4
    lse = up(n, LANES) * 4
    rest = loads * n * row + parts * (result * item + lse)
    if problem.splits > 1:  # read again, combined, written
        rest += parts * (result * item + lse) + len(problem.length) * (result * problem.itemsize + lse)
    return Cost(cache, rest, flops)


def trips(problem: Problem, blocks: pallas_tpu.Blocks) -> tuple[int, tuple[float, ...]]:
    """Steps, and how often one runs each part of the program, on average.

    Parts: the first step's copies, for each block ahead a loop over several pieces at once and one over single ones; a step
    that has work, its copies ahead and its waits, two loops each; then start, a block that is seen as a whole, heights of one
    that is not, those of them that are cleared, and finish.
    """
    blocks, piece = pallas_tpu.fitted(blocks, problem.page * problem.pages), pallas_tpu.piece_of(problem.page)
    entries = list(_entries(problem, blocks))
    cores = max(entry.core for entry in entries) + 1
    steps = cores * max(entry.place + 1 for entry in entries)
    ahead = blocks.depth - 1
    first, later, waits = ([0] * (2 * ahead), [0, 0], [0, 0])
    whole = heights = cleared = 0
    for entry in entries:
        copies = divmod(-(-entry.left // piece), pallas_tpu.TOGETHER)
        for i, n in enumerate(copies):
            waits[i] += n
            if entry.place < ahead:
                first[2 * entry.place + i] += n
            else:
                later[i] += n
        whole += entry.whole
        if not entry.whole:
            heights += -(-entry.left // blocks.height)
            cleared += entry.left % blocks.height > 0
    parts = len(problem.length) * problem.splits
    counts = (cores, *first, len(entries), *later, *waits, parts, whole, heights, cleared, parts)
    return steps, tuple(n / steps for n in counts)
