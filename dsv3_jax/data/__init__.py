"""Corpus, tokenizer, packing and batches [§4.1]."""

from dsv3_jax.data.pipeline import Data, build_data

__all__ = ["Data", "build_data"]
