"""Does predicting a second token help to predict the first, and how many drafts are accepted [§2.2, §4.5.1, §5.4.3]?

    python -m experiments.ablate_mtp --preset=tiny --seeds=5 --set=steps=1000 [--budget=minutes] [--resume]

The same model with an MTP module and without, for the same number of steps; held-out text is read by the main model alone.
The module then drafts: 16 held-out documents of each domain are continued greedily, 64 tokens behind 32.
Without `--workdir` the folder is runs/ablate_mtp-PRESET. Results: experiments/RESULTS.md.
"""

from pathlib import Path

import numpy as np

from dsv3_jax.analysis.ablation import Claim
from dsv3_jax.config import Config
from dsv3_jax.data.pipeline import build_data
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.loaded import load
from dsv3_jax.settings import override
from experiments import _ablation

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64
SAME = 0.002  # bits per byte: the report's two models differ by 0.000 and 0.001


def arms(base: Config) -> dict[str, Config]:
    """Raises ValueError for a base without MTP."""
    depth = base.model.num_nextn_predict_layers
    if not depth:
        raise ValueError("num_nextn_predict_layers: expected at least 1, got 0; add --set=num_nextn_predict_layers=1")
    return {f"mtp {n}" if n else "without": override(base, {"num_nextn_predict_layers": n}) for n in (0, depth)}


def acceptance(folder: Path, config: Config) -> dict[str, float]:
    """Share of drafts that the main model accepts, of each domain and of all; nothing of a model that does not draft."""
    if not config.model.num_nextn_predict_layers:
        return {}
    data, speaker = build_data(config.data, config.model.vocab_size), load(folder).speaker
    prompts: dict[int, list[list[int]]] = {number: [] for number in range(len(data.domains))}
    for batch in data.eval_batches(1):
        domain, tokens = int(batch["domain_ids"][0, 0, 0]), np.asarray(batch["tokens"][0, 0, :PROMPT_TOKENS])
        if len(prompts[domain]) < PROMPTS and (batch["segment_ids"][0, 0, :PROMPT_TOKENS] != 0).all():
            prompts[domain].append(tokens.tolist())
    found, drafts, accepted = {}, 0, 0
    for number, name in enumerate(data.domains):
        if prompts[number]:
            s = generate(
                speaker.model, speaker.config, prompts[number], max_new_tokens=NEW_TOKENS, end_ids=(), speculative=True
            ).statistics
            found[f"acceptance, {name}"] = s.acceptance
            drafts, accepted = drafts + s.drafts, accepted + s.accepted
    return {"acceptance": accepted / max(1, drafts), **found}


CLAIMS = (
    Claim(
        text=f"with an MTP module the main model's bits per byte are the same, to {SAME}", measure="bits_per_byte", arm="mtp 1",
        than="without", expects="equal", within=SAME, report="0.729 and 0.729 (15.7B), 0.657 and 0.658 (229B), Table 4",
    ),
    Claim(
        text="with an MTP module the main model's loss is lower", measure="loss", arm="mtp 1", than="without", expects="lower",
        report="no figure; most tasks improve, HumanEval 20.7 to 26.8 (15.7B), 44.5 to 53.7 (229B), Table 4",
    ),
    Claim(
        text="85 to 90 % of the drafts are accepted", measure="acceptance", arm="mtp 1", expects="equal", value=0.875,
        within=0.025, report="85 to 90 % on various topics, §5.4.3",
    ),
)  # fmt: skip

ABLATION = _ablation.Ablation(
    name="mtp",
    question="Does predicting a second token help to predict the first, and how many drafts are accepted?",
    arms=arms,
    claims=CLAIMS,
    shows=("bits_per_byte",),
    observe=acceptance,
)

if __name__ == "__main__":
    _ablation.run(ABLATION)
