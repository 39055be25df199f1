"""The comparison's plan: same data for both arms, one number of steps, nothing computed twice."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from dsv3_jax.presets import preset
from dsv3_jax.training.journal import read_metrics
from experiments import _cli, compare
from oracles.compiling import quick_environment
from oracles.micro import micro_settings, set_flags

BASE = preset("tiny")


def test_arms_are_parsed_with_functions_from_outside_and_commas_inside_brackets():
    arms = compare.parse_arms("controller=sign,my_package.ideas:push", BASE)
    assert list(arms) == ["controller=sign", "controller=my_package.ideas:push"]
    assert [c.train.controller for c in arms.values()] == ["sign", "my_package.ideas:push"]
    arms = compare.parse_arms('rope_scaling=null,{"factor": 4.0, "mscale": 0.7}', BASE)
    assert [c.model.rope_scaling and c.model.rope_scaling.factor for c in arms.values()] == [None, 4.0]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("controller=sign", "at least 2 values"),
        ("controller", "at least 2 values"),
        ("controller=sign,", "at least 2 values"),
        ("controller=sign,sign", "same value twice"),
        ("contoller=sign,none", "unknown setting 'contoller'; nearest: controller"),
        ("n_group=4,3", "n_group: expected a divisor"),
        ("seed=1,2", "--seeds"),
    ],
)
def test_bad_arms_are_refused_in_one_line(vary, message):
    with pytest.raises(ValueError, match=message) as error:
        compare.parse_arms(vary, BASE)
    assert "\n" not in str(error.value)


def test_a_seed_sets_initialisation_and_data_alike_for_every_arm():
    for config in compare.parse_arms("controller=sign,none", BASE).values():
        seeded = compare.seeded(config, 2)
        assert (seeded.train.seed, seeded.data.data_seed) == (2, 2)


def test_the_budget_becomes_steps_after_validations_are_paid_for():
    timings = [{"step": 0.5, "fixed": 10.0}, {"step": 1.5, "fixed": 20.0}]
    # 3 seeds x 30 s are fixed, 3 x 2 s a step, taken to be 15 % slower: 600 = 90 + 73.9 x 6.9
    assert compare.steps_within(600, timings, seeds=3) == 73
    with pytest.raises(ValueError, match="10 steps of every run take about 2.6 minutes"):
        compare.steps_within(100, timings, seeds=3)


@pytest.fixture
def program(monkeypatch):
    """`compare` on faked runs; returns a function that calls it with flags and gives (exit status, runs begun)."""
    begun = []
    stop_after = [None]

    def fake_train(config, workdir, **options):
        begun.append((config.train.controller, config.train.seed, config.data.data_seed, config.train.steps))
        if len(begun) == stop_after[0]:
            return SimpleNamespace(interrupted=True)
        workdir.mkdir(parents=True)
        score = config.train.seed + (0.5 if config.train.controller == "none" else 0.0)
        lines = [{"step": s, "main_loss": 1 / s, "max_vio_mean": score, "seconds": 1.0} for s in (1, 2, 3)]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        raw = {"bits_per_byte": {"all": score}, "loss": {"all": score}}
        (workdir / "validation.json").write_text(json.dumps({"raw": raw}))
        return SimpleNamespace(interrupted=False)

    def call(workdir, *flags, stop=None):
        begun.clear()
        stop_after[0] = stop
        arguments = ["compare", "--preset=tiny", f"--workdir={workdir}", "--vary=controller=sign,none", *flags]
        with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", arguments)
            _cli.run(compare.main)
        return end.value.code or 0, list(begun)

    monkeypatch.setattr(compare, "train", fake_train)
    if "preset" not in absl_flags.FLAGS:
        _cli.define_config_flags()
    if "seeds" not in absl_flags.FLAGS:
        compare.define_run_flags()
    if "vary" not in absl_flags.FLAGS:
        compare.define_flags()
    return call


def test_both_arms_of_a_seed_run_before_the_next_seed_with_equal_seeds_and_steps(program, tmp_path):
    code, begun = program(tmp_path / "c", "--seeds=2", "--set=steps=7")
    assert code == 0
    assert begun == [("sign", 0, 0, 7), ("none", 0, 0, 7), ("sign", 1, 1, 7), ("none", 1, 1, 7)]
    result = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert result["differences"]["controller=none"]["bits_per_byte"] == {"pairs": [0.5, 0.5], "mean": 0.5, "half_width_95": 0.0}
    assert (tmp_path / "c" / "compare.png").exists()


def test_a_resumed_comparison_computes_no_finished_run_again(program, tmp_path):
    code, begun = program(tmp_path, "--seeds=2", "--set=steps=7", stop=3)
    assert code == 130 and len(begun) == 3 and not (tmp_path / "compare.json").exists()
    code, begun = program(tmp_path, "--seeds=2", "--set=steps=7", "--resume")
    assert code == 0 and begun == [("sign", 1, 1, 7), ("none", 1, 1, 7)]
    code, begun = program(tmp_path, "--seeds=2", "--set=steps=7", "--resume")
    assert code == 0 and begun == []


def test_the_plan_of_a_budget_is_timed_once_and_kept(program, tmp_path, capsys):
    code, begun = program(tmp_path, "--seeds=1", "--budget=1")
    # 60 s, 2 arms x 1 s a step, the fake's own milliseconds on top
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and 25 <= plan["steps"] <= 30
    assert [steps for *_, steps in begun] == [compare.TIMED_STEPS] * 4 + [plan["steps"]] * 2
    code, begun = program(tmp_path, "--seeds=1", "--budget=30", "--resume")
    assert code == 0 and begun == [], "a resumed comparison keeps its number of steps"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set=steps=7"], "holds a comparison already; add --resume"),
        (["--set=steps=7", "--resume", "--seeds=3"], "another comparison: seeds differs"),
        (["--set=steps=8", "--resume"], "another comparison: config differs"),
        (["--set=steps=7", "--resume", "--vary=controller=none,sign"], "another comparison: arms differs"),
        (["--set=steps=7", "--seeds=0"], "--seeds: expected at least 1, got 0"),
        (["--resume"], "--budget: expected finite minutes > 0"),
        (["--budget=nan"], "--budget: expected finite minutes > 0 (or --set=steps=...), got nan"),
        (["--budget=inf"], "--budget: expected finite minutes > 0 (or --set=steps=...), got inf"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(program, tmp_path, capsys, flags, message):
    program(tmp_path, "--seeds=2", "--set=steps=7")
    capsys.readouterr()
    code, begun = program(tmp_path, "--seeds=2", *flags)
    err = capsys.readouterr().err.strip()
    assert code == 2 and begun == [] and err.startswith("error: ") and message in err and "\n" not in err


@pytest.mark.slow
def test_a_comparison_killed_in_the_middle_ends_with_the_result_of_one_never_killed(tmp_path):
    settings = set_flags({**micro_settings(tmp_path), "steps": "6"})
    env = quick_environment(tmp_path / "compiled")

    def start(workdir):
        command = ["--preset=tiny", "--vary=controller=sign,none", "--seeds=2", f"--workdir={workdir}", "--resume", *settings]
        return subprocess.Popen([sys.executable, "-m", "experiments.compare", *command], env=env)

    assert start(tmp_path / "whole").wait(timeout=600) == 0
    process = start(tmp_path / "killed")
    second = tmp_path / "killed" / "1-controller=none" / "seed-0"
    while process.poll() is None and len(read_metrics(second)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(tmp_path / "killed").wait(timeout=600) == 0
    whole, killed = ((tmp_path / name / "compare.json").read_text() for name in ("whole", "killed"))
    assert whole == killed
    assert json.loads(whole)["differences"]["controller=none"]["bits_per_byte"]["mean"] != 0


def test_without_a_workdir_the_folder_is_named_after_the_question(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program("", "--seeds=1", "--set=steps=7")[0] == 0
    assert (tmp_path / "runs" / "compare-tiny-controller=sign_none" / "compare.json").exists()
