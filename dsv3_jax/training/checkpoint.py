"""Checkpoints [§4.2]: complete or absent, written in the background, exact to the bit, refused by another config.

A checkpoint is a folder `<step>` of three items: `state` (arrays), `ema` (arrays) and `meta` (JSON: config, tokens seen,
position in the data). Orbax writes it under a temporary name and renames it when all of it is there; an older one is removed
only after that. Arrays are stored whole, whatever mesh they lay on: every process writes and reads its own devices' pieces.
Another run may begin with the weights alone of one [§4.3].
"""

import dataclasses
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from dsv3_jax.config import Config
from dsv3_jax.settings import SECTIONS, from_dict, to_dict
from dsv3_jax.training.ema import Ema, Pieces, whole_average

# What a resumed run may set anew: none of them changes a bit of what is computed.
FREE_ON_RESUME = {"checkpoint_every", "keep_checkpoints", "eval_every", "nonfinite_limit", "cache_dir"}


class Progress(NamedTuple):
    """Where a run stands, beside its arrays. JSON-able."""

    step: int  # optimiser steps done, skipped ones included
    tokens: int  # positions given to them
    data_state: Any  # of the batch iterator, after the last of those steps' batch


class Checkpoint(NamedTuple):
    state: Any  # tree of arrays, on one device or on a mesh
    ema: Ema | None
    progress: Progress


def config_changes(stored: Config, given: Config) -> list[str]:
    """`name=stored value, now value` for each field that differs and that a resumed run may not change."""
    changes = []
    for section in (s for s in SECTIONS if s != "parallel"):  # a run may move to another mesh
        old, new = getattr(stored, section), getattr(given, section)
        for field in dataclasses.fields(old):
            before, now = getattr(old, field.name), getattr(new, field.name)
            if before != now and field.name not in FREE_ON_RESUME:
                note = " (the schedules scale with the run's length)" if field.name in ("steps", "train_tokens") else ""
                changes.append(f"{field.name}={before}, now {now}{note}")
    return changes


class Checkpoints:
    """The checkpoints of one run in `folder` (created if missing; OSError if that is impossible). A context manager:
    leaving it waits for a save under way, unless an exception is passing, which a failed save must not hide."""

    def __init__(self, folder: str | Path, config: Config):
        self.folder, self.config = Path(folder).absolute(), config
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=config.train.keep_checkpoints, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "ema", "meta"))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._guarded("written", self._manager.close)
        except OSError:
            if error is None:
                raise

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write `checkpoint`; the arrays may be donated or overwritten once this returns.

        Raises OSError if this one or the one before it could not be written (a full disk): the older ones stay.
        """
        step, ema = checkpoint.progress.step, checkpoint.ema
        if step == self.latest():
            return
        meta = {"config": to_dict(self.config), "progress": checkpoint.progress._asdict(), "ema": ema and ema.n_updates}
        items = {"state": ocp.args.StandardSave(_fields(checkpoint.state)), "meta": ocp.args.JsonSave(meta)}
        if ema:
            items["ema"] = ocp.args.StandardSave(whole_average(ema))
        self._guarded("written", lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def wait(self) -> None:
        """Return when the save under way is complete. Raises OSError as `save` does."""
        self._guarded("written", self._manager.wait_until_finished)

    def restore(self, state: Any, ema: Ema | None) -> Checkpoint:
        """The newest checkpoint, in the shapes, dtypes and shardings of `state` (arrays or jax.ShapeDtypeStruct) and `ema`.

        Without a sharding an array goes to this process' first device.

        Raises ValueError if it is of another config or damaged (an older one is never taken silently instead).
        """
        step = self.latest()
        assert step is not None, "ask latest() first"
        only_meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._guarded("read", lambda: self._manager.restore(step, args=only_meta)["meta"])
        changes = config_changes(self._guarded("read", lambda: from_dict(meta["config"])), self.config)
        if changes:
            raise ValueError(
                f"{self.folder} holds a run of another config: {'; '.join(changes)}; undo that or take another --workdir"
            )
        arrays = {"state": ocp.args.StandardRestore(jax.tree.map(_placed, _fields(state)))}
        if ema:
            arrays["ema"] = ocp.args.StandardRestore(jax.tree.map(_host_or_placed, ema.average))
        restored = self._guarded("read", lambda: self._manager.restore(step, args=ocp.args.Composite(**arrays)))
        if ema:
            average = jax.tree.map(lambda a: Pieces.of(a) if isinstance(a, jax.Array) else a, restored.ema)
            ema = Ema(average, meta["ema"])
        return Checkpoint(type(state)(**restored.state), ema, Progress(**meta["progress"]))

    def _guarded(self, action: str, call: Any) -> Any:
        """`call()`; whatever the storage library raises becomes one line."""
        try:
            return call()
        except Exception as error:
            reason = _reason(error)
            if action == "written":
                raise OSError(f"checkpoint under {self.folder} could not be written ({reason}); complete ones stay") from error
            folder = self.folder / str(self.latest())
            raise ValueError(
                f"checkpoint {folder} is damaged ({reason}); remove that folder to go on from the one before it"
            ) from error


def newest_step(run: str | Path) -> int | None:
    """Step of the newest complete checkpoint of the run in folder `run`; None if it has none. Writes nothing."""
    folder = Path(run) / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def check_weights(run: str | Path, params: Any, bias: Any) -> int:
    """Step of the newest checkpoint of the run in folder `run`.

    Raises ValueError if there is none, or one of other shapes than `params` and `bias`; it names the first that differs.
    """
    step = newest_step(run)
    if step is None:
        raise ValueError(f"{run}: expected a run with a checkpoint to begin from, got none; name the --workdir of a run")
    folder = Path(run).absolute() / "checkpoints" / str(step) / "state"
    stored = _guarded_read(folder, lambda: ocp.PyTreeCheckpointHandler().metadata(folder).tree)
    found, wanted = _shapes(stored["params"], stored["bias"]), _shapes(params, bias)
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise _differs(run, name, shape, found.get(name))
    for name, shape in found.items():
        if name not in wanted:
            raise _differs(run, name, None, shape)
    return step


def read_weights(run: str | Path, step: int, params: Any, bias: Any) -> tuple[Any, Any]:
    """Parameters and router bias alone of checkpoint `step` of the run in folder `run`; at full precision where it has masters.

    In the shapes, dtypes and shardings of `params` and `bias` (jax.ShapeDtypeStruct). Raises ValueError for a damaged one.
    """
    folder = Path(run).absolute() / "checkpoints" / str(step) / "state"

    def read() -> Any:
        handler = ocp.PyTreeCheckpointHandler()
        has_masters = bool(jax.tree.leaves(handler.metadata(folder).tree["opt_state"]["master"]))
        tree = {"opt_state": {"master": params}} if has_masters else {"params": params}
        wanted = jax.tree.map(_placed, {**tree, "bias": bias})
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
            )

    tree = _guarded_read(folder, read)
    return tree["opt_state"]["master"] if "opt_state" in tree else tree["params"], tree["bias"]


def _shapes(params: Any, bias: Any) -> dict[str, tuple[int, ...]]:
    """Name of every parameter -> its shape, in the tree's order; then the bias."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
    return shapes | {"router bias": tuple(bias.shape)}


def _differs(run: str | Path, name: str, expected: tuple[int, ...] | None, found: tuple[int, ...] | None) -> ValueError:
    return ValueError(
        f"{run}: {name}: expected shape {expected or 'none'}, got {found or 'none'}; "
        "begin from a run whose model has the sizes of this one"
    )


def _guarded_read(folder: Path, call: Any) -> Any:
    """`call()`; whatever the storage library raises about what it reads becomes one line."""
    try:
        return call()
    except Exception as error:
        raise ValueError(f"checkpoint {folder.parent} is damaged ({_reason(error)}); begin from another run") from error


def _fields(state: Any) -> dict[str, Any]:
    """A state's fields but for `amax` where there is none: runs from before it existed have no such entry."""
    return {name: value for name, value in state._asdict().items() if (name, value) != ("amax", None)}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _host_or_placed(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding) if isinstance(leaf, Pieces) else leaf


def _reason(error: Exception) -> str:
    """One short line: the operating system's word where the storage library quotes its error number."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    number = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(number[1])) if number else text[:200]
