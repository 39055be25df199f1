"""The model under evaluation: opened once, read when it is first needed, as scoring or as generation wants it."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.config import DataConfig
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference import serving
from dsv3_jax.inference.score import InMemory, Streamed, Supply
from dsv3_jax.inference.talk import Speaker, open_speaker, speaker_of
from dsv3_jax.inference.text import folder_tokenizer
from dsv3_jax.interop.digest import model_digest
from dsv3_jax.interop.read import Dtype, load_bias, load_parameters
from dsv3_jax.interop.run_folder import RunFolder, is_run
from dsv3_jax.interop.source import Source, open_source


@dataclass(frozen=True)
class Subject:
    """`window`: tokens that the model reads at most. MTP modules are left out."""

    source: Source
    tokenizer: Tokenizer
    window: int
    dtype: Dtype
    stream_layers: bool

    @cached_property
    def supply(self) -> Supply:
        """For scoring."""
        if self.stream_layers:
            return Streamed(self.source.tensors, self.source.config, self.dtype)
        params, bias = self._parameters
        return InMemory(params, bias, self.source.config)

    @cached_property
    def speaker(self) -> Speaker:
        """For generation. Raises ValueError for a model that is streamed: it would be read once a token."""
        if self.stream_layers:
            raise ValueError("--stream_layers: expected only tasks that score, got one that generates; leave it out")
        if "_parameters" in self.__dict__:
            params, bias = self._parameters
            return speaker_of(self.source, serving.from_params(params, bias, self.source.config))
        return open_speaker(self.source, self.dtype)

    @cached_property
    def _parameters(self) -> tuple[Any, Any]:
        tensors, config = self.source.tensors, self.source.config
        return load_parameters(tensors, config, self.dtype), load_bias(tensors, config)

    @property
    def run_data(self) -> DataConfig | None:
        """What a training run read; None of other folders."""
        run = _run_folder(self.source)
        return None if run is None else run.run.data

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of tokenizer.json."""
        return hashlib.sha256((self.source.folder / "tokenizer.json").read_bytes()).hexdigest()

    def about(self) -> dict[str, Any]:
        """JSON-able: which model this is, whatever it is asked."""
        return {
            "model": model_digest(self.source.tensors),
            "tokenizer": self.tokenizer_hash,
            "dtype": self.dtype,
            "window": self.window,
            "jax": jax.__version__,
        }


def open_subject(
    folder: str | Path,
    *,
    dtype: Dtype = "float32",
    average: bool = False,
    window: int | None = None,
    stream_layers: bool = False,
) -> Subject:
    """Opens a checkpoint with its tokenizer; reads no weight.

    `window`, default: the length that a training run trained on, else `max_position_embeddings`. Raises ValueError for what is
    no checkpoint, one without a tokenizer, and a window that the model has no positions for.
    """
    source = open_source(folder, compute_dtype=dtype, mtp=False, average=average)
    tokenizer = folder_tokenizer(source.folder, source.config.vocab_size)
    if tokenizer is None:
        raise ValueError(f"--checkpoint: {folder} has no tokenizer.json; copy the model's there to evaluate it on text")
    most, run = source.config.max_position_embeddings, _run_folder(source)
    if window is None:
        window = most if run is None else min(most, run.run.data.seq_len)
    if not 2 <= window <= most:
        raise ValueError(f"--window: expected 2..{most}, the model's max_position_embeddings, got {window}")
    return Subject(source, tokenizer, window, dtype, stream_layers)


def _run_folder(source: Source) -> RunFolder | None:
    """Beneath what leaves the MTP modules out."""
    return RunFolder(source.folder) if is_run(source.folder) else None
