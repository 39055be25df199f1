"""A training run [§4]: everything that touches files, clocks and signals around the pure step.

workdir/run.json        config, versions, corpus and its SHA-256, differences from the published recipe
workdir/metrics.jsonl   one object a step        workdir/routing.bin   expert counts and router bias of every step
workdir/tokenizer.json  as released models have theirs
workdir/checkpoints/    complete or absent       workdir/validation.json, validation_load.npy   at the end

Of several processes each computes, reads its own rows' documents, writes its part of a checkpoint; process 0 writes the rest.
"""

import contextlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.data.pipeline import Data, build_data, merged_states
from dsv3_jax.parallel.arrays import batch_to_mesh, rows_by_process, told_by_all, told_by_first
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.settings import override
from dsv3_jax.training import schedules
from dsv3_jax.training.checkpoint import Checkpoint, Checkpoints, Progress, check_weights, newest_step
from dsv3_jax.training.console import Bar, Interrupt, Stop
from dsv3_jax.training.ema import Ema, init_ema, update_ema
from dsv3_jax.training.evaluate import Validation, validate
from dsv3_jax.training.header import describe, header_lines
from dsv3_jax.training.journal import Journal, finite, write_json, write_text
from dsv3_jax.training.placed import (
    abstract_placed,
    averaged_params,
    check_placement,
    first_state,
    micro_rows,
    placement_of,
    state_from,
)
from dsv3_jax.training.step import Hyper, TrainState, make_eval_step, make_train_step


class Result(NamedTuple):
    """`validation` is what validation.json holds; None when the run stopped before its end."""

    state: TrainState
    ema: Ema | None
    step: int
    validation: dict[str, Any] | None
    interrupted: bool


class Done(NamedTuple):
    """A step that was handed to the device, with what the host knows of it. Its arrays may not be there yet."""

    step: int
    tokens: int
    sequences: int
    hyper: dict[str, float]
    metrics: dict[str, Any]
    bias: Any  # a copy: the state's own is donated to the next step
    validation: dict[str, Any] | None = None


def train(
    config: Config,
    workdir: str | Path,
    *,
    resume: bool = False,
    header: bool = True,
    progress: bool = True,
    step_limit: int | None = None,
    init: str | Path | None = None,
) -> Result:
    """Train `config` in `workdir` to its end, or through step `step_limit`, or until Ctrl-C; checkpoints all the way.

    `header` prints what the run is, `progress` shows a bar. A run that has no checkpoint yet begins with the parameters and the
    router bias of the run in folder `init`, if given, and stores them at once: from then on it needs that folder no more.

    Raises ValueError (bad config or data, a run is there and `resume` is not given, a checkpoint of another config or a
    damaged one, other shapes or another tokenizer in `init`), OSError (disk) and FloatingPointError (`nonfinite_limit` steps in
    a row without a finite gradient).
    """
    workdir, first = Path(workdir), jax.process_index() == 0
    holds = not resume and any((workdir / name).exists() for name in ("run.json", "checkpoints"))
    if any(told_by_all(holds)):  # asked of all: process 0 may be ahead, and writing there already
        raise ValueError(f"{workdir} holds a run already; add --resume to continue it, or take another --workdir")
    placement = placement_of(config)
    check_placement(config, placement)
    if newest_step(workdir) is not None:
        init = None
    if init is not None:
        like = abstract_placed(config, placement)
        check_weights(init, like.params, like.bias)
    workdir.mkdir(parents=True, exist_ok=True)
    data = build_data(config.data, config.model.vocab_size)
    if init is not None:
        _require_same_tokenizer(init, data)
    feed = Feed(config, data, placement)
    compiled_steps(config, len(data.domains))  # what somebody else's function gets wrong is said before anything is written
    with Checkpoints(workdir / "checkpoints", config) as checkpoints:
        start = _start(config, placement, checkpoints, init)
        if start.progress.step > 0:
            _require_same_text(workdir, data)
        run = describe(config, list(data.domains), data.summary, placement) | _origin(workdir, init)
        journal: Any = contextlib.nullcontext()
        if first:
            if start.progress.step < schedules.total_steps(config):
                (workdir / "validation.json").unlink(missing_ok=True)  # of a run whose checkpoints were removed
            write_json(workdir / "run.json", run)
            write_text(workdir / "tokenizer.json", data.tokenizer.backend.to_str())
            if header:
                print("\n".join(header_lines(run)), flush=True)
            journal = Journal(workdir, config.model.n_moe_layers, config.model.n_routed_experts, start.progress.step)
        with journal as opened:
            end, interrupted = _run(config, feed, start, checkpoints, opened, progress and first, step_limit)
        checkpoints.save(_with_all_streams(end))
        checkpoints.wait()
    finished = end.progress.step == run["total_steps"]
    validation = _final_validation(config, feed, end, workdir) if finished else None
    return Result(end.state, end.ema, end.progress.step, validation, interrupted)


def _require_same_text(workdir: Path, data: Data) -> None:
    """Raises ValueError if the corpus is not the one that the run in `workdir` began with."""
    before = json.loads((workdir / "run.json").read_text())["data"]["domains"]
    now = data.summary["domains"]
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"{workdir}: the corpus has changed since the run began (domain {', '.join(changed)}); "
            "restore its text, or start a run in another --workdir"
        )


def _require_same_tokenizer(init: str | Path, data: Data) -> None:
    """Raises ValueError if the run in `init` is known to have had another tokenizer: its weights would mean other tokens."""
    path = Path(init) / "run.json"
    theirs = json.loads(path.read_text())["data"] if path.exists() else {}
    if theirs.get("tokenizer", data.summary["tokenizer"]) != data.summary["tokenizer"]:
        raise ValueError(
            f"{init}: expected a run with the tokenizer of this one, got another; set tokenizer= to the tokenizer.json that "
            f"tokens-{theirs['key']} in its cache_dir holds"
        )


def _origin(workdir: Path, init: str | Path | None) -> dict[str, Any]:
    """For run.json: which run's weights this one began with, kept when it goes on; nothing for one that began by itself."""
    path = workdir / "run.json"
    known = json.loads(path.read_text()).get("init") if init is None and path.exists() else init
    return {} if known is None else {"init": str(known)}


@lru_cache(maxsize=16)
def _compiled_steps(config: Config, n_domains: int) -> tuple[Any, Any]:
    placement = placement_of(config)
    return make_train_step(config, n_domains, placement), make_eval_step(config, n_domains, placement)


def compiled_steps(config: Config, n_domains: int) -> tuple[Any, Any]:
    """Training and evaluation step; runs that differ in what only the host reads share them within a process."""
    host_only = {
        "seed": 0, "data_seed": 0, "steps": 1, "ema_decay": 0.0, "ema_every": 1,
        "checkpoint_every": 1, "keep_checkpoints": 1, "eval_every": 0, "nonfinite_limit": 1, "warmup_steps": 0,
        "learning_rate": 1.0, "bias_update_speed": 0.0, "mtp_loss_weight": 0.0, "mtp_loss_weight_late": 0.0,
        "data_streams": 1, "init_ulps": 0,
    }  # fmt: skip
    return _compiled_steps(override(config, host_only), n_domains)


def eval_bytes(data: Data) -> dict[str, int]:
    """Bytes of held-out text by domain."""
    return dict(zip(data.domains, data.eval_bytes.tolist(), strict=True))


def master_weights(state: TrainState) -> Any:
    """The parameters at full precision."""
    return state.params if state.opt_state.master is None else state.opt_state.master


class Feed:
    """Batches as the compiled steps take them: NumPy for one device, arrays of the mesh with each process' own rows."""

    def __init__(self, config: Config, data: Data, placement: Placement | None):
        self.config, self.data, self.placement = config, data, placement
        self._n_rows = micro_rows(config)
        shares = None if placement is None else rows_by_process(placement, self._n_rows)
        self._rows = range(self._n_rows) if shares is None else shares[jax.process_index()].tolist()
        self.batches = data.train_batches(config.train, rows=self._rows)

    def _put(self, batch: Any, rows: Any) -> Any:
        return batch if self.placement is None else batch_to_mesh(batch, rows, self._n_rows, self.placement)

    def next_batch(self, n_sequences: int) -> Any:
        return self._put(self.batches.next_batch(n_sequences), self._rows)

    def scores(self, eval_step: Any, params: Any, bias: Any) -> Validation:
        """Held-out text is little: every process reads all of it, and computes its rows."""
        every = range(self._n_rows)
        batches = (self._put(batch, every) for batch in self.data.eval_batches(self._n_rows))
        return validate(eval_step, params, bias, batches, self.data.domains, eval_bytes(self.data))


def _start(config: Config, placement: Placement | None, checkpoints: Checkpoints, init: str | Path | None) -> Checkpoint:
    """The newest checkpoint, or step 0; with another run's weights, step 0 is a checkpoint."""
    like = abstract_placed(config, placement)
    ema = init_ema(like.opt_state.mu) if config.train.ema_decay else None  # of the parameters' shapes, in the moments' pieces
    latest = told_by_all(checkpoints.latest())
    if len(set(latest)) > 1:
        raise ValueError(
            f"{checkpoints.folder}: the processes see different checkpoints {latest}; put it on a disk that all share"
        )
    if latest[0] is not None:
        return checkpoints.restore(like, ema)
    zero = Progress(step=0, tokens=0, data_state=None)
    if init is None:
        return Checkpoint(first_state(config, placement), ema, zero)
    start = Checkpoint(state_from(init, config, placement), ema, zero)
    checkpoints.save(start)
    checkpoints.wait()
    return start


def _with_all_streams(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the position of every stream, of whichever process reads it."""
    progress = checkpoint.progress
    if jax.process_count() == 1 or progress.data_state is None:
        return checkpoint
    return checkpoint._replace(progress=progress._replace(data_state=merged_states(told_by_all(progress.data_state))))


def _hyper(config: Config, progress: Progress, total: int) -> dict[str, float]:
    train, tokens = config.train, progress.tokens
    return {
        "learning_rate": schedules.learning_rate(train, tokens, total, progress.step + 1),
        "bias_update_speed": schedules.bias_update_speed(train, tokens, total),
        "mtp_loss_weight": schedules.mtp_loss_weight(train, tokens, total),
    }


def _run(
    config: Config,
    feed: Feed,
    start: Checkpoint,
    checkpoints: Checkpoints,
    journal: Journal | None,
    show: bool,
    step_limit: int | None,
) -> tuple[Checkpoint, bool]:
    """The steps after `start`. The host writes down a step, and fetches the next batch, while the device is at work."""
    train, total, n_steps = config.train, schedules.total_tokens(config), schedules.total_steps(config)
    last = min(n_steps, step_limit or n_steps)
    train_step, eval_step = compiled_steps(config, len(feed.data.domains))
    (state, ema, progress), pending = start, None
    if progress.data_state is not None:
        feed.batches.set_state(progress.data_state)
    skipped = _Skipped(train.nonfinite_limit, int(state.skipped_in_row), int(state.skipped_total))

    def sequences_after(tokens: int) -> int:
        return schedules.batch_sequences(train, tokens, total)

    with Interrupt() as interrupt, Bar(n_steps, progress.step, show) as bar:
        stop = Stop(interrupt, feed.placement, several=jax.process_count() > 1)

        def settle(done: Done | None) -> None:
            """Wait for `done` and write it down."""
            if done is not None:
                record, load, bias = _record(done, feed.data.domains, skipped, bar.seconds())
                if journal is not None:
                    journal.write(record, load, bias)
                bar.show(record)
                skipped.check(record)

        batch = feed.next_batch(sequences_after(progress.tokens)) if progress.step < last else None
        while progress.step < last and not stop.agreed():
            stop.vote()
            hyper, data_state = _hyper(config, progress, total), feed.batches.get_state()
            sequences = sequences_after(progress.tokens)
            state, metrics = train_step(state, batch, Hyper(*(jnp.float32(x) for x in hyper.values())))
            progress = Progress(progress.step + 1, progress.tokens + sequences * config.data.seq_len, data_state)
            settle(pending)
            pending = Done(progress.step, progress.tokens, sequences, hyper, metrics, jnp.copy(state.bias))
            if progress.step < last:
                batch = feed.next_batch(sequences_after(progress.tokens))
            if ema is not None and progress.step % train.ema_every == 0:
                ema = update_ema(ema, master_weights(state), train.ema_decay)
            if train.eval_every and progress.step % train.eval_every == 0:
                pending = pending._replace(validation=feed.scores(eval_step, state.params, state.bias).scores)
            if progress.step % train.checkpoint_every == 0:
                settle(pending)  # first the record, then the checkpoint: no checkpoint is ahead of its records
                pending = None
                checkpoints.save(_with_all_streams(Checkpoint(state, ema, progress)))
        settle(pending)
        return Checkpoint(state, ema, progress), any(told_by_all(interrupt.asked))


def _record(done: Done, domains: Any, skipped: "_Skipped", seconds: float) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The step's line of metrics.jsonl, its expert counts, and the bias after it."""
    metrics, bias = jax.device_get((done.metrics, done.bias))
    names = [name for name in ("loss", "grad_norm") if finite(metrics[name]) is None]
    assert bool(names) == bool(metrics["nonfinite"]), "the step skips exactly what is not finite"
    skipped.count(bool(names))
    max_vio = [finite(v) for v in metrics["max_vio"]]
    sums = zip(domains, metrics["domain_loss_sum"], metrics["domain_tokens"], strict=True)
    record = {
        "step": done.step,
        "tokens": done.tokens,
        **{name: finite(metrics[name]) for name in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm")},
        **{name: finite(value) for name, value in done.hyper.items()},
        "sequences": done.sequences,
        "targets": int(metrics["tokens"]),
        "max_vio": max_vio,
        "max_vio_mean": sum(v or 0.0 for v in max_vio) / max(1, len(max_vio)),
        "dead_experts": metrics["dead_experts"].tolist(),
        "domain_loss": {name: finite(loss / count) if count else None for name, loss, count in sums},
        "nonfinite": names,
        "skipped": skipped.total,
        "seconds": round(seconds, 6),
    }
    if done.validation is not None:
        record["validation"] = done.validation
    return record, metrics["load"], bias


def _final_validation(config: Config, feed: Feed, end: Checkpoint, workdir: Path) -> dict[str, Any]:
    """Scores of the raw and of the averaged weights; computed once, as nothing about a finished run can change."""
    path, first = workdir / "validation.json", jax.process_index() == 0
    known = told_by_first(json.loads(path.read_text()) if first and path.exists() else None)
    if known is not None:
        return known
    _, eval_step = compiled_steps(config, len(feed.data.domains))
    state, bias = end.state, end.state.bias
    raw = feed.scores(eval_step, state.params, bias)
    validation = {"step": end.progress.step, "eval_bytes": eval_bytes(feed.data), "raw": raw.scores}
    if end.ema is not None and end.ema.n_updates:
        validation["ema"] = feed.scores(eval_step, averaged_params(end.ema, state), bias).scores
    if first:
        np.save(workdir / "validation_load.npy", raw.domain_load_LME)
        write_json(path, validation)
    return validation


class _Skipped:
    """Counts skipped updates, and stops the run after too many in a row."""

    def __init__(self, limit: int, in_row: int, total: int):
        self.limit, self.in_row, self.total = limit, in_row, total

    def count(self, skipped: bool) -> None:
        self.in_row, self.total = (self.in_row + 1, self.total + 1) if skipped else (0, self.total)

    def check(self, record: dict[str, Any]) -> None:
        if self.in_row >= self.limit:
            raise FloatingPointError(
                f"step {record['step']}: {' and '.join(record['nonfinite'])} not finite; {self.in_row} updates in a row "
                "skipped (nonfinite_limit), the last good checkpoint is kept"
            )
