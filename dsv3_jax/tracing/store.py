"""A routing trace on disk: for every token of a text, in every MoE layer, experts, gates and margin; read through memory maps.

A folder of .npy files and `trace.json`, which says of what model and text they are. It is written beside its place, batch by
batch, and renamed when it is whole; what an interrupted run has written is continued.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.source import NUMERICS
from dsv3_jax.training.journal import write_json

FORMAT, VERSION = "dsv3_jax.routing_trace", 1
ABOUT, PROGRESS = "trace.json", "progress.json"
# Fields of a config that say how numbers are computed, not which model it is: precisions of one model are compared.
HOW = (*NUMERICS, "compute_dtype", "param_dtype")


class Text(NamedTuple):
    """Sequences of tokens one after the other; each is (a part of) one document, and positions begin at 0 in each."""

    tokens_N: Int[np.ndarray, " N"]
    starts: Int[np.ndarray, " sequences_and_one"]
    document_of: Int[np.ndarray, " sequences"]
    domain_of: Int[np.ndarray, " sequences"]
    domains: tuple[str, ...]

    def sequence(self, i: int | np.integer) -> slice:
        """Where sequence i lies among the tokens."""
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    @property
    def lengths(self) -> Int[np.ndarray, " sequences"]:
        return np.diff(self.starts)


class Choices(NamedTuple):
    """What the routers of L layers decided for N tokens. E, one more than there are experts, stands for none."""

    experts_NLK: Int[np.ndarray, "N L K"]  # by descending biased score, ties to the lower id
    gates_NLK: Float[np.ndarray, "N L K"]
    margins_NL: Float[np.ndarray, "N L"]  # biased score of the last expert chosen minus that of the first one left out
    groups_NL: Int[np.ndarray, "N L"] | None  # bit g: group g was kept; None where groups are not limited
    scores_NLE: Float[np.ndarray, "N L E"] | None  # affinities without bias, where they were asked for


@dataclass(frozen=True)
class About:
    """What `trace.json` holds."""

    config: Mapping[str, Any]  # of the model, as `ModelConfig` has it
    model: str  # digest of all tensors, `interop.digest`
    tokenizer: str | None  # digest of tokenizer.json
    layers: tuple[str, ...]  # of L: "3" is the main model's layer 3, "mtp 1" the first MTP module
    n_experts: int
    top_k: int
    domains: tuple[str, ...]
    source: str  # where the text is from
    batch_tokens: int  # of one pass, by which the sequences are divided (`batches`)
    how: Mapping[str, Any]  # dtype, layout and what else decides the last bits

    @cached_property
    def architecture(self) -> str:
        """Digest of the config, but for how numbers are computed."""
        kept = {name: value for name, value in self.config.items() if name not in HOW}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class RoutingTrace:
    """Arrays may be memory maps."""

    about: About
    text: Text
    choices: Choices

    @property
    def n_tokens(self) -> int:
        return len(self.text.tokens_N)

    def of_tokens(self, per_sequence: Shaped[np.ndarray, " sequences"]) -> Shaped[np.ndarray, " N"]:
        """A value of each sequence, such as its domain, for each of its tokens."""
        return np.repeat(per_sequence, self.text.lengths)

    def layer(self, name: str) -> int:
        """The row of a layer. Raises ValueError for one that the trace does not have."""
        if name not in self.about.layers:
            raise ValueError(f"layer: expected one of {', '.join(self.about.layers)}, got {name!r}")
        return self.about.layers.index(name)


def layer_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the layers that have a router, in the order of a trace."""
    main = range(config.first_k_dense_replace, config.num_hidden_layers)
    return (*map(str, main), *(f"mtp {depth}" for depth in range(1, config.num_nextn_predict_layers + 1)))


def about_model(config: ModelConfig, **others: Any) -> About:
    described = json.loads(json.dumps(dataclasses.asdict(config)))
    names = layer_names(config)
    return About(described, layers=names, n_experts=config.n_routed_experts, top_k=config.num_experts_per_tok, **others)


def expert_dtype(n_experts: int) -> np.dtype:
    """The smallest that holds the ids and the one that stands for none."""
    return np.min_scalar_type(n_experts)


def kinds(about: About, text: Text, groups: int, scores: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each file of choices. `groups`: their number; 0: they are not limited."""
    n, n_layers = len(text.tokens_N), len(about.layers)
    half = np.dtype(np.float16)
    found = {
        "experts": ((n, n_layers, about.top_k), expert_dtype(about.n_experts)),
        "gates": ((n, n_layers, about.top_k), half),
        "margins": ((n, n_layers), half),
    }
    if groups:
        found["groups"] = (n, n_layers), np.min_scalar_type(2**groups - 1)
    if scores:
        found["scores"] = (n, n_layers, about.n_experts), half
    return found


FILES = "experts", "gates", "margins", "groups", "scores"  # of `Choices`, in its order
TEXT = {"tokens": np.int32, "starts": np.int64, "document_of": np.int32, "domain_of": np.int32}


class Writer:
    """Fills a trace batch by batch; `done` batches are there already, of a run that was interrupted.

    Raises ValueError if `folder` exists, or if what was begun there is another trace; OSError where the disk is too small.
    """

    def __init__(self, folder: Path, about: About, text: Text, groups: int = 0, scores: bool = False) -> None:
        if folder.exists():
            raise ValueError(f"--out: {folder} exists; name another folder, or remove it")
        self._folder, self._beside = folder, folder.with_name(folder.name + ".part")
        self._files = kinds(about, text, groups, scores)
        described = _described(about, groups, scores, text)
        if self._beside.exists():
            begun = _read_json(self._beside / ABOUT)
            if begun != described:
                raise ValueError(f"--out: {self._beside} was begun with another model, text or flags; remove it or use those")
        else:
            self._begin(described, text)
        self.done = _read_json(self._beside / PROGRESS)["batches"]
        self._maps = {name: np.load(self._beside / f"{name}.npy", mmap_mode="r+") for name in self._files}

    def _begin(self, described: Mapping[str, Any], text: Text) -> None:
        making = self._beside.with_name(self._beside.name + ".new")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for name, (shape, dtype) in self._files.items():
            path = making / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a disk that is full is found now, and not by a signal in the middle
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        for (name, kind), values in zip(TEXT.items(), text[:4], strict=True):
            np.save(making / f"{name}.npy", np.asarray(values, kind))
        write_json(making / ABOUT, described)
        write_json(making / PROGRESS, {"batches": 0})
        making.rename(self._beside)

    def write(self, places: Sequence[slice], found: Sequence[Choices]) -> None:
        """The choices of one batch's sequences, and where their tokens lie."""
        for place, choices in zip(places, found, strict=True):
            values = dict(zip(FILES, choices, strict=True))
            for name, out in self._maps.items():
                out[place] = values[name]
        for out in self._maps.values():
            out.flush()
        self.done += 1
        write_json(self._beside / PROGRESS, {"batches": self.done})

    def finish(self) -> None:
        self._maps.clear()
        (self._beside / PROGRESS).unlink()
        self._beside.rename(self._folder)


def _described(about: About, groups: int, scores: bool, text: Text) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(text.tokens_N, np.int32).tobytes()).hexdigest()
    head = {"format": FORMAT, "version": VERSION, "n_tokens": len(text.tokens_N), "tokens": digest}
    more = {"config_digest": about.architecture, "groups": groups, "scores": scores}
    return json.loads(json.dumps(head | dataclasses.asdict(about) | more))


def open_trace(folder: str | Path) -> RoutingTrace:
    """Raises ValueError, one line with the file, for what is no trace, not whole, or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a routing trace, got {'a file' if folder.exists() else 'nothing'}")
    said = _read_json(folder / ABOUT)
    if said.get("format") != FORMAT or said.get("version") != VERSION:
        got = f"format {said.get('format')!r}, version {said.get('version')!r}"
        raise ValueError(f"{folder / ABOUT}: expected format {FORMAT!r}, version {VERSION}, got {got}")
    try:
        about = About(**{field.name: _frozen(said[field.name]) for field in dataclasses.fields(About)})
        n, groups, scores, domains = said["n_tokens"], said["groups"], said["scores"], tuple(said["domains"])
    except KeyError as missing:
        raise ValueError(f"{folder / ABOUT}: expected a field {missing}, got none") from None
    tokens, starts, document_of, domain_of = (_array(folder / f"{name}.npy", np.dtype(kind)) for name, kind in TEXT.items())
    text = Text(tokens, starts, document_of, domain_of, domains)
    if len(text.tokens_N) != n or not _in_order(text):
        raise ValueError(f"{folder}: expected sequences of {n} tokens in all, got {len(text.tokens_N)} and other bounds")
    found: dict[str, Any] = {}
    for name, (shape, dtype) in kinds(about, text, groups, scores).items():
        array = found[name] = _array(folder / f"{name}.npy", dtype)
        if array.shape != shape:
            raise ValueError(f"{folder / f'{name}.npy'}: expected shape {list(shape)}, got {list(array.shape)}")
    arrays: Any = map(found.get, FILES)
    return RoutingTrace(about, text, Choices(*arrays))


def _in_order(text: Text) -> bool:
    starts, n = text.starts, len(text.tokens_N)
    whole = starts.size > 0 and starts[0] == 0 and starts[-1] == n and bool((np.diff(starts) > 0).all())
    return whole and len(text.document_of) == len(text.domain_of) == len(starts) - 1


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _array(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file of the trace, got none") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .npy file: {' '.join(str(error).split())[:200]}") from None
    if array.dtype != dtype:
        raise ValueError(f"{path}: expected {dtype}, got {array.dtype}")
    return array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file of the trace, got none") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value
