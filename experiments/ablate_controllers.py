"""How fast should the bias move, and by how much [§2.1.2; arXiv 2408.15664, section 4.3]?

    python -m experiments.ablate_controllers --preset=tiny --seeds=5 --set=steps=1000 [--budget=minutes] [--resume]

The report's rule, a fixed step against the sign of the load error, at the base's `bias_update_speed`, at a tenth and at ten
times of it; a step in proportion to the error; and the fixed step with the biases' mean taken out.
Without `--workdir` the folder is runs/ablate_controllers-PRESET. Results: experiments/RESULTS.md.
"""

from dsv3_jax.analysis.ablation import Claim
from dsv3_jax.config import Config
from dsv3_jax.settings import override
from experiments import _ablation

SAME = 0.005  # nats: what the report finds between ways of balancing


def arms(base: Config) -> dict[str, Config]:
    speed = base.train.bias_update_speed
    return {
        "sign": override(base, {"controller": "sign"}),
        "slow": override(base, {"controller": "sign", "bias_update_speed": speed / 10}),
        "fast": override(base, {"controller": "sign", "bias_update_speed": speed * 10}),
        "proportional": override(base, {"controller": "proportional"}),
        "centred": override(base, {"controller": "centred"}),
    }


SPEEDS = "no figure of loss; MaxVio settles too slowly at u = 0.0001 and fluctuates at 0.01, arXiv 2408.15664"
CLAIMS = (
    Claim(text="a slow bias balances worse", measure="max_vio", arm="slow", than="sign", expects="higher", report=SPEEDS),
    Claim(text="a fast bias balances worse", measure="max_vio", arm="fast", than="sign", expects="higher", report=SPEEDS),
    Claim(text="a fast bias costs loss", measure="loss", arm="fast", than="sign", expects="higher", report=SPEEDS),
    Claim(
        text="steps in proportion to the error balance all held-out text better", measure="max_vio_global", arm="proportional",
        than="sign", expects="lower", report="MaxVio 0.036 beside 0.044, perplexity 9.51 beside 9.50, arXiv 2408.15664",
    ),
    Claim(
        text=f"they cost the same loss, to {SAME} nats", measure="loss", arm="proportional", than="sign", expects="equal",
        within=SAME, report="perplexity 9.51 beside 9.50 (0.001 nats), arXiv 2408.15664",
    ),
    Claim(
        text=f"centred biases cost the same loss, to {SAME} nats", measure="loss", arm="centred", than="sign", expects="equal",
        within=SAME,
    ),
)  # fmt: skip

ABLATION = _ablation.Ablation(
    name="controllers",
    question="How fast should the bias move, and by how much?",
    arms=arms,
    claims=CLAIMS,
    base={"num_nextn_predict_layers": 0},  # not what is asked, and half of a small model's time
    shows=("max_vio", "max_vio_global"),
)

if __name__ == "__main__":
    _ablation.run(ABLATION)
