"""What node-limited routing saves [§2.1.2, §3.2.2]: ranks and nodes that a token visits, and bytes by link, from its experts.

Pure NumPy over the router's choices; experts lie on ranks in order, ranks on nodes in order, as the mesh lays them.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

FORMAT_BYTES = {"bf16": 2.0, "fp8": 1.0 + 4 / 128}  # FP8 with one float32 scale for each 128 channels [§3.3.2]


class Visits(NamedTuple):
    """Of every token: distinct ranks and nodes of its experts, and how many copies of it travel over which link.

    `rows_*` is what this project's exchange sends, a copy for each expert that is not on the token's own rank; `deduplicated_*`
    what the report's kernels send: one copy to each other node, over the slow link, and from there one to each rank.
    """

    ranks: Int[np.ndarray, " N"]
    nodes: Int[np.ndarray, " N"]
    rows_inside: Int[np.ndarray, " N"]
    rows_across: Int[np.ndarray, " N"]
    deduplicated_inside: Int[np.ndarray, " N"]
    deduplicated_across: Int[np.ndarray, " N"]


def visits(
    indices_NK: Int[np.ndarray, "N K"], own_rank_N: Int[np.ndarray, " N"], n_experts: int, n_ranks: int, node_size: int
) -> Visits:
    """Where each token goes from the rank that holds it. Raises ValueError if the ranks do not divide the experts."""
    if n_experts % n_ranks:
        raise ValueError(f"ranks: expected a divisor of the {n_experts} experts, got {n_ranks}")
    rank_NK = indices_NK // (n_experts // n_ranks)
    node_NK, own_node_N = rank_NK // node_size, own_rank_N // node_size
    is_rank_NP = _marked(rank_NK, n_ranks)
    is_node_NM = _marked(node_NK, -(-n_ranks // node_size))
    elsewhere_NK, same_node_NK = rank_NK != own_rank_N[:, None], node_NK == own_node_N[:, None]
    other_nodes_N = is_node_NM.sum(axis=1) - np.take_along_axis(is_node_NM, own_node_N[:, None], axis=1)[:, 0]
    other_ranks_N = is_rank_NP.sum(axis=1) - np.take_along_axis(is_rank_NP, own_rank_N[:, None], axis=1)[:, 0]
    # A copy arrives at the rank of the same place in its node and goes on from there to the others.
    landing_NM = np.arange(is_node_NM.shape[1])[None] * node_size + (own_rank_N % node_size)[:, None]
    lands_on_target = np.take_along_axis(is_rank_NP, np.minimum(landing_NM, n_ranks - 1), axis=1) & is_node_NM
    lands_on_target &= np.arange(is_node_NM.shape[1])[None] != own_node_N[:, None]
    return Visits(
        ranks=is_rank_NP.sum(axis=1),
        nodes=is_node_NM.sum(axis=1),
        rows_inside=(elsewhere_NK & same_node_NK).sum(axis=1),
        rows_across=(~same_node_NK).sum(axis=1),
        deduplicated_inside=other_ranks_N - lands_on_target.sum(axis=1),
        deduplicated_across=other_nodes_N,
    )


def _marked(values_NK: np.ndarray, size: int) -> np.ndarray:
    """bool [N, size]: which values a row holds."""
    marks = np.zeros((len(values_NK), size), bool)
    np.put_along_axis(marks, values_NK, True, axis=1)
    return marks


def summary(visited: Visits, hidden: int) -> dict[str, Any]:
    """JSON-able: means and maxima a token, and bytes a token for dispatch and combine, by link and format."""

    def bytes_by_link(copies: str) -> dict[str, float]:
        return {
            f"{link}_{name}": float(getattr(visited, f"{copies}_{link}").mean() * hidden * size)
            for link in ("inside", "across")
            for name, size in FORMAT_BYTES.items()
        }

    return {
        "ranks_mean": float(visited.ranks.mean()),
        "ranks_max": int(visited.ranks.max()),
        "nodes_mean": float(visited.nodes.mean()),
        "nodes_max": int(visited.nodes.max()),
        "bytes_per_token_rows": bytes_by_link("rows"),
        "bytes_per_token_deduplicated": bytes_by_link("deduplicated"),
    }
