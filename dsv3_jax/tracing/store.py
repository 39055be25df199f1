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

FORMAT, VERSION = "dsv3_jax.routing_trace", 2  # 2: a digest of all of the text
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

    def experts_of(self, place: slice) -> Int[np.ndarray, "N L K"]:
        """Experts of some of the tokens, int32; checked here, because all of a large trace's would take long to read at once.

        Raises ValueError, one line, for ids that the model does not have and for a choice of which a part is none: damage.
        """
        found, none = np.asarray(self.choices.experts_NLK[place], np.int32), self.about.n_experts
        if found.size and not 0 <= found.min() <= found.max() <= none:
            raise ValueError(
                f"experts: expected 0..{none}, got {found.min()}..{found.max()}; the trace is damaged, make it again"
            )
        is_none: Any = found == none
        if (is_none[..., 1:] != is_none[..., :1]).any():
            raise ValueError(
                f"experts: expected all of a choice or none ({none}), got a part; the trace is damaged, make it again"
            )
        return found

    def layer(self, name: str) -> int:
        """The row of a layer. Raises ValueError for one that the trace does not have."""
        if name not in self.about.layers:
            raise ValueError(f"layer: expected one of {', '.join(self.about.layers)}, got {name!r}")
        return self.about.layers.index(name)


def layer_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of the layers that have a router, in the order of a trace."""
    return _names(config.first_k_dense_replace, config.num_hidden_layers, config.num_nextn_predict_layers)


def _names(first: int, end: int, depths: int) -> tuple[str, ...]:
    return (*map(str, range(first, end)), *(f"mtp {depth}" for depth in range(1, depths + 1)))


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
SAID: Mapping[str, tuple[type, ...]] = {  # what the fields of `trace.json` are
    "n_tokens": (int,), "text": (str,), "config": (dict,), "config_digest": (str,), "model": (str,),
    "tokenizer": (str, type(None)), "layers": (list,), "n_experts": (int,), "top_k": (int,), "domains": (list,),
    "source": (str,), "batch_tokens": (int,), "how": (dict,), "groups": (int,), "scores": (bool,),
}  # fmt: skip


class Writer:
    """Fills a trace batch by batch; `done` batches of `written` tokens are there already, of a run that was interrupted.

    Raises ValueError if `folder` exists, if what was begun there is another trace or damaged, or if the text's bounds or labels
    do not fit; OSError where the disk is too small.
    """

    def __init__(self, folder: Path, about: About, text: Text, groups: int = 0, scores: bool = False) -> None:
        if folder.exists():
            raise ValueError(f"--out: {folder} exists; name another folder, or remove it")
        assert text.domains == about.domains, (text.domains, about.domains)
        _check_text(text, "text")
        self._folder, self._beside = folder, folder.with_name(folder.name + ".part")
        self._n_tokens = len(text.tokens_N)
        self._files = kinds(about, text, groups, scores)
        described = _described(about, groups, scores, text)
        self.done = self.written = 0
        if self._beside.exists():
            self._continue(described)
        else:
            self._begin(described, text)
        self._maps = {name: np.lib.format.open_memmap(self._beside / f"{name}.npy", mode="r+") for name in self._files}

    def _continue(self, described: Mapping[str, Any]) -> None:
        try:
            same = _read_json(self._beside / ABOUT) == described
            if same:
                open_trace(self._beside)
                self.done, self.written = _progress(self._beside / PROGRESS, self._n_tokens)
        except ValueError as error:
            raise ValueError(f"--out: what was begun is damaged: {error}; remove {self._beside}") from None
        if not same:
            raise ValueError(f"--out: {self._beside} was begun with another model, text or flags; remove it or use those")

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
        write_json(making / PROGRESS, {"batches": 0, "tokens": 0})
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
        self.written += sum(place.stop - place.start for place in places)
        write_json(self._beside / PROGRESS, {"batches": self.done, "tokens": self.written})

    def finish(self) -> None:
        """The trace takes its place. Raises ValueError, one line, if it is not whole."""
        if self.written != self._n_tokens:
            raise ValueError(f"--out: expected {self._n_tokens} tokens, got {self.written}; remove {self._beside}")
        self._maps.clear()
        self._beside.rename(self._folder)  # before the other: what is killed in between is whole and can be opened
        (self._folder / PROGRESS).unlink()


def _described(about: About, groups: int, scores: bool, text: Text) -> dict[str, Any]:
    head = {"format": FORMAT, "version": VERSION, "n_tokens": len(text.tokens_N), "text": _text_digest(text)}
    more = {"config_digest": about.architecture, "groups": groups, "scores": scores}
    return json.loads(json.dumps(head | dataclasses.asdict(about) | more))


def _text_digest(text: Text) -> str:
    digest = hashlib.sha256(json.dumps(text.domains).encode())
    for (name, kind), values in zip(TEXT.items(), text[:4], strict=True):
        digest.update(f"{name} {len(values)}".encode())
        digest.update(np.ascontiguousarray(values, kind).data)
    return digest.hexdigest()


def open_trace(folder: str | Path) -> RoutingTrace:
    """Raises ValueError, one line with the file, for what is no trace, not whole, or damaged, and for another text than the one
    that was traced. Experts are checked where they are read, by `RoutingTrace.experts_of`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a routing trace, got {'a file' if folder.exists() else 'nothing'}")
    said = _read_json(folder / ABOUT)
    about = _about(said, folder / ABOUT)
    tokens = _array(folder / "tokens.npy", TEXT["tokens"], (said["n_tokens"],))
    names = "starts", "document_of", "domain_of"
    starts, document_of, domain_of = (_array(folder / f"{name}.npy", TEXT[name], (None,)) for name in names)
    text = Text(tokens, starts, document_of, domain_of, about.domains)
    _check_text(text, str(folder))
    if _text_digest(text) != said["text"]:
        raise ValueError(f"{folder}: expected the text that was traced, got other tokens, bounds, documents or domains")
    found: dict[str, Any] = {}
    for name, (shape, dtype) in kinds(about, text, said["groups"], said["scores"]).items():
        found[name] = _array(folder / f"{name}.npy", dtype, shape)
    arrays: Any = map(found.get, FILES)
    return RoutingTrace(about, text, Choices(*arrays))


def _about(said: Mapping[str, Any], path: Path) -> About:
    """Raises ValueError, one line, for fields that are missing, of another type, or that contradict the model's config."""
    if said.get("format") != FORMAT or said.get("version") != VERSION:
        got = f"format {_short(said.get('format'))}, version {_short(said.get('version'))}"
        raise ValueError(f"{path}: expected format {FORMAT!r}, version {VERSION}, got {got}; make the trace again")
    for name, types in SAID.items():
        if name not in said:
            raise ValueError(f"{path}: expected a field {name!r}, got none")
        value = said[name]
        if type(value) not in types or (isinstance(value, list) and not all(isinstance(part, str) for part in value)):
            expected = "strings" if list in types else " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{path}: {name}: expected {expected}, got {_short(value)}")
    frozen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    about = About(**{field.name: frozen[field.name] for field in dataclasses.fields(About)})
    try:
        if about.architecture != said["config_digest"]:
            raise ValueError(f"{path}: config: expected that of the digest beside it, got another")
        of = about.config
        by_config = {
            "layers": _names(of["first_k_dense_replace"], of["num_hidden_layers"], of["num_nextn_predict_layers"]),
            "n_experts": of["n_routed_experts"],
            "top_k": of["num_experts_per_tok"],
        }
        groups = 0, of["n_group"]
    except (KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: config: expected the fields of a model, got others") from None
    for name, value in by_config.items():
        if frozen[name] != value:
            raise ValueError(f"{path}: {name}: expected {_short(value)}, as in the config, got {_short(frozen[name])}")
    if said["groups"] not in groups or about.batch_tokens < 1:
        got = f"groups {said['groups']}, batch_tokens {about.batch_tokens}"
        raise ValueError(f"{path}: expected groups {groups[0]} or {groups[1]}, batch_tokens of at least 1, got {got}")
    return about


def _check_text(text: Text, where: str) -> None:
    starts, n = text.starts, len(text.tokens_N)
    if starts.size < 2 or starts[0] != 0 or starts[-1] != n or bool((starts[1:] <= starts[:-1]).any()):
        raise ValueError(f"{where}: expected sequences of {n} tokens in all, none of them empty, got other bounds")
    labels = len(text.document_of), len(text.domain_of)
    if labels != (len(starts) - 1,) * 2:
        raise ValueError(f"{where}: expected a document and a domain of {len(starts) - 1} sequences, got {labels}")
    low, high = int(text.domain_of.min()), int(text.domain_of.max())
    if low < 0 or high >= len(text.domains):
        raise ValueError(f"{where}: domain_of: expected 0..{len(text.domains) - 1}, got {low}..{high}")


def _progress(path: Path, n_tokens: int) -> tuple[int, int]:
    said = _read_json(path)
    batches, tokens = said.get("batches"), said.get("tokens")
    if type(batches) is not int or type(tokens) is not int or not 0 <= batches <= tokens <= n_tokens * min(batches, 1):
        raise ValueError(f"{path}: expected the batches and the tokens that are written, got {_short(said)}")
    return batches, tokens


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, dict | list) else f"{value!r:.60}"


def _array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int | None, ...]) -> np.ndarray:
    """`shape`: None for any length."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # of .npy alone: neither archives nor pickles
        whole = array.offset + array.nbytes == path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file of the trace, got none") from None
    except Exception as error:  # a damaged header is read as Python, and raises whatever the parser, mmap or dtype raise
        raise ValueError(f"{path}: not a whole .npy file: {' '.join(str(error).split())[:200]}") from None
    if array.dtype != dtype:
        raise ValueError(f"{path}: expected {np.dtype(dtype)}, got {array.dtype!s:.60}")
    if array.ndim != len(shape) or any(n is not None and n != got for n, got in zip(shape, array.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{path}: expected shape [{expected}], got {list(array.shape)}")
    if not whole:
        raise ValueError(f"{path}: not a whole .npy file: expected {array.nbytes} bytes of numbers, got another length")
    return array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file of the trace, got none") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value
