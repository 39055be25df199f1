"""One call opens a checkpoint: released folder, converted one, or a run's own; what comes back can score and generate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Fp8Recipe, ModelConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference import serving
from dsv3_jax.inference.score import InMemory, Scores, score
from dsv3_jax.inference.talk import Reply, Speaker, reply, speaker_of
from dsv3_jax.inference.text import folder_tokenizer, prompt_ids
from dsv3_jax.interop.read import Dtype, check_dtype, load_bias, load_parameters
from dsv3_jax.interop.source import Source, open_source
from dsv3_jax.parallel.collectives import Placement


@dataclass(frozen=True)
class Loaded:
    """A model in memory: its configuration, the parameter tree of `model_spec`, the router bias, and where they came from."""

    config: ModelConfig
    params: Any
    bias_LE: Float[Array, "L E"]
    source: Source

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """That of the folder, if there is one. Raises ValueError if it is damaged."""
        return folder_tokenizer(self.source.folder, self.config.vocab_size)

    @cached_property
    def speaker(self) -> Speaker:
        """The parameters once more, laid out for decoding. Raises ValueError without a tokenizer."""
        return speaker_of(self.source, serving.from_params(self.params, self.bias_LE, self.config))

    def score(self, tokens: Int[np.ndarray, "B T"] | Sequence[Sequence[int]]) -> Scores:
        """Logits, hidden states, MTP logits and router choices of every position. Raises ValueError for what is no token."""
        return score(InMemory(self.params, self.bias_LE, self.config), np.asarray(tokens))

    def generate(self, prompts: str | Sequence[str], *, max_new_tokens: int = 256, **how: Any) -> Reply:
        """Prompts continued: `texts`, `tokens`, `statistics`. `how`: `sampling`, `stop`, `speculative`, `show` of `reply`."""
        given = [prompts] if isinstance(prompts, str) else prompts
        ids = [prompt_ids(self.speaker.tokenizer, text) for text in given]
        return reply(self.speaker, ids, max_new_tokens=max_new_tokens, **how)


def load(
    folder: str | Path,
    *,
    dtype: Dtype = "float32",
    compute_dtype: str | None = None,
    keep_fp8: bool = False,
    fp8: Fp8Recipe | None = None,
    mtp: bool = True,
    average: bool = False,
    placement: Placement | None = None,
) -> Loaded:
    """Opens `folder`: a Hugging Face folder of the family, one that `convert` wrote, or a training run's.

    `dtype`: of the parameters: "float32", "bfloat16", or "stored", as the file has them; `keep_fp8` leaves FP8 weights as they
    are, with their scales, in any case. `compute_dtype`: of the activations; default float32, or bfloat16 with that `dtype`.
    With `fp8` (`fp8.precision.SERVING` is released code's) scoring rounds the inputs of linear layers too, and multiplies FP8
    weights as they are; generation does not. Without `mtp` the MTP modules are left out; `average` takes a run's averaged
    weights; with a `placement` each device reads its slice.

    Raises ValueError, one line with the file and the tensor, for a checkpoint that is damaged or of another architecture.
    """
    check_dtype(dtype)
    computed = compute_dtype or ("bfloat16" if dtype == "bfloat16" else "float32")
    source = open_source(folder, compute_dtype=computed, mtp=mtp, average=average)
    source = source._replace(config=replace(source.config, fp8=fp8))
    params = load_parameters(source.tensors, source.config, dtype, keep_fp8=keep_fp8, placement=placement)
    bias = load_bias(source.tensors, source.config, placement)
    return Loaded(source.config, params, bias, source)
