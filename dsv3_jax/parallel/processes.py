"""A job of many processes: how they find each other, and how the others stop, and say why, when one has gone."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax

from dsv3_jax.parallel import coordinator as service
from dsv3_jax.parallel.heartbeats import INTERVAL, Gone, Heartbeats

GONE = 3  # exit status of a process that stops because another one has gone
ABSENT = 2  # of one that waited in vain for the others at the start
ARRIVAL = 300.0  # seconds that processes may come one after the other


class Job:
    """This process' part in a job of several. Made by `start`."""

    def __init__(self, heartbeats: Heartbeats, outside: subprocess.Popen[str] | None):
        self._heartbeats, self._service = heartbeats, outside

    def finish(self) -> None:
        """Waits for all processes to come here; from then on each may go on, or end, alone."""
        self._heartbeats.stop()
        jax.distributed.shutdown()
        self._heartbeats.end("finished")
        if self._service is not None:
            try:
                self._service.communicate("done", timeout=self._heartbeats.timeout)
            except subprocess.TimeoutExpired:  # nobody needs it any more
                self._service.kill()

    def leave(self, reason: str, status: int) -> None:
        """Ends this process at once, for a reason that the others will print. Waits for nothing: nobody may be there."""
        self._heartbeats.stop()
        self._heartbeats.end(" ".join(reason.split()))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def blame(self, error: BaseException) -> None:
        """Does not return if `error` is what the end of another process looks like from here; says so and ends."""
        if _is_runtime_error(error):
            time.sleep(self._heartbeats.timeout + 3 * INTERVAL)  # by then, who has gone has been missed


def start(coordinator: str, n_processes: int, process: int, folder: str | Path, timeout: float) -> Job:
    """Joins the job before JAX is first used; `folder`, on a disk that all see, is for signs of life.

    A process that is not heard of for `timeout` seconds makes the others end with one line and status GONE.

    Raises ValueError (one line) if the numbers make no job. If its processes do not find each other, this one ends likewise.
    """
    if not 0 <= process < n_processes:
        raise ValueError(f"--process_id: expected 0..{n_processes - 1} of {n_processes} processes, got {process}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator: expected host:port of process 0, got {coordinator!r}")
    if timeout < 2 * INTERVAL:
        raise ValueError(f"--peer_timeout: expected at least {2 * INTERVAL:g} seconds, got {timeout:g}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the training loop's
    heartbeats = Heartbeats(folder, process, n_processes, timeout)
    patience = int(10 * timeout)  # of JAX's own watch: it must never be the first, it aborts without a clear word
    outside = _start_service(int(port), n_processes, patience, folder, timeout) if process == 0 else None
    alone = (
        f"error: process {process} of {n_processes}: the others were not all there at {coordinator} within {ARRIVAL:g} s; "
        "start every process with the same --coordinator, which all must reach"
    )
    alarm = threading.Timer(ARRIVAL, _end_with, (alone, ABSENT))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            n_processes,
            process,
            # process 0 opens a service in any case: where the real one is outside, one that nobody will ever ask
            coordinator_bind_address="127.0.0.1:0" if outside else None,
            initialization_timeout=int(2 * ARRIVAL),  # at which JAX aborts, so never the first either
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=patience,
        )
    finally:
        alarm.cancel()
    heartbeats.start(_stop_all)
    return Job(heartbeats, outside)


def detect() -> tuple[str, int, int]:
    """Address of process 0, number of processes and this one's, as Slurm, a TPU pod, Kubernetes or Open MPI tell them.

    Raises ValueError where none of them is found.
    """
    try:
        from jax._src.clusters import ClusterEnv  # nothing public tells without connecting

        address, n_processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(ARRIVAL)
        )
    except (ImportError, AttributeError, TypeError, KeyError, RuntimeError):
        address = n_processes = process = None
    if address is None or n_processes is None or process is None:
        raise ValueError("--distributed: found no Slurm step or TPU pod; give --coordinator, --num_processes and --process_id")
    return address, n_processes, process


def _start_service(
    port: int, n_processes: int, patience: int, folder: str | Path, timeout: float
) -> subprocess.Popen[str] | None:
    """The coordination service, once it is up; None if this JAX has none that runs alone."""
    arguments = [port, n_processes, patience, Path(folder).absolute(), timeout + 5 * INTERVAL]
    # A session of its own: Ctrl-C in a terminal is for the processes that train. What its library logs is said here in a line.
    child = subprocess.Popen(
        [sys.executable, service.__file__, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    said = child.stdout.readline().strip()
    if said == "up":
        return child
    child.communicate()
    if said == "absent":
        return None
    raise ValueError(f"--coordinator: {said or 'the coordination service did not start'}")


def _stop_all(gone: list[Gone]) -> None:
    """In the heartbeats' thread: the main one may be waiting, for ever, for who has gone."""
    who = " and ".join(map(str, gone))
    _end_with(f"error: {who}; this process stops too: run the same command again with --resume in every process", GONE)


def _end_with(line: str, status: int) -> None:
    os.write(2, f"\n{line}\n".encode())  # after a progress bar's unfinished line, and past any lock on the streams
    os._exit(status)


def _is_runtime_error(error: BaseException | None) -> bool:
    """Whether JAX's runtime raised it, perhaps inside what a library made of that."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
