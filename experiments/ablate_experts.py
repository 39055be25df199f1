"""Do shared experts help, and do finer experts [§2.1.2; DeepSeekMoE, arXiv 2401.06066]?

    python -m experiments.ablate_experts --preset=tiny --seeds=5 --set=steps=1000 [--budget=minutes] [--resume]

At equal activated parameters: 0, 1 or 2 shared experts with so many fewer chosen; and experts of a half and a quarter of the
width, two and four times as many, of which two and four times as many are chosen, beside shared ones of the same width in all.
Routing is free of groups, which could not be the same groups.
Without `--workdir` the folder is runs/ablate_experts-PRESET. Results: experiments/RESULTS.md.
"""

from dsv3_jax.analysis.ablation import Claim
from dsv3_jax.config import Config
from dsv3_jax.settings import override
from experiments import _ablation


def arms(base: Config) -> dict[str, Config]:
    """Raises ValueError where the base's numbers cannot be divided so."""
    m = base.model
    if m.n_shared_experts != 1 or m.moe_intermediate_size % 4 or m.num_experts_per_tok < 2:
        raise ValueError(
            "n_shared_experts, moe_intermediate_size, num_experts_per_tok: expected 1, a multiple of 4 and at least 2, "
            f"got {m.n_shared_experts}, {m.moe_intermediate_size} and {m.num_experts_per_tok}"
        )
    free = override(base, {"n_group": 1, "topk_group": 1})

    def with_experts(shared: int, chosen: int, routed: int, width: int) -> Config:
        return override(free, {"n_shared_experts": shared, "num_experts_per_tok": chosen, "n_routed_experts": routed,
                               "moe_intermediate_size": width})  # fmt: skip

    k, n, width = m.num_experts_per_tok, m.n_routed_experts, m.moe_intermediate_size
    return {
        "1 shared": with_experts(1, k, n, width),
        "0 shared": with_experts(0, k + 1, n, width),
        "2 shared": with_experts(2, k - 1, n, width),
        "fine": with_experts(2, 2 * k, 2 * n, width // 2),
        "finer": with_experts(4, 4 * k, 4 * n, width // 4),
    }


NONE = "no figure in this report"
CLAIMS = (
    Claim(text="one shared expert is better than none", measure="loss", arm="1 shared", than="0 shared", expects="lower",
          report=NONE),
    Claim(text="two shared experts are better than one", measure="loss", arm="2 shared", than="1 shared", expects="lower",
          report=NONE),
    Claim(text="twice as many experts of half the width are better", measure="loss", arm="fine", than="1 shared",
          expects="lower", report=NONE),
    Claim(text="four times as many experts of a quarter of the width are better", measure="loss", arm="finer", than="1 shared",
          expects="lower", report=NONE),
)  # fmt: skip

ABLATION = _ablation.Ablation(
    name="experts",
    question="Do shared experts help, and do finer experts, at equal activated parameters?",
    arms=arms,
    claims=CLAIMS,
    base={"num_nextn_predict_layers": 0},  # not what is asked, and half of a small model's time
    shows=("max_vio_global",),
)

if __name__ == "__main__":
    _ablation.run(ABLATION)
