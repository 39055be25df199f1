"""What the experiments' mains share: flags to a Config, and every foreseeable error as one line."""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from dsv3_jax.config import Config
from dsv3_jax.parallel import processes
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override, parse_settings

INTERRUPTED = 130  # as shells report a process that Ctrl-C ended
FAILED = 2

_job: processes.Job | None = None  # what this process has to tell the others when it ends


def define_config_flags() -> None:
    flags.DEFINE_string("preset", "quick", f"one of {', '.join(PRESETS)}")
    flags.DEFINE_multi_string("set", [], "name=value; any field of dsv3_jax/config.py, may be given several times")
    flags.DEFINE_string("workdir", None, "folder of the run")
    flags.DEFINE_bool("resume", False, "continue what the folder holds; start from the beginning if it holds nothing")


def config_from_flags() -> Config:
    """Raises ValueError for an unknown preset or setting."""
    return override(preset(flags.FLAGS.preset), parse_settings(flags.FLAGS.set))


def workdir_from_flags() -> str:
    if not flags.FLAGS.workdir:
        raise ValueError("--workdir: expected a folder, got none")
    return flags.FLAGS.workdir


def define_process_flags() -> None:
    flags.DEFINE_string("coordinator", None, "host:port of process 0; the same in every process of the job")
    flags.DEFINE_integer("num_processes", None, "processes of the job")
    flags.DEFINE_integer("process_id", None, "which of them this one is, from 0")
    flags.DEFINE_bool("distributed", False, "instead of these three: ask Slurm or the TPU pod")
    flags.DEFINE_float("peer_timeout", 30.0, "seconds of silence after which a process counts as gone and the others stop")


def join_job(workdir: str) -> None:
    """With the flags of a job of several processes: joins it. Raises ValueError (one line) if they do not say which."""
    global _job
    names = ("coordinator", "num_processes", "process_id")
    missing = [f"--{name}" for name in names if getattr(flags.FLAGS, name) is None]
    if flags.FLAGS.distributed:
        if len(missing) < len(names):
            raise ValueError("--distributed: expected alone, got --coordinator, --num_processes or --process_id beside it")
        coordinator, n_processes, process = processes.detect()
    elif len(missing) == len(names):
        return
    elif missing:
        raise ValueError(f"{missing[0]}: expected together with the others of --coordinator, --num_processes and --process_id")
    else:
        coordinator, n_processes, process = (getattr(flags.FLAGS, name) for name in names)
    if n_processes < 1:
        raise ValueError(f"--num_processes: expected at least 1, got {n_processes}")
    if n_processes > 1:
        folder = os.path.join(workdir, "processes")
        _job = processes.start(coordinator, n_processes, process, folder, flags.FLAGS.peer_timeout)


def finish_job() -> None:
    """Waits until every process of the job has come here."""
    global _job
    if _job is not None:
        _job.finish()
        _job = None


def run(main: Callable[[], int | None]) -> None:
    """Parse flags and call `main`. User errors end in one line on stderr and exit status 2, Ctrl-C in 130."""

    def guarded(argv: list[str]) -> Any:
        logging.set_verbosity(logging.FATAL)  # what a library logs about an error is said again below, in one line
        _silence_failed_writers()
        if argv[1:]:
            return _fail(f"unexpected argument {argv[1]!r}; flags look like --name=value")
        try:
            return main()
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            if _job is not None:
                _job.blame(error)
            _fail(str(error) or type(error).__name__)
            return _leave(str(error), FAILED)
        except KeyboardInterrupt:
            print("stopped at once; complete checkpoints stay", file=sys.stderr, flush=True)
            _leave("stopped at once by Ctrl-C or SIGTERM", INTERRUPTED)
            os._exit(INTERRUPTED)  # without waiting for a checkpoint that is being written
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) and isinstance(error, jax.errors.JaxRuntimeError):
                _fail(f"out of memory: {str(error).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ')}; take a smaller batch")
                return _leave(str(error), FAILED)
            if _job is None:
                raise
            _job.blame(error)
            traceback.print_exc()
            return _leave(f"{type(error).__name__}: {error}", 1)

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(with_underscores(argv))
        except flags.Error as error:
            sys.exit(_fail(str(error)))

    app.run(guarded, flags_parser=parse)


def make_folder(folder: Path) -> None:
    """For `--out`. Raises ValueError, one line, where none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: expected a folder or where one can be made, got {folder} ({error.strerror})") from error


def with_underscores(argv: list[str]) -> list[str]:
    """`--stream-layers` is `--stream_layers`: dashes in the name of a flag, not in its value."""
    return [re.sub("(?<=^--)[^=]+", lambda name: name[0].replace("-", "_"), argument) for argument in argv]


def _leave(reason: str, status: int) -> int:
    """`status`; of several processes this one ends here, for an orderly end would wait for the others."""
    if _job is not None:
        _job.leave(reason, status)
    return status


def _silence_failed_writers() -> None:
    """After a write has failed, the checkpoint library's other writers find their event loop closed and say so at length."""
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    return FAILED
