"""A small configuration, and the description of traces of it."""

from dataclasses import replace

from dsv3_jax.config import ModelConfig
from dsv3_jax.tracing.store import about_model

CONFIG = ModelConfig(
    num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=2, n_group=4, topk_group=2,
    num_nextn_predict_layers=1,
)  # fmt: skip


def about(**changes):
    fields = {"model": "m", "tokenizer": None, "domains": (), "source": "test", "batch_tokens": 8, "how": {}}
    return about_model(replace(CONFIG, **changes), **fields)
