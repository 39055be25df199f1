"""The run around the step: exact resumption, records, interruption, what is not finite, errors of one line."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training import loop, schedules
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.ema import init_ema
from dsv3_jax.training.journal import Journal, read_metrics, read_routing
from dsv3_jax.training.loop import train
from dsv3_jax.training.optimizer import OptState
from experiments import _cli
from experiments import train as program
from oracles.compiling import quick_environment
from oracles.micro import STEPS, micro_config, micro_settings, set_flags


def quiet_train(config, workdir, **options):
    return train(config, workdir, header=False, progress=False, **options)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def records(workdir):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(workdir)]


def assert_same_run(reference, workdir, state=None, ema=None):
    """Parameters, optimiser, bias, average, records and scores, bit for bit."""
    if state is None:
        with Checkpoints(workdir / "checkpoints", reference.config) as checkpoints:
            restored = checkpoints.restore(reference.result.state, init_ema(reference.result.state.params))
        state, ema = restored.state, restored.ema
    assert bits(state) == bits(reference.result.state)
    assert bits(ema) == bits(reference.result.ema)
    assert records(workdir) == records(reference.workdir)
    assert (workdir / "routing.bin").read_bytes() == (reference.workdir / "routing.bin").read_bytes()
    validation = json.loads((workdir / "validation.json").read_text())
    validation.pop("baselines", None)  # the report's share
    assert validation == reference.result.validation


def test_a_run_resumed_at_every_step_equals_one_never_stopped(reference, tmp_path):
    weights = []
    for step in range(1, STEPS + 1):
        result = quiet_train(reference.config, tmp_path, resume=True, step_limit=step)
        assert result.step == step and not result.interrupted
        weights.append(jax.tree.map(np.asarray, result.state.params))
    assert_same_run(reference, tmp_path, result.state, result.ema)
    # The average's definition, over the parameters after each step: decay 0.98 in this preset.
    share = 0.98 ** np.arange(STEPS)[::-1]
    expected = jax.tree.map(lambda *w: np.einsum("s,s...->...", share / share.sum(), np.array(w, np.float64)), *weights)
    for ours, oracle in zip(jax.tree.leaves(result.ema.average), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-5, atol=1e-7)  # six float32 updates


def test_records_ahead_of_the_checkpoint_are_cut_back_and_torn_lines_tolerated(reference, tmp_path):
    quiet_train(reference.config, tmp_path, step_limit=3)
    shutil.rmtree(tmp_path / "checkpoints" / "3")  # as if killed after step 3 was written down, before it was saved
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.')
    result = quiet_train(reference.config, tmp_path, resume=True)
    assert_same_run(reference, tmp_path, result.state, result.ema)


def test_the_records_agree_with_each_other_and_with_the_schedules(reference):
    config, lines = reference.config, read_metrics(reference.workdir)
    total = schedules.total_tokens(config)
    rows = read_routing(reference.workdir, 2, 4)
    tokens = 0
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) == rows["step"].tolist()
    for line, load in zip(lines, rows["load"], strict=True):
        assert line["sequences"] == schedules.batch_sequences(config.train, tokens, total)
        assert line["learning_rate"] == schedules.learning_rate(config.train, tokens, total, line["step"])
        assert line["mtp_loss_weight"] == schedules.mtp_loss_weight(config.train, tokens, total)
        tokens += line["sequences"] * config.data.seq_len
        assert line["tokens"] == tokens
        np.testing.assert_allclose(line["max_vio"], load.max(axis=1) / load.mean(axis=1) - 1, rtol=1e-6)
        assert line["dead_experts"] == (load == 0).sum(axis=1).tolist()
        # every token of the main layer chooses num_experts_per_tok experts; padding rows of the ramp none
        assert load[0].sum() == 2 * line["sequences"] * config.data.seq_len
        parts = [line["main_loss"], line["mtp_loss_weight"] * line["mtp_loss"], line["balance_loss"]]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert line["nonfinite"] == [] and line["skipped"] == 0
    assert lines[0]["sequences"] < lines[-1]["sequences"], "the ramp is part of this run"
    # the bias moved by its speed, up or down, wherever the load was off the mean
    before = np.concatenate([np.zeros((1, 2, 4), np.float32), rows["bias"][:-1]])
    off = rows["load"].mean(axis=2, keepdims=True) - rows["load"]
    speed = np.array([line["bias_update_speed"] for line in lines])[:, None, None]
    np.testing.assert_allclose(rows["bias"] - before, speed * np.sign(off), atol=1e-7)
    assert lines[-1]["bias_update_speed"] == 0 < lines[0]["bias_update_speed"]


def test_validation_scores_raw_and_averaged_weights_on_every_domain(reference):
    validation = json.loads((reference.workdir / "validation.json").read_text())
    assert validation == reference.result.validation
    n_bytes = validation["eval_bytes"]
    assert set(n_bytes) == {"code", "prose", "verse"} and min(n_bytes.values()) > 0
    for scores in (validation["raw"], validation["ema"]):
        mean = sum(scores["bits_per_byte"][d] * n for d, n in n_bytes.items()) / sum(n_bytes.values())
        assert scores["bits_per_byte"]["all"] == pytest.approx(mean, rel=1e-12)
        assert all(0 < x < np.log(2 * 400) for x in scores["loss"].values())
    assert validation["raw"] != validation["ema"]


def test_the_runs_description_holds_config_versions_and_corpus(reference):
    run = json.loads((reference.workdir / "run.json").read_text())
    assert run["total_steps"] == STEPS and run["versions"]["jax"] == jax.__version__
    assert len(run["data"]["domains"]["code"]["sha256"]) == 64
    assert any("n_group = 1 (published: 8)" in line for line in run["recipe_differences"])


def test_a_folder_with_a_run_is_refused_without_resume_and_an_empty_one_accepted_with_it(reference, tmp_path):
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        quiet_train(reference.config, reference.workdir)
    assert quiet_train(reference.config, tmp_path / "new" / "folder", resume=True, step_limit=1).step == 1


def test_a_model_that_no_device_here_holds_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"take 5,\d\d\d GB, this device holds .* GB; take a smaller --preset"):
        quiet_train(preset("deepseek_v3_671b"), tmp_path / "run")  # 684.5 G parameters, 4 + 2 + 2 bytes each
    assert not (tmp_path / "run").exists()


def test_resuming_on_a_changed_corpus_is_refused_and_names_the_domain(reference, tmp_path):
    shutil.copytree(reference.workdir, tmp_path / "run")
    file = reference.root / "corpus" / "prose" / "0.txt"
    text = file.read_text()
    try:
        file.write_text(text + "One more line.\n")
        with pytest.raises(ValueError, match=r"corpus has changed since the run began \(domain prose\)"):
            quiet_train(reference.config, tmp_path / "run", resume=True)
    finally:
        file.write_text(text)


def test_resuming_with_another_config_is_one_line_and_touches_nothing(reference, tmp_path):
    shutil.copytree(reference.workdir, tmp_path / "run")
    with pytest.raises(ValueError, match="another config: steps=6, now 7 .*learning_rate=0.004, now 0.1"):
        quiet_train(override(reference.config, {"steps": 7, "learning_rate": 0.1}), tmp_path / "run", resume=True)
    assert_same_run(reference, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(reference, tmp_path):
    shutil.copytree(reference.workdir, tmp_path / "run")
    result = quiet_train(reference.config, tmp_path / "run", resume=True)
    assert_same_run(reference, tmp_path / "run", result.state, result.ema)


def interrupt_in_step(monkeypatch, step, times):
    """Ctrl-C arrives `times` times while step number `step` is being computed."""
    plain = loop.compiled_steps

    def patched(config, n_domains):
        train_step, eval_step = plain(config, n_domains)

        def interrupted_step(state, batch, hyper):
            if int(state.step) + 1 == step:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            return train_step(state, batch, hyper)

        return interrupted_step, eval_step

    monkeypatch.setattr(loop, "compiled_steps", patched)


def test_ctrl_c_finishes_the_step_and_saves_it(reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, step=3, times=1)
        result = quiet_train(reference.config, tmp_path)
    assert result.interrupted and result.step == 3 and result.validation is None
    assert len(read_metrics(tmp_path)) == 3
    result = quiet_train(reference.config, tmp_path, resume=True)
    assert_same_run(reference, tmp_path, result.state, result.ema)


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_stays(reference, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a job in the background of a shell ignores it
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, step=4, times=2)
        with pytest.raises(KeyboardInterrupt):
            quiet_train(reference.config, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    result = quiet_train(reference.config, tmp_path, resume=True)
    assert_same_run(reference, tmp_path, result.state, result.ema)


def poison(monkeypatch, *steps):
    """NaN reaches loss and gradients through the MTP weight of these steps."""
    plain = loop._hyper

    def patched(config, progress, total):
        hyper = plain(config, progress, total)
        return {**hyper, "mtp_loss_weight": float("nan")} if progress.step + 1 in steps else hyper

    monkeypatch.setattr(loop, "_hyper", patched)


def test_what_is_not_finite_is_skipped_counted_and_named(reference, tmp_path, monkeypatch):
    config = override(reference.config, {"ema_decay": 0.0})
    poison(monkeypatch, 3, 5)
    states = [quiet_train(config, tmp_path, resume=True, step_limit=k).state for k in (2, 3, 4)]
    assert bits((states[0].params, states[0].opt_state, states[0].bias)) == bits(
        (states[1].params, states[1].opt_state, states[1].bias)
    )
    assert bits(states[1].params) != bits(states[2].params)
    state = quiet_train(config, tmp_path, resume=True).state
    lines = read_metrics(tmp_path)
    assert [line["nonfinite"] for line in lines] == [[], [], ["loss", "grad_norm"], [], ["loss", "grad_norm"], []]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 2, 2] and int(state.skipped_total) == 2
    assert lines[2]["loss"] is None and lines[2]["mtp_loss"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_too_many_skips_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(reference, tmp_path, monkeypatch):
    config = override(reference.config, {"nonfinite_limit": 2})
    with monkeypatch.context() as patch:
        poison(patch, 3, 4, 5)
        with pytest.raises(
            FloatingPointError, match="step 4: loss and grad_norm not finite; 2 updates in a row skipped"
        ) as error:
            quiet_train(config, tmp_path)
    assert "\n" not in str(error.value)
    with Checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        assert checkpoints.latest() == 2
    result = quiet_train(config, tmp_path, resume=True)
    assert_same_run(reference, tmp_path, result.state, result.ema)


def test_a_full_disk_while_writing_records_leaves_the_last_checkpoint(reference, tmp_path, monkeypatch):
    plain = Journal.write

    def full(self, record, load, bias):
        if record["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, record, load, bias)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", full)
        with pytest.raises(OSError, match="No space left"):
            quiet_train(reference.config, tmp_path)
    result = quiet_train(reference.config, tmp_path, resume=True)
    assert_same_run(reference, tmp_path, result.state, result.ema)


def test_periodic_validation_is_part_of_the_records_and_changes_nothing_else(reference, tmp_path):
    result = quiet_train(override(reference.config, {"eval_every": 3}), tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "validation" in line] == [3, 6]
    assert lines[5]["validation"] == result.validation["raw"]
    assert bits(result.state) == bits(reference.result.state)


def test_bf16_parameters_are_averaged_at_full_precision():
    params, master = {"w": np.zeros(1)}, {"w": np.ones(1)}
    state = loop.TrainState(params, OptState(params, params, master, 0), None, 0, 0, 0)
    assert loop.master_weights(state) is master
    assert loop.master_weights(state._replace(opt_state=state.opt_state._replace(master=None))) is params


# --- the program, in a process of its own


def start_program(reference, workdir, *flags, before=()):
    """`experiments.train` with the reference's settings; it finds its programs compiled by the reference run."""
    env = quick_environment(reference.root / "compiled")
    env["JAX_NUM_CPU_DEVICES"] = str(jax.local_device_count())  # a program's key in the cache depends on it, as on the rest
    command = [sys.executable, "-m", "experiments.train", "--preset=tiny", f"--workdir={workdir}", "--resume"]
    command = [*before, *command, *set_flags(micro_settings(reference.root)), *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def kill_after(process, workdir, n_lines, delay):
    """SIGKILL, `delay` seconds after so many records are there (or the process has ended)."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_text().count("\n") < n_lines):
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_run_killed_and_resumed_has_the_parameters_of_one_never_killed(reference, tmp_path):
    kill_after(start_program(reference, tmp_path), tmp_path, n_lines=3, delay=0.0)
    code, out, err = finish(start_program(reference, tmp_path))
    assert code == 0, err
    assert_same_run(reference, tmp_path)
    assert "bits per byte on held-out text" in out
    assert [line for line in out.splitlines() if len(line) > 100 and str(tmp_path) not in line] == []
    for name in ("report.md", "losses.png", "max_vio.png", "bias.png", "load.png", "domains.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "`lzma`" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_has_the_parameters_of_one_never_killed(reference, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(8):
        process = start_program(reference, tmp_path, "--set=checkpoint_every=1")
        n_lines = int(rng.integers(0, STEPS))
        kill_after(process, tmp_path, n_lines, delay=float(rng.uniform(0, 0.3 if n_lines else 6)))
    code, _, err = finish(start_program(reference, tmp_path))
    assert code == 0, err
    assert_same_run(reference, tmp_path)


def test_a_full_disk_under_a_checkpoint_is_one_line_and_the_run_goes_on_when_there_is_room(reference, tmp_path):
    quiet_train(reference.config, tmp_path, step_limit=2)
    # Blocks of 512 or 1024 bytes: room for the records, not for a checkpoint's arrays.
    limited = ("sh", "-c", 'ulimit -f 64 && exec "$@"', "sh")
    code, _, err = finish(start_program(reference, tmp_path, before=limited))
    assert code == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: checkpoint under") and "too large" in line and "complete ones stay" in line
    assert [text for text in err.splitlines() if text.strip() and "/6 [" not in text] == [line], "the bar and one line"
    result = quiet_train(reference.config, tmp_path, resume=True)
    assert_same_run(reference, tmp_path, result.state, result.ema)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset=nope"], "unknown preset 'nope'; expected one of"),
        (["--set=learning_rat=1"], "unknown setting 'learning_rat'; nearest: learning_rate"),
        (["--set=steps"], "--set: expected name=value, got 'steps'"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["stray"], "unexpected argument 'stray'"),
        (["--workdir="], "--workdir: expected a folder"),
        (["--workdir=/dev/null/run"], "/dev/null"),
        (["--set=corpus=/nowhere/*.txt"], "/nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_status_2(capsys, flags, message, reference, tmp_path):
    settings = set_flags(micro_settings(reference.root))
    if "preset" not in absl_flags.FLAGS:  # else by another test of this process, perhaps without the next
        _cli.define_config_flags()
    if "coordinator" not in absl_flags.FLAGS:
        _cli.define_process_flags()
    if "init" not in absl_flags.FLAGS:
        program.define_flags()
    with flagsaver.flagsaver():
        with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train", f"--workdir={tmp_path / 'run'}", *settings, *flags])
            _cli.run(program.main)
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert err[-1].startswith("error: ") and message in err[-1] and len(err) == 1


def test_the_micro_run_is_what_the_reference_ran(reference):
    assert micro_config(reference.root) == reference.config
