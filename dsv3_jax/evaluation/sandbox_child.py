"""The other side of `sandbox`: limits this process, then runs the program that comes on standard input. Imports nothing of
ours.

It says on the pipe whose number it is given: which namespaces it has, and at the end the word that it was told, with the
result.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys

NEW_USER, NEW_NET, NEW_PID, NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
PR_SET_PDEATHSIG = 1
# Events of the interpreter that no program of a benchmark has a use for.
REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill", "pty.",
    "ctypes.", "signal.pthread_kill", "os.chmod", "os.chown", "os.link", "os.symlink", "resource.", "syslog.",
)  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "shutil.")  # of what is outside
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    pipe = int(sys.argv[1])
    order = json.loads(sys.stdin.buffer.read())
    # SIGALRM, which nobody handles, ends this process; the first one of a namespace would not hear it.
    signal.setitimer(signal.ITIMER_REAL, order["seconds"])
    isolation = isolate() if order["namespaces"] else []
    os.write(pipe, (" ".join(isolation) + "\n").encode())
    limit(order)
    result = run(order["program"])
    os.write(pipe, (json.dumps({"word": order["word"], "result": result[:1000]}) + "\n").encode())
    os._exit(0)  # threads that the program left do not matter


def isolate() -> list[str]:
    """Namespaces of its own, as many as the system permits; with one for processes everything in it ends with this one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return []
    for flags, names in (
        (NEW_USER | NEW_NET | NEW_PID | NEW_IPC, ["user", "network", "processes"]),
        (NEW_NET | NEW_PID | NEW_IPC, ["network", "processes"]),
        (NEW_USER | NEW_NET, ["user", "network"]),
    ):
        if libc.unshare(flags) == 0:
            if flags & NEW_PID:
                first_of_namespace(libc)
            return names
    return []


def first_of_namespace(libc: ctypes.CDLL) -> None:
    """Goes on as the first process of the new namespace; the old one waits for it, and ends as it does."""
    child = os.fork()
    if child:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))  # and then it is waited for: no zombie
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGALRM)
        os._exit(status if status >= 0 else 128 - status)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def limit(order: dict) -> None:
    seconds, memory = math.ceil(order["seconds"]), order["memory_mb"] << 20
    limits = {
        "RLIMIT_CPU": (seconds, seconds + 1), "RLIMIT_AS": (memory, memory),
        "RLIMIT_FSIZE": (order["file_mb"] << 20,) * 2, "RLIMIT_NOFILE": (order["open_files"],) * 2,
        "RLIMIT_NPROC": (0, 0), "RLIMIT_CORE": (0, 0),
    }  # fmt: skip
    for name, pair in limits.items():
        if hasattr(resource, name):
            try:
                resource.setrlimit(getattr(resource, name), pair)
            except (ValueError, OSError):  # a stricter one is in force, or the system has none
                pass


def run(program: str) -> str:
    """`passed`, or `failed: ` and the error."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
    sys.stdin = open(os.devnull)
    for name in ("ctypes", "_ctypes", "resource"):  # what could undo the limits is to be imported anew, which is heard
        sys.modules.pop(name, None)
    refuse(os.path.realpath(os.getcwd()))
    names = {"__name__": "__main__"}
    try:
        exec(compile(program, "<program>", "exec"), names)
    except BaseException as error:  # SystemExit too: whoever leaves has not come to the end
        return f"failed: {type(error).__name__}: {error}"
    return "passed"


def refuse(folder: str) -> None:
    """From now on what could reach out of this process raises PermissionError. A hook cannot be taken out again."""
    inside = folder + os.sep

    def outside(path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return True  # a descriptor
        real = os.path.realpath(path)
        return real != os.devnull and not real.startswith(inside)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITING) if isinstance(flags, int) else bool(set(mode or "") & set("wax+"))
            if writes and not isinstance(path, int) and outside(path):
                raise PermissionError(f"the program may not write {path!r}")
        elif event.startswith(REFUSED) or (event.startswith(CHANGES) and outside(arguments[0])):
            raise PermissionError(f"the program may not do this: {event}")
        elif event == "import" and arguments[0].partition(".")[0] in ("ctypes", "_ctypes", "_posixsubprocess"):
            raise ImportError(f"the program may not import {arguments[0]}")  # as libraries expect where it is missing

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
