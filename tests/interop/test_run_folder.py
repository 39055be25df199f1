"""A training run's checkpoint under released names: loaded, averaged, and written in the released format."""

import shutil

import jax
import numpy as np
import pytest

from dsv3_jax.inference.loaded import load
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.source import open_source
from oracles.checks_loader import check_same_parameters
from oracles.released_folder import multiplied_out
from oracles.safetensors_reader import read_safetensors


def test_the_parameters_of_a_run_are_those_of_its_newest_checkpoint(run):
    loaded = load(run.workdir)
    check_same_parameters(loaded.params, run.params)
    np.testing.assert_array_equal(loaded.bias_LE, run.bias)
    assert loaded.config.compute_dtype == "float32" and loaded.config.num_nextn_predict_layers == 1
    check_same_parameters(load(run.workdir / "checkpoints").params, loaded.params)


def test_a_step_of_a_run_is_taken_by_its_folder(run, monkeypatch):
    zeros = load(run.workdir / "checkpoints" / "2").params
    check_same_parameters(zeros, jax.tree.map(np.zeros_like, run.params))
    monkeypatch.chdir(run.workdir / "checkpoints")
    source = open_source("10")
    check_same_parameters(load("10").params, run.params)
    assert source.folder == run.workdir and source.tensors.run_folder == run.workdir
    with pytest.raises(ValueError, match="3: expected a checkpoint's folder, got nothing"):
        open_source("3")


def test_the_average_of_a_run_is_loaded_on_request(run):
    check_same_parameters(load(run.workdir, average=True).params, jax.tree.map(lambda p: p * np.float32(0.5), run.params))


@pytest.mark.parametrize("format", ["hf", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_run_is_written_in_either_format_and_comes_back(run, tmp_path, format):
    convert(open_source(run.workdir), tmp_path / format, format=format)
    loaded = load(tmp_path / format)
    check_same_parameters(loaded.params, load(run.workdir).params)
    np.testing.assert_array_equal(loaded.bias_LE, run.bias)
    assert loaded.config == load(run.workdir).config and (loaded.tokenizer is None) is (load(run.workdir).tokenizer is None)


def test_a_released_matrix_is_ours_with_its_sides_turned(run, tmp_path):
    convert(open_source(run.workdir), tmp_path / "hf")
    written = multiplied_out(read_safetensors(tmp_path / "hf" / "model.safetensors"))
    down = run.params["moe_layers"]["mlp"]["experts"]["down_proj"][0, 3]
    np.testing.assert_array_equal(written["model.layers.1.mlp.experts.3.down_proj.weight"], down.T)
    np.testing.assert_array_equal(written["model.layers.2.enorm.weight"], run.params["mtp"]["enorm"][0])


def test_what_is_no_run_is_refused(run, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected a run with a complete checkpoint, found none"):
        load(tmp_path / "empty")
    shutil.copytree(run.workdir / "checkpoints", tmp_path / "damaged" / "checkpoints")
    newest = max((tmp_path / "damaged" / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdecimal() else -1)
    shutil.rmtree(newest / "ema")
    with pytest.raises(ValueError, match="the run kept no average"):
        load(tmp_path / "damaged", average=True)
    (newest / "meta" / "metadata").write_text("{")
    with pytest.raises(ValueError, match="damaged") as error:
        load(tmp_path / "damaged")
    assert "\n" not in str(error.value)
