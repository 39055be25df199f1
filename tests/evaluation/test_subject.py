"""The model under evaluation: what it is called, and how much it reads at a time."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.evaluation import subject as subject_module
from dsv3_jax.evaluation.subject import open_subject
from oracles.cases import DATA
from oracles.released_folder import write_folder
from oracles.talkative import WINDOW, released, tensors


def changed(source, folder, name):
    """A copy of the model with one number of one tensor moved."""
    shutil.copytree(source, folder)
    moved = {key: tensor.copy() for key, tensor in tensors().items()}
    moved[name].flat[0] += np.float32(1e-3)
    write_folder(folder, released(), moved)
    return open_subject(folder)


def test_a_model_is_told_from_one_with_another_weight(folder, subject, tmp_path):
    about = subject.about()
    assert about == open_subject(folder).about() and about["window"] == WINDOW and about["dtype"] == "float32"
    last = f"model.layers.{released()['num_hidden_layers'] - 1}."
    for i, name in enumerate(("model.norm.weight", last + "self_attn.o_proj.weight", last + "mlp.experts.0.up_proj.weight")):
        other = changed(folder, tmp_path / str(i), name).about()
        assert other["model"] != about["model"] and other["tokenizer"] == about["tokenizer"]


def test_a_run_reads_what_it_was_trained_on_and_others_all_positions(folder, subject, monkeypatch):
    assert subject.window == WINDOW and subject.run_data is None
    data = DataConfig(seq_len=20)
    monkeypatch.setattr(subject_module, "_run_folder", lambda source: SimpleNamespace(run=SimpleNamespace(data=data)))
    run = open_subject(folder)
    assert run.window == 20 and run.run_data is data
    assert open_subject(folder, window=40).window == 40


@pytest.mark.parametrize("window", [1, WINDOW + 1])
def test_a_window_without_positions_is_refused(folder, window):
    with pytest.raises(
        ValueError, match=rf"--window: expected 2\.\.{WINDOW}, the model's max_position_embeddings, got {window}"
    ):
        open_subject(folder, window=window)


def test_a_checkpoint_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"--checkpoint: .*base has no tokenizer\.json"):
        open_subject(DATA / "base")


def test_weights_are_read_when_they_are_wanted(folder):
    own = open_subject(folder)
    assert "_parameters" not in own.__dict__
    assert own.speaker.tokenizer.bos == own.tokenizer.bos and "_parameters" not in own.__dict__
    np.testing.assert_array_equal(np.asarray(own.supply.gain()), tensors()["model.norm.weight"])
