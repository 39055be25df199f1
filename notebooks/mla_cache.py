# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does MLA's latent keep?
#
# Bytes of the cache beside those of other attention, spectra of the latent and of the matrices that read it, the two parts of
# attention's logits, and what a model loses when the latent has fewer directions. Sections are those of the report (arXiv
# 2412.19437).
#
# Without a checkpoint the cells take a small model of random weights: it shows what the figures look like, and what a latent
# is that has learnt nothing (all directions nearly alike, a loss of about the logarithm of the vocabulary). For a model of
# yours:
#
#     DSV3_CHECKPOINT=DIR DSV3_TOKENS=tokens.npy jupyter lab notebooks/mla_cache.ipynb
#
# `DIR` is a released folder, a converted one, or a run's; one layer at a time is in memory, so that a model may be larger than
# that. `tokens.npy`, integers [sequences, tokens], may be left out: a short text is then read with the folder's tokenizer.

# %%
# %matplotlib inline
import dataclasses
import inspect
import os
from pathlib import Path

import numpy as np

from dsv3_jax.analysis import latent, latent_figures, routing_figures
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.fp8.formats import E4M3, E5M6
from dsv3_jax.fp8.quantize import Quantiser
from dsv3_jax.inference.attention import cache_width
from dsv3_jax.inference.score import InMemory, Streamed, mapped_array
from dsv3_jax.inference.text import folder_tokenizer, prompt_ids
from dsv3_jax.interop.source import open_source
from dsv3_jax.model.module import init_variables
from dsv3_jax.presets import preset

CHECKPOINT = os.environ.get("DSV3_CHECKPOINT")  # a folder that holds a model
TOKENS = os.environ.get("DSV3_TOKENS")  # an .npy of token ids [sequences, tokens]; None: a short text
SEQUENCES = 8  # the first half gives the directions, the second the errors
LENGTH = None  # tokens of each; None: 8 for each channel of the latent, so that its spectrum is the text's, not chance's
RANKS = None  # directions kept, such as (64, 128, 256); None: powers of two, three quarters, all
LAYERS = None  # numbers of the layers that get a line or panel of their own; None: first, middle and last

# %%
pages = [inspect.getdoc(getattr(np.linalg, name)) or "" for name in sorted(np.linalg.__all__)]
pages += [inspect.getdoc(getattr(np.random, name)) or "" for name in sorted(np.random.__all__)]

if CHECKPOINT:
    source = open_source(CHECKPOINT, mtp=False)
    config, tokenizer = source.config, folder_tokenizer(source.folder, source.config.vocab_size)
    supply = Streamed(source.tensors, config, "float32")
else:
    config = dataclasses.replace(preset("tiny").model, num_nextn_predict_layers=0)
    variables, tokenizer = init_variables(config), train_tokenizer(pages, config.vocab_size)
    supply = InMemory(variables.params, variables.bias_LE, config)

length = LENGTH or 8 * config.kv_lora_rank
if TOKENS:
    every = mapped_array(Path(TOKENS), "DSV3_TOKENS")
    if every.ndim != 2:
        raise ValueError(f"DSV3_TOKENS: {TOKENS}: expected integers [sequences, tokens], got {every.dtype} {list(every.shape)}")
    tokens, text = np.asarray(every[:SEQUENCES, :length]), "given"
elif tokenizer:
    ids = np.concatenate([prompt_ids(tokenizer, page) for page in pages])
    count = min(SEQUENCES, len(ids) // length)
    tokens, text = ids[: count * length].reshape(count, length), "help texts of numpy"
else:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (SEQUENCES, length))
    text = "random tokens, for want of a tokenizer: read nothing into the loss"

names = [str(i) for i in range(config.num_hidden_layers)]
shown = list(LAYERS) if LAYERS else routing_figures.spread(len(names), 3)
shown_names = [names[i] for i in shown]
print(f"model: {CHECKPOINT or 'tiny, random weights'}; text: {text}, {tokens.shape[0]} sequences of {tokens.shape[1]} tokens")
print(f"a token's row of the cache: {cache_width(config)} numbers, {config.kv_lora_rank} of latent, the rest rotary key")

# %% [markdown]
# ## Bytes of a token (§2.1.1)
#
# All layers of DeepSeek-V3, or of attention of its head sizes with keys and values for every head (MHA), for 8 (GQA) and for
# one (MQA). In BF16 MLA's 70 kB are 57 times fewer than MHA's, and what a GQA of 2.25 heads would take; `numpy` says the same
# from the shapes. FP8 has a scale for each 128 channels (§3.3.2), E5M6 is the 12-bit format of §3.3.3, with power-of-two
# scales. This package caches in BF16 or FP32; the narrow formats are sizes that one would have.

# %%
FORMS = {"BF16": None, "E5M6": Quantiser(E5M6, power_of_two=True), "FP8 (E4M3)": Quantiser(E4M3)}


def sizes(model):
    """Bytes of a token by scheme and format."""
    heads = {"MLA": "mla", "MQA": "mqa", f"GQA, {latent.gqa_groups(model)} heads": "gqa"}
    heads |= {f"MHA, {model.num_attention_heads} heads": "mha"}
    return {
        name: {form: latent.cache_bytes(model, scheme, how) for form, how in FORMS.items()} for name, scheme in heads.items()
    }


released = preset("deepseek_v3_671b").model
v3 = sizes(released)
rows = [
    (name, *(f"{size:,.0f}" for size in row.values()), f"{row['BF16'] / v3['MLA']['BF16']:.2f}") for name, row in v3.items()
]
print(routing_figures.table(("bytes of a token", *FORMS, "BF16 over MLA's"), rows))
print("numpy:", np.array([512 + 64, 2 * 128, 2 * 8 * 128, 2 * 128 * 128]) * 61 * 2)

# %%
latent_figures.cache_bars(v3, "Cache of a token at DeepSeek-V3's shape, 61 layers")

# %% [markdown]
# What that is of a long text: of a sequence of 128K tokens MLA keeps 8.6 GiB in BF16, MHA would keep 488.

# %%
contexts = [2**i for i in range(10, 18)]
latent_figures.cache_by_context(
    {f"{scheme}, BF16": row["BF16"] for scheme, row in v3.items()} | {"MLA, FP8": v3["MLA"]["FP8 (E4M3)"]},
    contexts,
    "Cache of one sequence at DeepSeek-V3's shape",
)

# %% [markdown]
# The same at the shape of the model above.

# %%
latent_figures.cache_bars(sizes(config), f"Cache of a token at this model's shape, {config.num_hidden_layers} layers")

# %% [markdown]
# ## The study
#
# One pass over the layers. Principal directions of a layer's latents (after their norm, as the cache has them) come from the
# first half of the sequences; errors and losses are of the second half, which they were not fitted to.

# %%
study = latent.study(supply, tokens, RANKS)
n_latents = tokens.shape[0] // 2 * tokens.shape[1]
print(f"{n_latents:,} latents a layer, of {config.kv_lora_rank} channels")

# %% [markdown]
# ## The absorbed form equals the expanded one (§2.1.1)
#
# Decoding never makes a key: it multiplies queries by W^UK, attends to the latents themselves, and applies W^UV to their sum.
# The relative difference to attention with keys and values of all heads, of what attention adds to the residual stream, is
# rounding: about 1e-7 in FP32.

# %%
for name, difference in zip(names, study.absorbed_L, strict=True):
    print(f"layer {name}: {difference:.1e}")

# %% [markdown]
# ## Spectra
#
# The effective rank is the exponential of the entropy of the singular values; beside it, how many directions have 90 and 99 %
# of the energy, the sum of squares. Small numbers in the latents' columns say that a text uses few of the latent's directions;
# in those of kv_b_proj, that keys and values read few of them. A head's matrix has at most the rank of its own channels.

# %%
print(latent_figures.rank_table(study, names))

# %%
latent_figures.ranks_by_layer(study, names)

# %%
latent_figures.latent_energy(study.latent_LC[shown], shown_names)

# %%
latent_figures.weight_spectra([study.weights[i] for i in shown], shown_names)

# %% [markdown]
# ## Content and position in the logits (§2.1.1, eqs. 10-11)
#
# A logit is a content product, from the latent, plus a rotary one, from the key that all heads share. Each cell is the content
# part's share of the two variances, over the keys that a query sees: near 100 the head looks for what a token is, near 0 for
# where it stands. (The rotary part knows content as well, as its key comes from the token; and the parts may be correlated, so
# the variance of their sum, in the table, need not be the sum of theirs.)

# %%
rows = []
for name, parts in zip(names, study.logits_L, strict=True):
    content, rotary, both = (float(np.mean(part)) for part in parts)
    rows.append((name, f"{content:.3g}", f"{rotary:.3g}", f"{both:.3g}", f"{100 * content / (content + rotary):.0f} %"))
print(routing_figures.table(("layer", "content", "rotary", "logit", "content's share"), rows))

# %%
latent_figures.logit_shares(study, names)

# %% [markdown]
# ## What is lost with fewer directions
#
# The latent projected on its r leading principal directions; the rotary key stays. On the left one layer by itself: errors of
# keys, values and attention's output, beside what they would be if no direction counted more than another. On the right the
# whole model with every layer truncated, not trained further. Where the loss leaves the dashed line is how much of the latent
# the model needs on this text; bars are the standard error of the difference, tokens taken as independent. Directions are
# those of most energy, which need not be those that matter most.

# %%
print(latent_figures.truncation_table(study))
print(f"whole: {study.nll_N.mean():.4f} nats per token")

# %%
latent_figures.truncation(study)
