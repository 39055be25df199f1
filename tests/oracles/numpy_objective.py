"""The objective of one optimiser step in NumPy float64: main loss, MTP, balance; over all its rows at once."""

from typing import Any

import numpy as np

from oracles import numpy_model, numpy_moe


def objective(
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    batch: dict[str, np.ndarray],
    *,
    mtp_weight: float,
    alpha: float,
    balance: str = "sequence",
    balance_mtp: bool = True,
    reduction: str = "sum",
    isolate_documents: bool = True,
    n_domains: int = 1,
) -> dict[str, Any]:
    """`batch` holds rows [N, S]. Returns loss, main_loss, mtp_loss, balance_loss, load [L, E], domain sums and the margin."""
    tokens, segments, domains = (batch[name] for name in ("tokens", "segment_ids", "domain_ids"))
    length, experts = tokens.shape[1] - 1, config["n_routed_experts"]
    seen = segments if isolate_documents else None
    main = numpy_model.forward(tensors, config, tokens[:, :length], None if seen is None else seen[:, :length])
    modules = numpy_model.mtp_forward(tensors, config, main, tokens, seen)

    targets, valid = numpy_model.aligned_targets(tokens, length, 0, segments)
    main_loss = numpy_model.cross_entropy(main["logits"], targets, valid)
    mtp_losses, routers = [], [(record, segments[:, :length] != 0) for record in main["routing"].values()]
    for depth, module in enumerate(modules, start=1):
        known = module["logits"].shape[1]
        depth_targets, depth_valid = (a[:, :known] for a in numpy_model.aligned_targets(tokens, length, depth, segments))
        mtp_losses.append(numpy_model.cross_entropy(module["logits"], depth_targets, depth_valid))
        routers.append((module["routing"], depth_valid))

    def balance_of(record: dict[str, Any], counted: np.ndarray) -> float:
        if balance == "classical":
            return numpy_moe.classical_loss(record["logits"], record["indices"], counted)
        loss = numpy_moe.sequence_wise_loss if balance == "sequence" else numpy_moe.batch_wise_loss
        return loss(record["scores"], record["indices"], counted)

    balanced = routers if balance_mtp else routers[: len(main["routing"])]
    values = [balance_of(*router) for router in balanced]
    balance_loss = alpha * (np.mean(values) if reduction == "mean" else np.sum(values))
    mtp_loss = float(np.mean(mtp_losses)) if mtp_losses else 0.0
    by_domain = [valid & (domains[:, 1:] == m) for m in range(n_domains)]
    return {
        "loss": main_loss + mtp_weight * mtp_loss + balance_loss,
        "main_loss": main_loss,
        "mtp_loss": mtp_loss,
        "balance_loss": balance_loss,
        "load": np.stack([numpy_moe.expert_counts(r["indices"], experts, counted) for r, counted in routers]),
        "domain_loss_sum": [numpy_model.cross_entropy(main["logits"], targets, where) * where.sum() for where in by_domain],
        "domain_tokens": [int(where.sum()) for where in by_domain],
        "margin": min(min(r["margin"].min(), r["group_margin"].min()) for r, _ in routers),
    }
