"""Programs that end, that do not, and that try what they should not: with namespaces of their own and without."""

import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.evaluation import sandbox
from dsv3_jax.evaluation.sandbox import Limits, run_program

OWN = Limits(seconds=10.0, memory_mb=256)  # what ends, ends at once: long, for a busy machine
BARE = replace(OWN, namespaces=False)


@pytest.fixture(params=[OWN, BARE], ids=["namespaces", "bare"])
def limits(request):
    return request.param


def test_a_program_that_runs_to_its_end_has_passed(limits):
    found = run_program("import math, re, typing\nfor i in range(9):\n    assert i < 9\n", limits)
    assert found.passed and found.result == "passed"
    assert limits.namespaces or found.isolation == ()  # with them, as many as the system permits


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError"),
        ("import sys\nsys.exit(0)\nassert False", "failed: SystemExit: 0"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("import os\nos._exit(0)", "ended early with status 0"),
        ("import os\nos.abort()", "ended early"),
        ("def f(n): return f(n + 1)\nf(0)", "failed: RecursionError"),
    ],
)
def test_leaving_early_is_no_pass_whatever_the_status(program, why, limits):
    found = run_program(program, limits)
    assert not found.passed and why in found.result


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "while True: print('x' * 10**6)",
        "try:\n  while True: pass\nfinally:\n  while True: pass",
    ],
)
def test_a_program_that_does_not_end_is_ended(program, limits):
    began = time.monotonic()
    found = run_program(program, replace(limits, seconds=0.3))
    assert not found.passed and found.result == "timed out"
    assert time.monotonic() - began < 10  # of a busy machine


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_timeout_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match=f"a program's timeout: expected finite seconds > 0, got {seconds}$"):
        Limits(seconds=seconds)


def test_a_flood_of_memory_ends_in_an_error(limits):
    for program in ("x = []\nwhile True: x.append(bytes(10**7))", "x = [0] * 10**12", "x = 'a' * 2**40"):
        found = run_program(program, limits)
        assert not found.passed and "MemoryError" in found.result


def test_a_flood_of_processes_or_threads_does_not_start(limits):
    for program in (
        "import os\nwhile True: os.fork()", "import posix\nwhile True: posix.fork()", "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run(['ls'])", "import _posixsubprocess", "import ctypes",
        "import os\nos.kill(os.getppid(), 9)",
    ):  # fmt: skip
        found = run_program(program, limits)
        assert not found.passed and "the program may not" in found.result, program
    threads = (
        "import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    found = run_program(threads, limits)
    assert not found.passed and "can't start new thread" in found.result


def test_there_is_no_network(limits):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for module in ("socket", "_socket"):
            program = f"import {module} as s\nc = s.socket(s.AF_INET, s.SOCK_STREAM)\nc.connect(('127.0.0.1', {port}))"
            found = run_program(program, limits)
            assert not found.passed and "the program may not do this: socket" in found.result
        found = run_program(f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)", limits)
        assert not found.passed
        with pytest.raises(TimeoutError):
            server.accept()


# What a program does to files: OUT is a folder of others with `file` and an empty `folder`; `link` leads from there to the
# program's own `own`.
OTHERS = """
    open(OUT + '/file', 'w')
    open(OUT + '/file', 'r+')
    open(OUT + '/file', 'ab')
    open(OUT + '/new', 'x')
    open(os.fsencode(OUT + '/new'), 'w')
    open(OUT + '/file', 'w', opener=os.open)
    open('other', 'w', opener=lambda path, flags: os.open(OUT + '/new', flags))
    open('../escaped', 'w')
    open('/proc/self/root' + OUT + '/file', 'w')
    os.chdir(OUT); open('new', 'w')
    os.chdir('/'); os.remove(OUT[1:] + '/file')
    os.open(OUT + '/file', os.O_WRONLY | os.O_TRUNC)
    os.open(OUT + '/file', os.O_RDONLY | os.O_TRUNC)
    os.open(OUT + '/new', os.O_RDONLY | os.O_CREAT)
    os.open(OUT, os.O_RDWR | getattr(os, 'O_TMPFILE', os.O_CREAT))
    d = os.open(OUT, os.O_RDONLY); os.open('file', os.O_WRONLY, dir_fd=d)
    d = os.open('.', os.O_RDONLY); os.open('../new', os.O_WRONLY | os.O_CREAT, dir_fd=d)
    f = open(OUT + '/file'); open(f'/proc/self/fd/{f.fileno()}', 'w')
    f = open(OUT + '/file'); os.open(f'/dev/fd/{f.fileno()}', os.O_WRONLY | os.O_TRUNC)
    open('/proc/self/cwd/../new', 'w')
    pathlib.Path(OUT, 'file').write_text('x')
    pathlib.Path(OUT, 'file').touch()
    pathlib.Path(OUT, 'new').touch()
    pathlib.Path(OUT, 'file').unlink()
    pathlib.Path(OUT, 'file').rename('mine')
    pathlib.Path('own').replace(pathlib.Path(OUT, 'new'))
    pathlib.Path(OUT, 'folder').rmdir()
    pathlib.Path(OUT, 'a/b').mkdir(parents=True)
    pathlib.Path(OUT, 'new').symlink_to('own')
    pathlib.Path(OUT, 'new').hardlink_to('own')
    pathlib.Path(OUT, 'file').chmod(0)
    os.remove(OUT + '/file')
    os.remove(OUT + '/link')
    os.remove('file', dir_fd=9)
    os.unlink('own', dir_fd=0)
    os.rmdir(OUT + '/folder')
    os.rmdir('folder', dir_fd=9)
    os.removedirs(OUT + '/folder')
    os.mkdir(OUT + '/new')
    os.mkdir('new', dir_fd=9)
    os.makedirs(OUT + '/a/b')
    os.rename(OUT + '/file', 'mine')
    os.rename('own', OUT + '/file')
    os.rename('own', '/proc/self/root' + OUT + '/new')
    os.rename('own', 'mine', src_dir_fd=9)
    os.rename('own', 'mine', dst_dir_fd=9)
    os.rename('.', OUT + '/new')
    os.renames('own', OUT + '/new')
    os.replace('own', OUT + '/file')
    os.replace(OUT + '/file', 'mine')
    os.replace(OUT + '/link', 'mine')
    os.truncate(OUT + '/file', 0)
    os.utime(OUT + '/file', (0, 0))
    os.utime(OUT + '/link', (0, 0), follow_symlinks=False)
    os.utime('own', (0, 0), dir_fd=9)
    os.utime(open(OUT + '/file').fileno(), (0, 0))
    os.chmod(OUT + '/file', 0)
    os.fchmod(open(OUT + '/file').fileno(), 0)
    os.chown(OUT + '/file', os.getuid(), os.getgid())
    os.lchown(OUT + '/file', os.getuid(), os.getgid())
    os.link(OUT + '/file', 'mine')
    os.link('own', OUT + '/new')
    os.symlink(OUT, 'link')
    os.symlink('own', OUT + '/new')
    os.mkfifo(OUT + '/new')
    os.mknod(OUT + '/new')
    os.mknod('new', dir_fd=9)
    os.chroot(OUT)
    os.setxattr(OUT + '/file', 'user.x', b'x')
    os.removexattr(OUT + '/file', 'user.x')
    posix.mkfifo(OUT + '/new')
    posix.rename('own', OUT + '/file')
    fcntl.ioctl(open(OUT + '/file'), 0x80086601, bytes(8))
    shutil.move('own', OUT + '/new')
    shutil.move('own', OUT)
    shutil.move(OUT + '/file', 'mine')
    shutil.copyfile('own', OUT + '/file')
    shutil.copy('own', OUT)
    shutil.copytree('.', OUT + '/new')
    shutil.copystat('own', OUT + '/file')
    shutil.rmtree(OUT)
    shutil.rmtree(OUT + '/folder')
    shutil.rmtree('.')
    shutil.make_archive(OUT + '/new', 'zip', '.')
    shutil.chown(OUT + '/file', os.getuid())
    tempfile.mkdtemp(dir=OUT)
    tempfile.NamedTemporaryFile(dir=OUT)
    sqlite3.connect(OUT + '/new')
    sqlite3.connect(':memory:').execute(f"attach '{OUT}/new' as other")
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = OUT + '/new'
    import _posixshmem
    import _multiprocessing
    import _dbm
    import _gdbm
    import _tkinter
    import readline
    import _xxsubinterpreters; _xxsubinterpreters.create()
    import ctypes; ctypes.CDLL(None).unlink(os.fsencode(OUT + '/file'))
    signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.sched_setparam(0, os.sched_getparam(0))
    os.sched_setscheduler(0, os.sched_getscheduler(0), os.sched_getparam(0))
    sys.audit('os.chflags', OUT + '/file', 0)
    sys.audit('os.remove', '/dev/null', -1)
    sys.audit('os.rename', 'own', '/dev/null', -1, -1)
"""
OWN_FILES = """
    open('new', 'w').write('x'); assert open('new').read() == 'x'
    open('/dev/null', 'w').write('x'); os.close(os.open(b'/dev/null', os.O_WRONLY))
    os.rename('new', 'other'); os.replace('other', 'new'); os.truncate('new', 0); os.utime('new'); os.remove('new')
    os.makedirs('a/b'); pathlib.Path('a/b/c').touch(); os.chdir('a/b'); os.rename('c', '../../d'); os.chdir(HOME)
    pathlib.Path(HOME, 'd').rename('a/d'); pathlib.Path('a/d').unlink(); os.rmdir('a/b'); pathlib.Path('a').rmdir()
    os.mkdir(b'a'); open(b'a/x', 'wb').close(); shutil.move(pathlib.Path('a'), 'b'); shutil.rmtree(pathlib.Path('b'))
    folder = tempfile.TemporaryDirectory(); open(folder.name + '/x', 'w').close(); folder.cleanup()
    tempfile.NamedTemporaryFile().write(b'x'); tempfile.TemporaryFile().write(b'x')
    f = open('g', 'w+'); f.write('xx'); f.truncate(1); open(f.fileno(), 'a', closefd=False).write('x')
    assert open(OUT + '/file').read() == 'kept' and os.listdir(OUT) and list(os.walk(OUT)) and os.path.isdir(OUT)
    with contextlib.suppress(IsADirectoryError): open('.')
    shutil.copyfile(OUT + '/file', 'h'); assert open('h').read() == 'kept'
"""
TRY_ALL = """
import contextlib, fcntl, os, pathlib, posix, shutil, signal, sqlite3, ssl, sys, tempfile
OUT, HOME, wrong = {out!r}, os.getcwd(), []
for line in {lines!r}.strip().splitlines():
    os.chdir(HOME)
    open('own', 'w').close()
    try:
        exec(line.strip())
    except BaseException as error:
        refused = any(said in str(error) for said in ('the program may not', 'interpreter creation failed'))
        if not ({refused} and refused):
            wrong.append(line.strip() + ': ' + repr(error))
    else:
        if {refused}:
            wrong.append(line.strip())
assert not wrong, '; '.join(wrong)
"""


@pytest.fixture
def others(tmp_path):
    """The folder OUT; and what is in it and beside it, with modes and times."""
    out = tmp_path / "others"
    (out / "folder").mkdir(parents=True)
    (out / "file").write_text("kept")
    (out / "link").symlink_to("/proc/self/cwd/own")

    def state():
        paths = sorted(tmp_path.rglob("*"))
        stats = [(path, path.lstat()) for path in paths]
        kept = [(str(p), s.st_mode, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats]
        return kept, (out / "file").read_text()

    return out, state


def test_files_of_others_stay_as_they_are_however_a_program_changes_them(others, limits):
    out, state = others
    before = state()
    found = run_program(TRY_ALL.format(out=str(out), lines=OTHERS, refused=True), limits)
    assert found.result == "passed"
    assert state() == before


def test_a_program_does_with_its_own_files_what_it_wants_and_reads_those_of_others(others, limits):
    out, state = others
    before = state()
    found = run_program(TRY_ALL.format(out=str(out), lines=OWN_FILES, refused=False), limits)
    assert found.result == "passed"
    assert state() == before


def test_a_file_has_a_largest_size(limits):
    found = run_program("with open('own', 'w') as f:\n    while True: f.write('x' * 10**5)", limits)
    assert not found.passed and ("File too large" in found.result or "status" in found.result)


def test_the_folder_and_the_environment_are_empty_and_the_folder_goes(limits, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import os, sys\nassert os.listdir('.') == []\nassert 'SECRET' not in os.environ\nassert sys.stdin.read() == ''"
    assert run_program(program, limits).result == "passed"
    assert list(tmp_path.iterdir()) == []


def test_programs_leave_no_descriptor_open():
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    for _ in range(3):
        run_program("pass", OWN)
    run_program("while True: pass", replace(OWN, seconds=0.2))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_process_is_gone_when_its_verdict_is_there(limits, monkeypatch):
    started = []
    popen = subprocess.Popen

    def recorded(*args, **how):
        started.append(popen(*args, **how))
        return started[-1]

    monkeypatch.setattr(sandbox.subprocess, "Popen", recorded)
    for program in ("pass", "while True: pass"):
        run_program(program, replace(limits, seconds=0.3))
    assert len(started) == 2
    for process in started:
        assert process.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
