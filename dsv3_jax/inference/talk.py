"""Text in, text out: prompts continued by a model laid out for decoding, shown while it comes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference import deploy, serving
from dsv3_jax.inference.decode import last_logits
from dsv3_jax.inference.generate import Statistics, generate
from dsv3_jax.inference.mesh import ServingPlacement
from dsv3_jax.inference.placement import fullest_over_mean, slot_rows_by_device
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.inference.serving import Serving, error_of
from dsv3_jax.inference.sharded import placement_of
from dsv3_jax.inference.text import TextStream, folder_tokenizer
from dsv3_jax.interop.read import Dtype
from dsv3_jax.interop.source import Source
from dsv3_jax.weights import n_bytes

Show = Callable[[int, str], None]  # (prompt's number, new text): whole characters, nothing of a stop string


@dataclasses.dataclass(frozen=True)
class Speaker:
    """All that continuing a text takes. `end_ids` end a sequence."""

    model: Serving
    config: ModelConfig
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]


class Reply(NamedTuple):
    texts: list[str]
    tokens: list[list[int]]
    statistics: Statistics
    device_rows_LP: Int[np.ndarray, "L P"] | None = None  # on a mesh: (token, expert) pairs of each MoE layer and device


def open_speaker(source: Source, dtype: Dtype, placement: ServingPlacement | None = None) -> Speaker:
    """Reads the model of an opened checkpoint, laid out for decoding, on a mesh if one is given.

    Raises ValueError if it comes without a tokenizer.
    """
    _tokenizer_of(source)  # what is missing is said before minutes of reading
    if placement is not None:
        model = deploy.read(source.tensors, source.config, dtype, placement)
    else:
        model = serving.read(source.tensors, source.config, dtype)
    return speaker_of(source, model)


def speaker_of(source: Source, model: Serving) -> Speaker:
    """A model that is laid out already. Raises ValueError if the checkpoint comes without a tokenizer."""
    tokenizer = _tokenizer_of(source)
    return Speaker(model, source.config, tokenizer, end_ids(tokenizer, source.config_json))


def _tokenizer_of(source: Source) -> Tokenizer:
    tokenizer = folder_tokenizer(source.folder, source.config.vocab_size)
    if tokenizer is None:
        raise ValueError(f"{source.folder}: has no tokenizer.json; copy the model's there to generate text")
    return tokenizer


def end_ids(tokenizer: Tokenizer, config_json: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The tokenizer's end token, and those that config.json names: a number or a list."""
    named = (config_json or {}).get("eos_token_id")
    more: Iterable[Any] = named if isinstance(named, list) else [named]
    return tuple(sorted({tokenizer.eos, *(n for n in more if type(n) is int)}))


def in_few_bits(speaker: Speaker, bits: serving.Bits) -> Speaker:
    """The same with its matrices in int8 or int4."""
    return dataclasses.replace(speaker, model=serving.quantised(speaker.model, bits))


def cost_of_bits(few: Speaker, exact: Speaker, prompts: Sequence[Sequence[int]]) -> str:
    """One line: the bytes of both, and how far the logits after the prompts are off."""
    small, large = (n_bytes((s.model.lm_head, s.model.layers, s.model.depths)) for s in (few, exact))
    error = error_of(*(last_logits(s.model, s.config, prompts) for s in (few, exact)))
    return (
        f"{small / 1e6:,.1f} MB of weights instead of {large / 1e6:,.1f}; logits off by {error.rms:.2%} (root mean square), "
        f"by {error.largest:.3g} at most"
    )


def reply(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    speculative: bool = False,
    show: Show = lambda number, text: None,
) -> Reply:
    """Continues prompts of token ids as text, each until an end token, a stop string or `max_new_tokens`.

    Raises ValueError as `generate` does, and for an empty stop string.
    """
    streams = [TextStream(speaker.tokenizer.token_bytes, stop) for _ in prompts]
    texts = [""] * len(prompts)

    def say(number: int, text: str) -> None:
        if text:
            texts[number] += text
            show(number, text)

    def hear(number: int, tokens: list[int]) -> bool:
        for token in tokens:
            if token not in speaker.end_ids:  # config.json may name one that stands for text
                say(number, streams[number].push(token))
        return streams[number].stopped

    result = generate(
        speaker.model, speaker.config, prompts, max_new_tokens=max_new_tokens, sampling=sampling, end_ids=speaker.end_ids,
        speculative=speculative, on_tokens=hear,
    )  # fmt: skip
    for number, stream in enumerate(streams):
        say(number, stream.finish())
    placement, rows = placement_of(speaker.model), None
    if placement is not None and result.count_LR is not None:
        rows = slot_rows_by_device(result.count_LR, placement.expert_ranks)
    return Reply(texts, result.tokens, result.statistics, rows)


def summary(statistics: Statistics, device_rows_LP: Int[np.ndarray, "L P"] | None = None) -> str:
    """One line on how fast it went, how well the drafts did, and how even the experts' load on a mesh was."""
    s = statistics
    line = f"{s.prompt_tokens} tokens in {s.prefill_seconds:.2f} s, {s.new_tokens} new ones"
    if s.timed_tokens:
        line += f", {s.tokens_per_second:,.0f} tokens/s"
    if s.drafts:
        line += f"; {s.acceptance:.0%} of the drafts accepted, {s.tokens_per_step:.2f} tokens a step"
    if s.close:
        line += f"; {s.close} chosen by less than 1e-4 of a logit"
    if device_rows_LP is not None and device_rows_LP.any():
        share = np.nanmean(fullest_over_mean(device_rows_LP))
        line += f"; the fullest of {device_rows_LP.shape[1]} devices had {share:.2f} times the mean of the experts' rows"
    return line
