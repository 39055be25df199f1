"""Is MLA as good as attention that keeps more, at equal parameters [§2.1.1; DeepSeek-V2, appendix D]?

    python -m experiments.ablate_attention --preset=tiny --seeds=5 --set=steps=1000 [--budget=minutes] [--resume]

MLA beside MHA, GQA of half as many key/value heads and MQA, with the same heads. The dense layers' feed-forward networks are
widened until every model has as many parameters as the largest, in all and for a token, to half a channel; MTP, whose block has
attention but nothing to widen, is left out. Cache bytes are those of BF16, rotary channels included.
Without `--workdir` the folder is runs/ablate_attention-PRESET. Results: experiments/RESULTS.md.
"""

from pathlib import Path

from dsv3_jax.analysis.ablation import Claim
from dsv3_jax.config import Config
from dsv3_jax.model.count import count_parameters
from dsv3_jax.planner.parameters import cache_bytes_per_token
from dsv3_jax.settings import override
from experiments import _ablation


def arms(base: Config) -> dict[str, Config]:
    """Raises ValueError without a dense layer to widen."""
    dense, heads = base.model.first_k_dense_replace, base.model.num_attention_heads
    if not dense:
        raise ValueError("first_k_dense_replace: expected at least 1, a layer to widen, got 0")
    names = {"mla": {}, "mha": {}, "gqa": {"num_key_value_heads": max(1, heads // 2)}, "mqa": {}}
    plain = {
        name: override(base, {"attention": name, "num_nextn_predict_layers": 0, **others}) for name, others in names.items()
    }
    sizes = {name: count_parameters(config.model).total for name, config in plain.items()}
    channel = 3 * base.model.hidden_size * dense  # parameters of one channel: gate, up and down

    def widened(name: str) -> Config:
        more = round((max(sizes.values()) - sizes[name]) / channel)
        return override(plain[name], {"intermediate_size": plain[name].model.intermediate_size + more})

    return {name: widened(name) for name in plain}


def cache(folder: Path, config: Config) -> dict[str, float]:
    return {"cache_bytes": float(cache_bytes_per_token(config.model))}


MHA = "small MoE 15.6K cached numbers a token beside 110.6K, MMLU 50.0 beside 48.7; DeepSeek-V2, appendix D"
CLAIMS = tuple(
    Claim(
        text=f"MLA's loss is lower than {other.upper()}'s at equal parameters", measure="loss", arm="mla", than=other,
        expects="lower", report=MHA if other == "mha" else "no figure in this report; DeepSeek-V2 compares 7B models by tasks",
    )
    for other in ("mha", "gqa", "mqa")
)  # fmt: skip

ABLATION = _ablation.Ablation(
    name="attention",
    question="Is MLA as good as attention that keeps more, at equal parameters?",
    arms=arms,
    claims=CLAIMS,
    titles={"cache_bytes": "cache, bytes a token in BF16"},
    observe=cache,
)

if __name__ == "__main__":
    _ablation.run(ABLATION)
