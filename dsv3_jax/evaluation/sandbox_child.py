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
from collections.abc import Callable

NEW_USER, NEW_NET, NEW_PID, NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
PR_SET_PDEATHSIG = 1
# Events of the interpreter that no program of a benchmark has a use for.
REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill", "pty.",
    "ctypes.", "signal.pthread_kill", "os.chmod", "os.chown", "os.link", "os.symlink", "os.setxattr", "os.removexattr",
    "os.chflags", "fcntl.ioctl", "resource.", "syslog.",
    "sqlite3.",  # SQL opens further files, and no event says so
    "cpython.PyInterpreterState_New",  # it would have no hook
)  # fmt: skip
# Of events that change files: which of their arguments are paths, and which folders that these are relative to.
CHANGES = {
    "os.remove": ((0,), (1,)), "os.rmdir": ((0,), (1,)), "os.mkdir": ((0,), (2,)), "os.rename": ((0, 1), (2, 3)),
    "os.truncate": ((0,), ()), "os.utime": ((0,), (3,)),
}  # fmt: skip
# What reaches files or other processes without an event: functions, and modules around libraries.
UNHEARD = {
    "os": ("mkfifo", "mknod", "chroot", "setpriority", "sched_setaffinity", "sched_setparam", "sched_setscheduler"),
    "signal": ("pidfd_send_signal",),
}
LIBRARIES = (
    "ctypes", "_ctypes", "_posixsubprocess", "_posixshmem", "_multiprocessing", "_dbm", "_gdbm", "_tkinter", "readline",
)  # fmt: skip
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
    for name in (*LIBRARIES, "resource"):  # what could undo the limits is to be imported anew, which is heard
        sys.modules.pop(name, None)
    take_away()
    refuse(os.path.realpath(os.getcwd()))
    names = {"__name__": "__main__"}
    try:
        exec(compile(program, "<program>", "exec"), names)
    except BaseException as error:  # SystemExit too: whoever leaves has not come to the end
        return f"failed: {type(error).__name__}: {error}"
    return "passed"


def take_away() -> None:
    """Of what no hook hears, the functions; in the module that is written in C too, from which others import them."""
    for module, names in UNHEARD.items():
        for name in names:
            for place in (sys.modules[module], sys.modules["posix" if module == "os" else "_signal"]):
                if hasattr(place, name):
                    setattr(place, name, refusing(f"{module}.{name}"))
    os.supports_dir_fd.clear()  # so that `shutil` names what it removes by paths


def refusing(name: str) -> Callable[..., object]:
    def refused(*arguments: object, **named: object) -> None:
        raise PermissionError(f"the program may not do this: {name}")

    return refused


def refuse(folder: str) -> None:
    """From now on what could reach out of this process raises PermissionError. A hook cannot be taken out again."""
    inside = folder + os.sep

    def outside(path: object) -> bool:
        """Either the entry itself, which is what is removed or renamed, or what it leads to."""
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return True  # a descriptor
        entry = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return not (entry.startswith(inside) and os.path.realpath(path).startswith(inside))

    def check_open(path: int | str | bytes, mode: str | None, flags: int) -> None:
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if flags & WRITING or set(mode or "") & set("wax+"):
            # Of folders that opens nothing but temporary files without a name.
            if os.path.realpath(path) not in (os.devnull, folder) and outside(path):
                raise PermissionError(f"the program may not write {path!r}")
        elif mode is None and os.path.isdir(path):  # `os.open`, which does not say what a path is relative to
            raise PermissionError(f"the program may not open the folder {path!r}")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            check_open(*arguments)
        elif event in CHANGES:
            paths, folders = CHANGES[event]
            if any(outside(arguments[i]) for i in paths) or any(arguments[i] not in (-1, None) for i in folders):
                raise PermissionError(f"the program may not do this: {event}")
        elif event.startswith(REFUSED):
            raise PermissionError(f"the program may not do this: {event}")
        elif event == "import" and arguments[0].partition(".")[0] in LIBRARIES:
            raise ImportError(f"the program may not import {arguments[0]}")  # as libraries expect where it is missing

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
