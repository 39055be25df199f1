"""JAX's coordination service in a process of its own, so that the death of process 0 does not take it away.

While the service runs inside process 0, as JAX starts it, its end makes JAX abort every other process at once, before they can
say which process has gone. Here it outlives process 0 until all the others have stopped.

`python coordinator.py <port> <processes> <heartbeat timeout> <folder> <seconds>` says `up`, or one line of what is wrong. The
end of its input, without `done` before it, means that process 0 has gone. Needs jaxlib alone.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path


def port_is_free(port: int) -> bool:
    """gRPC would share a port with another job's service, and half of the calls would go to the wrong one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def all_ended(folder: Path, processes: int) -> bool:
    """Whether every process but process 0 has left its last word, or been missed by one that has."""
    try:
        records = [json.loads((folder / f"{i}.json").read_text()) for i in range(processes)]
    except (OSError, ValueError):
        return False
    missed = {i for record in records for i in record["gone"]}
    return all(record["ended"] or i in missed for i, record in enumerate(records) if i > 0)


def main(port: int, processes: int, heartbeat_timeout: int, folder: Path, patience: float) -> None:
    try:
        from jaxlib import _jax

        make = _jax.get_distributed_runtime_service
    except (ImportError, AttributeError):
        print("absent", flush=True)
        return
    deadline = time.monotonic() + 2 * patience  # the service of a job that has just died may still be there
    while not port_is_free(port):
        if time.monotonic() > deadline:
            print(f"port {port} is in use; take another", flush=True)
            return
        time.sleep(0.2)
    service = make(f"[::]:{port}", processes, heartbeat_timeout=heartbeat_timeout, shutdown_timeout=heartbeat_timeout)
    print("up", flush=True)
    if sys.stdin.read().strip() != "done":
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not all_ended(folder, processes):
            time.sleep(0.2)
        os._exit(0)
    service.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]))
