"""Two processes of four devices: the same run as one process of eight, and an end that says whose it was."""

import json
import signal
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from dsv3_jax.parallel.processes import GONE, detect
from dsv3_jax.training.journal import read_metrics
from experiments import _cli
from experiments import train as program
from oracles.checkpoint_cells import DIVISIBLE, restore
from oracles.jobs import finish, free_port, running, train_commands, wait_for_records
from oracles.micro import micro_settings, set_flags

PEER_TIMEOUT = 4
STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


def settings(root, **more):
    given = {**micro_settings(root), **DIVISIBLE, "layout": "report", "mesh_expert": 4, **more}
    return set_flags({name: str(value) for name, value in given.items()})


def start(root, workdir, processes=2, **more):
    commands = train_commands(workdir, settings(root, **more), f"--peer_timeout={PEER_TIMEOUT}", processes=processes)
    return running(commands, devices=8 // processes)


@pytest.fixture(scope="module")
def uninterrupted(root):
    """The run in two processes, and the one in one."""
    workdirs = {}
    for processes in (2, 1):
        workdirs[processes] = root / f"{processes}"
        with start(root, workdirs[processes], processes) as job:
            for status, _, err in map(finish, job):
                assert status == 0, err
    return workdirs


def records(workdir):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(workdir)]


def assert_same_run(root, workdir, expected):
    assert records(workdir) == records(expected)
    assert (workdir / "routing.bin").read_bytes() == (expected / "routing.bin").read_bytes()
    ours, theirs = (restore(root, folder / "checkpoints", "one device") for folder in (workdir, expected))
    assert ours.progress == theirs.progress and ours.progress.step == STEPS
    for a, b in zip(*(jax.tree.leaves((c.state, c.ema)) for c in (ours, theirs)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    scores = [json.loads((folder / "validation.json").read_text()) for folder in (workdir, expected)]
    assert scores[0]["raw"] == scores[1]["raw"] and scores[0]["ema"] == scores[1]["ema"]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(root, uninterrupted):
    two, one = uninterrupted[2], uninterrupted[1]
    run = json.loads((two / "run.json").read_text())
    assert run["mesh"] == {
        "layout": "report", "axes": {"pipe": 1, "data": 2, "expert": 4, "tensor": 1}, "devices": 8, "processes": 2,
    }  # fmt: skip
    assert (two / "routing.bin").read_bytes() == (one / "routing.bin").read_bytes(), "counts and bias, bit for bit"
    assert len(read_metrics(two)) == STEPS
    for a, b in zip(read_metrics(two), read_metrics(one), strict=True):
        assert (a["tokens"], a["targets"], a["dead_experts"], a["sequences"]) == (
            b["tokens"], b["targets"], b["dead_experts"], b["sequences"],
        )  # fmt: skip
        # sums over devices in another order: some forty float32 roundings
        for name in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=5e-6)
    for kind in ("raw", "ema"):
        a, b = (json.loads((folder / "validation.json").read_text())[kind]["bits_per_byte"]["all"] for folder in (two, one))
        assert a == pytest.approx(b, rel=5e-6)
    assert (two / "report.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_says_which_and_the_job_resumes_to_the_same_bits(root, tmp_path, uninterrupted, victim):
    with start(root, tmp_path / "run") as job:
        wait_for_records(tmp_path / "run", 3, job)
        job[victim].kill()
        began = time.monotonic()
        status, _, err = finish(job[1 - victim], timeout=PEER_TIMEOUT + 10)
    assert time.monotonic() - began < PEER_TIMEOUT + 5
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "/6 [" not in line]
    assert status == GONE and len(lines) == 1, err
    assert f"error: process {victim} (host " in lines[0] and f"pid {job[victim].pid}) has gone" in lines[0]
    assert "run the same command again with --resume" in lines[0]
    with start(root, tmp_path / "run") as job:
        for status, _, err in map(finish, job):
            assert status == 0, err
    assert_same_run(root, tmp_path / "run", uninterrupted[2])


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_asked_to_stop_stops_both_after_the_same_step(root, tmp_path, uninterrupted, asked):
    with start(root, tmp_path / "run", checkpoint_every=100) as job:
        wait_for_records(tmp_path / "run", 1, job)
        job[1].send_signal(asked)
        results = list(map(finish, job))
    assert [status for status, _, _ in results] == [_cli.INTERRUPTED] * 2, results
    assert "checkpoint saved" in results[0][2] and "checkpoint saved" not in results[1][2]
    done = len(read_metrics(tmp_path / "run"))
    assert 1 <= done < STEPS and [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()] == [done]
    with start(root, tmp_path / "run", processes=1) as job:  # and one process of eight goes on
        status, _, err = finish(job[0])
        assert status == 0, err
    assert (tmp_path / "run" / "routing.bin").read_bytes() == (uninterrupted[2] / "routing.bin").read_bytes()


def test_a_folder_that_only_one_process_sees_is_found_out_by_both(root, tmp_path):
    # cut after the folder, so that each process has one of its own
    commands = train_commands(tmp_path / "run", settings(root), "--peer_timeout=2")
    commands[1] = [argument.replace("/run", "/elsewhere") for argument in commands[1]]
    with running(commands, devices=4) as job:
        results = [finish(process, timeout=120) for process in job]
    for own, (status, _, err) in enumerate(results):
        assert status == GONE, err
        assert f"error: process {1 - own} was never seen in {tmp_path}" in err and "not one that all share" in err


def test_what_one_process_finds_wrong_stops_both_with_its_reason(root, tmp_path):
    # data_streams=1: both would have to read the same documents; found before anything is written
    with start(root, tmp_path / "run", data_streams=1) as job:
        results = [finish(process, timeout=120) for process in job]
    assert {status for status, _, _ in results} <= {_cli.FAILED, GONE} and _cli.FAILED in {status for status, _, _ in results}
    for _, _, err in results:
        assert "data_streams: expected a multiple of 2 that divides 8" in err and "set data_streams=2" in err
        assert len(err.split("error: ")) == 2 and len(err.strip().splitlines()) == 1, err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["processes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=host:1"], "--num_processes: expected together with"),
        (["--num_processes=2", "--process_id=0"], "--coordinator: expected together with"),
        (["--coordinator=host:1", "--num_processes=2", "--process_id=2"], "--process_id: expected 0..1 of 2 processes, got 2"),
        (["--coordinator=host", "--num_processes=2", "--process_id=0"], "--coordinator: expected host:port"),
        (["--coordinator=h:1", "--num_processes=0", "--process_id=0"], "--num_processes: expected at least 1, got 0"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=0", "--peer_timeout=1"],
            "--peer_timeout: expected at least 2",
        ),
        (["--distributed", "--process_id=0"], "--distributed: expected alone"),
        (["--distributed"], "--distributed: found no Slurm step or TPU pod"),
        (["--set=layout=report", "--set=mesh_expert=3"], "mesh: "),
        (
            ["--set=layout=report", "--set=micro_batch_size=2"],
            "micro_batch_size: expected a multiple of 8, the ranks that share",
        ),
    ],
)
def test_flags_that_make_no_job_are_one_line_and_status_2(capsys, root, tmp_path, flags, message):
    if "preset" not in absl_flags.FLAGS:
        _cli.define_config_flags()
    if "coordinator" not in absl_flags.FLAGS:  # another test of this process may have defined the others
        _cli.define_process_flags()
    if "init" not in absl_flags.FLAGS:
        program.define_flags()
    given = set_flags({**micro_settings(root), **{name: str(value) for name, value in DIVISIBLE.items()}})
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["train", f"--workdir={tmp_path / 'run'}", *given, *flags])
        _cli.run(program.main)
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(err) == 1 and err[0].startswith("error: ") and message in err[0]
    assert not (tmp_path / "run").exists()


def test_slurms_variables_are_read_as_a_job(monkeypatch):
    step = {
        "JOB_ID": "4711",
        "STEP_NODELIST": "node[07-08]",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "0",
        "STEP_NUM_NODES": "2",
    }
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, n_processes, process = detect()
    assert address.startswith("node07:") and (n_processes, process) == (2, 1)


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_waits_in_vain_for_the_others_says_so_and_ends(tmp_path, process):
    port = free_port()
    program = (
        f"from dsv3_jax.parallel import processes; processes.ARRIVAL = 2.0; "
        f"processes.start('127.0.0.1:{port}', 2, {process}, {str(tmp_path)!r}, 30.0)"
    )
    with running([["-c", program]], devices=1) as job:
        status, _, err = finish(job[0], timeout=60)
    assert status == _cli.FAILED and len(err.strip().splitlines()) == 1, err
    assert f"error: process {process} of 2: the others were not all there at 127.0.0.1:{port} within 2 s" in err


def test_a_port_that_is_in_use_is_refused_in_one_line(monkeypatch, tmp_path):
    import socket

    from dsv3_jax.parallel import processes

    port = free_port()
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        monkeypatch.setattr(processes, "INTERVAL", 0.0)
        with pytest.raises(ValueError, match=f"--coordinator: port {port} is in use; take another"):
            processes._start_service(port, 2, 100, tmp_path, 0.2)
