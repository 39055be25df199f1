"""What the experiments' mains share: flags to a Config, and every foreseeable error as one line."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from dsv3_jax.config import Config
from dsv3_jax.presets import PRESETS, preset
from dsv3_jax.settings import override, parse_settings

INTERRUPTED = 130  # as shells report a process that Ctrl-C ended
FAILED = 2


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


def run(main: Callable[[], int | None]) -> None:
    """Parse flags and call `main`. User errors end in one line on stderr and exit status 2, Ctrl-C in 130."""

    def guarded(argv: list[str]) -> Any:
        logging.set_verbosity(logging.FATAL)  # what a library logs about an error is said again below, in one line
        _silence_failed_writers()
        if argv[1:]:
            return _fail(f"unexpected argument {argv[1]!r}; flags look like --name=value")
        try:
            return main()
        except (ValueError, OSError, FloatingPointError) as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            print("stopped at once; complete checkpoints stay", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)  # without waiting for a checkpoint that is being written

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(_fail(str(error)))

    app.run(guarded, flags_parser=parse)


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
