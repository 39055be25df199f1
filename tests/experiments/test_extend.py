"""The extension: phases as published at another scale, maps of the same needles, and a void result that says so."""

import json
import signal
import subprocess
import sys
import time

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from dsv3_jax.analysis.needles import Grid
from dsv3_jax.config import RopeScaling
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training.journal import read_metrics
from experiments import _cli, _extend, extend
from oracles.compiling import quick_environment
from oracles.micro import micro_settings, set_flags

BASE = preset("needles")
GRID = Grid((256, 1024), (0.0, 1.0), 2)


def test_phases_are_those_of_the_presets():
    first, *later = _extend.phases(BASE, (256, 1024, 4096), steps=150, tokenizer="t.json")
    assert first is BASE and first.model.rope_scaling is None and first.data.tokenizer == "train"
    assert later == [override(preset(name), {"tokenizer": "t.json"}) for name in ("needles_1k", "needles_4k")]
    assert [c.model.rope_scaling for c in later] == [RopeScaling(factor=20.0, original_max_position_embeddings=256)] * 2


def test_maps_reach_from_the_trained_to_the_longest_length_in_doublings():
    assert _extend.measured_lengths((256, 1024, 4096)) == (256, 512, 1024, 2048, 4096)
    assert _extend.measured_lengths((16, 40)) == (16, 32, 40)
    assert _extend.evenly(5) == (0, 0.25, 0.5, 0.75, 1) and _extend.evenly(1) == (0,)


@pytest.mark.parametrize(
    ("settings", "lengths", "grid", "message"),
    [
        ({"rope_scaling": "{}"}, (256, 1024), GRID, "rope_scaling: expected null"),
        ({"retrieval_bytes": 0}, (256, 1024), GRID, "retrieval_bytes: expected more than 0"),
        ({}, (256,), GRID, r"--lengths: expected growing ones, at least 2, the first seq_len=256, got \(256,\)"),
        ({}, (256, 256), GRID, "--lengths: expected growing ones"),
        ({"seq_len": 128}, (256, 1024), GRID, "--lengths: .* the first seq_len=128"),
        ({}, (256, 1024), GRID._replace(samples=0), "--samples, --depths: expected at least 1 needle and 2 depths, got 0"),
        ({}, (256, 1024), GRID._replace(depths=(0.0,)), "--samples, --depths: .* got 2 and 1"),
    ],
)
def test_what_makes_no_extension_is_one_line(settings, lengths, grid, message):
    with pytest.raises(ValueError, match=message) as error:
        _extend.check(override(BASE, settings), lengths, grid)
    assert "\n" not in str(error.value)


def test_a_folder_is_continued_only_with_resume_and_the_same_plan(tmp_path):
    plan = _extend.plan_of(BASE, (256, 1024), 200, GRID)
    _extend.keep_plan(tmp_path / "x", False, plan)
    _extend.keep_plan(tmp_path / "x", True, plan)
    with pytest.raises(ValueError, match="holds an extension already; add --resume"):
        _extend.keep_plan(tmp_path / "x", False, plan)
    for other, name in ((override(BASE, {"seed": 1}), "config"), (BASE, "phase_steps")):
        with pytest.raises(ValueError, match=f"holds another extension: {name} differs"):
            _extend.keep_plan(tmp_path / "x", True, _extend.plan_of(other, (256, 1024), 200 + (other is BASE), GRID))


@pytest.fixture
def program(monkeypatch):
    """`extend` with given maps instead of runs; returns a function that calls it with flags and gives its exit status."""
    if "preset" not in absl_flags.FLAGS:
        _cli.define_config_flags()
    if "phase_steps" not in absl_flags.FLAGS:
        extend.define_flags()

    def call(workdir, maps, *flags):
        monkeypatch.setattr(_extend, "run_phases", lambda *arguments: maps)
        arguments = ["extend", "--preset=needles", f"--workdir={workdir}", *flags]
        with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", arguments)
            _cli.run(extend.main)
        return end.value.code or 0

    return call


FOUND = {"before": [[1.0] * 9] + [[0.1] * 9] * 4, "after phase 2, 4,096": [[1.0] * 9] * 5}


@pytest.mark.parametrize("void", [False, True])
def test_a_void_result_says_so_in_json_and_line_and_its_exit_status_is_1(program, tmp_path, capsys, void):
    maps = {**FOUND, "before": [[0.9] * 9, *FOUND["before"][1:]]} if void else FOUND
    assert program(tmp_path, maps) == (1 if void else 0)
    out = capsys.readouterr().out
    assert ("\nvoid: 90.0 % of needles found at 256 before extension, 95 % needed\n" in out) is void
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 100
    result = json.loads((tmp_path / "needles.json").read_text())
    assert result["void"] is void and result["lengths"] == [256, 512, 1024, 2048, 4096]
    assert (tmp_path / "needles.png").stat().st_size > 10_000


def test_an_interrupted_one_says_how_to_go_on_and_leaves_no_result(program, tmp_path, capsys):
    assert program(tmp_path, None) == _cli.INTERRUPTED
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "needles.json").exists()


def test_lengths_that_are_no_numbers_are_one_line(program, tmp_path, capsys):
    assert program(tmp_path, FOUND, "--lengths=256,1k") == _cli.FAILED
    assert capsys.readouterr().err.strip() == "error: --lengths: expected numbers with commas between them, got '256,1k'"


@pytest.mark.slow
def test_a_toy_extension_killed_in_a_phase_ends_with_the_maps_of_one_never_killed_and_is_void(tmp_path):
    toy = {
        **micro_settings(tmp_path), "steps": "6", "num_nextn_predict_layers": "0", "seq_len": "32", "fim_rate": "0",
        "retrieval_bytes": "20000", "rope_scaling": "null",
    }  # fmt: skip
    env = quick_environment(tmp_path / "compiled")

    def start(workdir):
        flags = ["--lengths=32,64,128", "--phase_steps=4", "--depths=3", "--samples=2", "--resume", f"--workdir={workdir}"]
        command = [sys.executable, "-m", "experiments.extend", "--preset=tiny", *flags, *set_flags(toy)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(process):
        out, err = process.communicate(timeout=900)
        assert process.returncode == extend.VOID, err
        return out

    whole = finish(start(tmp_path / "whole"))
    process = start(tmp_path / "killed")
    while process.poll() is None and len(read_metrics(tmp_path / "killed" / "64")) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "needles.json").exists()
    again = finish(start(tmp_path / "killed"))
    results = [(tmp_path / name / "needles.json").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1] and whole.replace("whole", "killed").splitlines()[-2] == again.splitlines()[-2]
    assert again.splitlines()[-2].startswith("void: ")
    result = json.loads(results[0])
    assert list(result["maps"]) == ["before", "before, YaRN untrained", "after phase 1, 64", "after phase 2, 128"]
    assert result["lengths"] == [32, 64, 128] and all(len(of_map["found"]) == 3 for of_map in result["maps"].values())
    runs = [json.loads((tmp_path / "killed" / name / "run.json").read_text()) for name in ("32", "64", "128")]
    assert [run.get("init") for run in runs] == [None, *(str(tmp_path / "killed" / name) for name in ("32", "64"))]
    assert len({run["data"]["tokenizer"] for run in runs}) == 1
    assert [run["config"]["train"]["batch_size"] for run in runs] == [4, 2, 1]
