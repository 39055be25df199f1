"""What does the group limit cost in loss, and what does it save in bytes between nodes [§2.1.2]?

    python -m experiments.ablate_groups --preset=tiny --seeds=5 --set=steps=1000 [--budget=minutes] [--resume]

Every token limited to the experts of `topk_group` groups, of one group, and free. A group stands for a node, as in the report's
training: nodes a token, of 64 rows of held-out text, are the copies of it that dispatch sends between nodes.
Without `--workdir` the folder is runs/ablate_groups-PRESET. Results: experiments/RESULTS.md.
"""

from pathlib import Path

import numpy as np

from dsv3_jax.analysis.ablation import Claim
from dsv3_jax.config import Config
from dsv3_jax.data.pipeline import build_data
from dsv3_jax.inference.loaded import load
from dsv3_jax.settings import override
from experiments import _ablation

ROWS = 64
SAME = 0.005  # nats: what the report finds between ways of balancing


def arms(base: Config) -> dict[str, Config]:
    """Raises ValueError for a base without groups, or with too few experts in one."""
    m = base.model
    if m.topk_group >= m.n_group:
        raise ValueError(f"topk_group: expected fewer than n_group={m.n_group}, got {m.topk_group}")
    free, single = override(base, {"topk_group": m.n_group}), override(base, {"topk_group": 1})
    return {"limited": base, "free": free, "one group": single}


def nodes(folder: Path, config: Config) -> dict[str, float]:
    """Groups that a token's experts are in, mean over tokens and layers."""
    m, data, model = config.model, build_data(config.data, config.model.vocab_size), load(folder, mtp=False)
    batch = next(iter(data.eval_batches(ROWS)))
    tokens, valid = batch["tokens"][0, :, :-1], batch["segment_ids"][0, :, :-1] != 0
    groups = model.score(tokens).router_indices // (m.n_routed_experts // m.n_group)
    visited = (groups[..., None] == np.arange(m.n_group)).any(axis=-2).sum(axis=-1)
    return {"nodes": float(np.mean(visited[:, valid]))}


CLAIMS = (
    Claim(text=f"the group limit costs no loss, to {SAME} nats", measure="loss", arm="limited", than="free", expects="equal",
          within=SAME),
    Claim(text="a token visits fewer nodes", measure="nodes", arm="limited", than="free", expects="lower",
          report="at most 4 nodes of 8, §2.1.2"),
    Claim(text="a single group costs loss", measure="loss", arm="one group", than="limited", expects="higher"),
)  # fmt: skip

ABLATION = _ablation.Ablation(
    name="groups",
    question="What does the group limit cost in loss, and what does it save in bytes between nodes?",
    arms=arms,
    claims=CLAIMS,
    base={"num_nextn_predict_layers": 0},  # not what is asked, and half of a small model's time
    titles={"nodes": "nodes a token"},
    observe=nodes,
)

if __name__ == "__main__":
    _ablation.run(ABLATION)
