"""A short text of three domains, and traces of it by random weights: what notebooks show where they are given no trace."""

import inspect
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.arithmetic import arithmetic_documents
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.model.module import Variables, init_variables
from dsv3_jax.tracing import capture
from dsv3_jax.tracing.store import RoutingTrace, Text, Writer, about_model, open_trace
from dsv3_jax.tracing.text import data_of, read_text

CHARACTERS, WINDOW, BATCH_TOKENS = 600, 128, 4096  # of a document; tokens of a window, and of a pass


def short_text(vocab_size: int, documents: int = 12) -> tuple[Text, Tokenizer]:
    """The beginnings of so many documents of each of three domains that every installation has, in windows of WINDOW tokens;
    and a tokenizer made of them."""
    pages = [inspect.getdoc(getattr(np.linalg, name)) or "" for name in sorted(np.linalg.__all__)]
    sources = [path.read_text(encoding="utf-8")[1000:] for path in sorted(Path(os.__file__).parent.glob("*.py"))[::8]]
    drawn = {"arithmetic": list(arithmetic_documents(50_000)), "english": pages, "python": sources}
    texts = {
        domain: [text[:CHARACTERS] for text in every if len(text) >= CHARACTERS][:documents] for domain, every in drawn.items()
    }
    tokenizer = train_tokenizer([text for of_domain in texts.values() for text in of_domain], vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        for domain, of_domain in texts.items():
            (Path(folder) / domain).mkdir()
            for i, text in enumerate(of_domain):
                (Path(folder) / domain / f"{i}.txt").write_text(text, encoding="utf-8")
        return _whole_windows(read_text(data_of(f"{folder}/*/*.txt", WINDOW), tokenizer, None)), tokenizer


def _whole_windows(text: Text) -> Text:
    """Those of WINDOW tokens: a pass is compiled once for each length, which is most of a small trace's time."""
    whole = text.lengths == WINDOW
    tokens_N, starts = text.tokens_N[np.repeat(whole, text.lengths)], np.arange(whole.sum() + 1) * WINDOW
    return Text(tokens_N, starts, text.document_of[whole], text.domain_of[whole], text.domains)


def random_traces(
    configs: Mapping[str, ModelConfig], documents: int = 12, *, scores: bool = False
) -> tuple[dict[str, RoutingTrace], Tokenizer]:
    """By name, of configurations that differ in how numbers are computed (`compute_dtype`, `param_dtype`, `fp8`): the same
    random weights over the same short text, with all affinities where `scores` says so; and the text's tokenizer."""
    first = next(iter(configs.values()))
    text, tokenizer = short_text(first.vocab_size, documents)
    variables = init_variables(first)
    return {name: _trace(config, variables, text, scores) for name, config in configs.items()}, tokenizer


def _trace(config: ModelConfig, variables: Variables, text: Text, scores: bool) -> RoutingTrace:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.param_dtype)), variables.params)
    how = {"dtype": config.compute_dtype, "fp8": config.fp8 is not None}
    about = about_model(
        config, model="random weights", tokenizer=None, domains=text.domains, source="three small domains",
        batch_tokens=BATCH_TOKENS, how=how,
    )  # fmt: skip
    groups = config.n_group if capture.has_groups(config) else 0
    tracer = capture.Whole(params, variables.bias_LE, config, scores)
    with tempfile.TemporaryDirectory() as folder:  # open maps outlive their files
        path = Path(folder) / "trace"
        capture.trace(tracer, text, Writer(path, about, text, groups, scores), BATCH_TOKENS)
        return open_trace(path)
