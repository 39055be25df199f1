"""Does balancing by a bias cost less than balancing by a loss, and do experts specialise more [§4.5.2, §4.5.3]?

    python -m experiments.ablate_balance --preset=tiny --seeds=5 --set=steps=1000 [--budget=minutes] [--resume]

Four ways to balance: the report's bias controller (beside its sequence-wise loss of weight 1e-4), a sequence-wise loss, a
batch-wise one, and the classical one over softmax probabilities, each of weight 1e-3. Judged by loss on held-out text, by
MaxVio (largest load over mean, less 1) of every batch and of all held-out text, and by what an expert says of a token's domain.
Without `--workdir` the folder is runs/ablate_balance-PRESET. Results: experiments/RESULTS.md.
"""

from dsv3_jax.analysis.ablation import Claim
from dsv3_jax.config import Config
from dsv3_jax.settings import override
from experiments import _ablation

ARMS = {"loss-free": "sign", "sequence-wise": "sequence", "batch-wise": "batch", "classical": "classical"}
SAME = 0.0025  # nats: half of what the report finds between the sequence-wise loss and the others


def arms(base: Config) -> dict[str, Config]:
    return {name: override(base, {"controller": controller}) for name, controller in ARMS.items()}


CLAIMS = (
    Claim(
        text="a bias costs less than a sequence-wise loss", measure="loss", arm="loss-free", than="sequence-wise",
        expects="lower", report="2.253 beside 2.258 nats (1B), 2.080 beside 2.085 (3B), §4.5.3",
    ),
    Claim(
        text="a batch-wise loss costs less than a sequence-wise one", measure="loss", arm="batch-wise", than="sequence-wise",
        expects="lower", report="2.253 beside 2.258 nats (1B), 2.080 beside 2.085 (3B), §4.5.3",
    ),
    Claim(
        text=f"a bias costs what a batch-wise loss does, to {SAME} nats", measure="loss", arm="loss-free", than="batch-wise",
        expects="equal", within=SAME, report="2.253 and 2.253 nats (1B), 2.080 and 2.080 (3B), §4.5.3",
    ),
    Claim(
        text="a bias costs less than the classical loss", measure="loss", arm="loss-free", than="classical", expects="lower",
        report="0.724 beside 0.727 bits per byte (15.7B), 0.652 beside 0.656 (229B), Table 5",
    ),
    Claim(
        text="a bias balances all held-out text better than the classical loss", measure="max_vio_global", arm="loss-free",
        than="classical", expects="lower", report="MaxVio 0.04 beside 0.72 (1B), 0.04 beside 0.52 (3B), arXiv 2408.15664",
    ),
    Claim(
        text="experts specialise in domains more than with a sequence-wise loss", measure="domain_bits", arm="loss-free",
        than="sequence-wise", expects="higher", report="greater specialisation, Figure 9 (no number)",
    ),
)  # fmt: skip

ABLATION = _ablation.Ablation(
    name="balance",
    question="Does balancing by a bias cost less than balancing by a loss, and do experts specialise more?",
    arms=arms,
    claims=CLAIMS,
    base={"num_nextn_predict_layers": 0},  # not what is asked, and half of a small model's time
    shows=("max_vio", "max_vio_global", "domain_bits"),
)

if __name__ == "__main__":
    _ablation.run(ABLATION)
