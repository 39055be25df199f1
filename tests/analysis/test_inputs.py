"""Folders that a notebook is given: read as they were written, or refused in one line."""

import jax
import numpy as np
import pytest

from dsv3_jax.analysis import inputs
from dsv3_jax.model.module import init_variables
from dsv3_jax.settings import override
from oracles.checks_loader import check_same_parameters
from oracles.micro import micro_config
from oracles.run_folders import write_checkpoints, write_run

STEPS = 3


def refused(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_named_folders_keep_their_order_and_what_else_is_in_a_path():
    found = inputs.named_folders("RUNS", " b = x/0-controller=sign/seed-0 ,a=y")
    assert [(name, str(path)) for name, path in found.items()] == [("b", "x/0-controller=sign/seed-0"), ("a", "y")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("folder", "RUNS: expected name=folder,name=folder,..., got 'folder'"),
        ("a=x,", "RUNS: expected name=folder,name=folder,..., got 'a=x,'"),
        ("=x", "RUNS: expected name=folder,name=folder,..., got '=x'"),
        ("a=x,a=y", "RUNS: the name 'a' comes twice; give each folder its own"),
        ("a=x", "RUNS: expected at least 2 folders, got 1: 'a=x'"),
    ],
)
def test_what_names_no_folders_is_refused(text, said):
    assert refused(inputs.named_folders, "RUNS", text, 2) == said


def test_a_run_is_read_as_it_was_written(tmp_path):
    config = micro_config(tmp_path)
    run = inputs.read_run(write_run(tmp_path / "run", config, STEPS))
    assert run.config == config and run.layers == ("1", "mtp 1") and run.step_T.tolist() == [1, 2, 3]
    assert [record["main_loss"] for record in run.records] == [1, 1 / 2, 1 / 3]
    assert run.bias_TLE[:, 1, 3].tolist() == [0.5, 1.0, 1.5]
    np.testing.assert_array_equal(run.load_TLE[1], np.random.default_rng(2).integers(0, 9, (2, 4)))


def test_a_run_that_was_killed_between_its_two_files_has_the_steps_of_both(tmp_path):
    folder = write_run(tmp_path / "run", micro_config(tmp_path), STEPS)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:5])
    run = inputs.read_run(folder)
    assert len(run.records) == len(run.step_T) == len(run.load_TLE) == len(run.bias_TLE) == STEPS - 1


def test_what_is_no_run_is_refused(tmp_path):
    config = micro_config(tmp_path)
    assert "expected the folder of a training run, found no run.json" in refused(inputs.read_run, tmp_path / "none")
    assert "expected records of at least one step" in refused(inputs.read_run, write_run(tmp_path / "short", config, 0))
    dense = override(config, {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0})
    assert "only dense layers" in refused(inputs.read_run, write_run(tmp_path / "dense", dense, 0))
    for text in ("{", "{}", "[]", '{"config": {"model": 3}}'):
        (tmp_path / "short" / "run.json").write_text(text)
        assert "damaged" in refused(inputs.read_run, tmp_path / "short")


def test_runs_of_other_layers_or_experts_are_refused(tmp_path):
    config = micro_config(tmp_path)
    for name, settings in (("a", {}), ("b", {"num_nextn_predict_layers": 0}), ("c", {"n_routed_experts": 8})):
        write_run(tmp_path / name, override(config, settings), 1)
    assert list(inputs.read_runs("RUNS", f"x={tmp_path}/a,y={tmp_path}/a")) == ["x", "y"]
    said = refused(inputs.read_runs, "RUNS", f"x={tmp_path}/a,y={tmp_path}/b")
    assert said.startswith("RUNS: expected the same layers in all runs, got ('1', 'mtp 1') in x and ('1',) in y")
    said = refused(inputs.read_runs, "RUNS", f"x={tmp_path}/a,y={tmp_path}/c")
    assert said == "RUNS: expected the same number of experts in all runs, got 4 in x and 8 in y"


def test_every_checkpoint_of_a_run_is_read_in_order(tmp_path):
    config = micro_config(tmp_path)
    assert list(inputs.checkpoints(tmp_path)) == []
    first = init_variables(config.model)
    write_checkpoints(tmp_path / "run", config, 2, 10)  # not in the order of the alphabet
    found = list(inputs.checkpoints(tmp_path / "run"))
    assert [step for step, _, _ in found] == [2, 10]
    for step, variables, model in found:
        check_same_parameters(variables.params, jax.tree.map(lambda p, step=step: step * p, first.params))
        assert (np.asarray(variables.bias_LE) == step).all() and model.compute_dtype == "float32"
