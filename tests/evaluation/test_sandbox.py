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


def test_files_outside_of_its_folder_stay_as_they_are(tmp_path, limits):
    victim = tmp_path / "file"
    victim.write_text("kept")
    name = repr(str(victim))
    for program in (
        f"open({name}, 'w').write('x')", f"open({name}, 'r+').write('x')", f"import os\nos.remove({name})",
        f"import os\nos.open({name}, os.O_WRONLY | os.O_TRUNC)", f"import os\nos.rename({name}, 'here')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})", f"import os\nos.truncate({name}, 0)", "open('../escaped', 'w')",
        f"import os\nos.symlink({name}, 'link')", f"import os\nos.chmod({name}, 0)",
    ):  # fmt: skip
        found = run_program(program, limits)
        assert not found.passed and "the program may not" in found.result, program
    assert victim.read_text() == "kept"
    assert run_program(
        "open('own', 'w').write('x')\nassert open('own').read() == 'x'\nimport os\nos.remove('own')", limits
    ).passed


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
