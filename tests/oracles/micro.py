"""The smallest run that has every part: three domains, ramp, two micro-batches, MTP, EMA. A step takes milliseconds."""

from pathlib import Path

from dsv3_jax.config import Config
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from oracles.texts import VOCAB_SIZE, invented

STEPS = 6


def write_corpus(folder: Path) -> None:
    for domain in ("code", "prose", "verse"):
        (folder / domain).mkdir(parents=True)
        for seed in range(8):
            (folder / domain / f"{seed}.txt").write_text(invented(domain, seed), encoding="utf-8")


def micro_settings(folder: Path) -> dict[str, str]:
    """Settings over the preset `tiny`, with corpus and cache under `folder`."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    model = dict(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank="null", kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    train = dict(
        steps=STEPS, batch_size=4, batch_size_start=2, micro_batch_size=2, warmup_steps=2, checkpoint_every=2,
        bias_update_stop_tokens=11e12,  # about three quarters of the run
    )  # fmt: skip
    data = dict(corpus=f"{folder}/corpus/*/*.txt", cache_dir=folder / "cache", seq_len=16, eval_sequences=6)
    return {name: str(value) for name, value in {**model, **train, **data}.items()}


def micro_config(folder: Path, **settings: object) -> Config:
    return override(preset("tiny"), {**micro_settings(folder), **{name: str(value) for name, value in settings.items()}})


def set_flags(settings: dict[str, str]) -> list[str]:
    return [f"--set={name}={value}" for name, value in settings.items()]
