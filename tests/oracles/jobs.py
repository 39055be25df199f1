"""Jobs of two processes of four devices each on loopback, with a way to be sure that they end."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiled fast, the same everywhere


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} {QUICK}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def running(commands: list[list[str]], devices: int) -> Iterator[list[subprocess.Popen]]:
    """The programs, started together, and killed at the end whatever happens."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen([sys.executable, *command], env=environment(devices), **pipes) for command in commands]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                pipe.close()


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str, str]:
    """Exit status, output and errors; fails if it does not end."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def train_commands(workdir: Path, settings: list[str], *flags: str, processes: int = 2) -> list[list[str]]:
    """`experiments.train` for every process of a job."""
    command = ["-m", "experiments.train", "--preset=tiny", f"--workdir={workdir}", "--resume", *settings, *flags]
    if processes == 1:
        return [command]
    job = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    return [[*command, *job, f"--process_id={i}"] for i in range(processes)]


def wait_for_records(workdir: Path, n: int, alive: list[subprocess.Popen], timeout: float = 240) -> None:
    """Until metrics.jsonl has `n` lines; fails if a process ends before or it takes too long."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + timeout
    while not path.exists() or path.read_text().count("\n") < n:
        ended = [p for p in alive if p.poll() is not None]
        assert not ended, [(p.returncode, p.stderr.read()) for p in ended]
        assert time.monotonic() < deadline, f"no {n} records in {timeout} s"
        time.sleep(0.02)
