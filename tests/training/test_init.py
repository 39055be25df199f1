"""A run that begins with another run's weights: exactly these, nothing else of it, and never twice."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.data.pipeline import build_data
from dsv3_jax.settings import override
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import newest_step
from dsv3_jax.training.journal import read_metrics
from dsv3_jax.training.loop import train
from dsv3_jax.training.placed import abstract_placed, placement_of, state_from
from oracles.checkpoint_cells import cell_config, random_checkpoint, save

YARN = '{"factor": 5.0, "original_max_position_embeddings": 16}'


def quiet_train(config, workdir, **options):
    return train(config, workdir, header=False, progress=False, **options)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def later(reference):
    """Another run of the same program: fewer steps, another rate and seed, no average."""
    settings = {"steps": 3, "learning_rate": 1e-3, "seed": 5, "ema_decay": 0.0, "checkpoint_every": 1}
    return override(reference.config, settings)


def test_parameters_and_bias_are_copied_bit_for_bit_and_everything_else_starts_afresh(reference):
    longer = override(reference.config, {"seq_len": 32, "rope_scaling": YARN, "moment_dtype": "bfloat16"})
    assert np.abs(reference.result.state.bias).max() > 0
    state = state_from(reference.workdir, longer, None)
    assert bits((state.params, state.bias)) == bits((reference.result.state.params, reference.result.state.bias))
    rest = state.opt_state, state.step, state.skipped_in_row, state.skipped_total
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(rest))
    like = abstract_placed(longer, None)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.committed and leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_a_run_begins_there_and_a_resumed_one_goes_on_without_the_other_folder(reference, later, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(reference.workdir, source)
    whole = quiet_train(later, tmp_path / "whole", init=source)
    assert [line["step"] for line in read_metrics(tmp_path / "whole")] == [1, 2, 3]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["init"] == str(source)
    losses = [read_metrics(folder)[0]["main_loss"] for folder in (tmp_path / "whole", reference.workdir)]
    assert losses[0] < losses[1] - 0.1, "it has learnt already"

    quiet_train(later, tmp_path / "cut", init=source, step_limit=1)
    shutil.rmtree(source)
    quiet_train(later, tmp_path / "cut", init=source, resume=True, step_limit=2)
    resumed = quiet_train(later, tmp_path / "cut", resume=True)  # with or without, there is nothing to do any more
    assert bits(resumed.state) == bits(whole.state)
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["init"] == str(source)


def test_a_run_killed_before_its_first_step_still_holds_the_weights(reference, later, tmp_path):
    quiet_train(later, tmp_path / "run", init=reference.workdir, step_limit=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    assert newest_step(tmp_path / "run") == 0
    state = state_from(tmp_path / "run", later, None)
    assert bits((state.params, state.bias)) == bits((reference.result.state.params, reference.result.state.bias))


def test_a_folder_without_a_checkpoint_is_one_line_and_leaves_nothing_behind(reference, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="expected a run with a checkpoint to begin from, got none") as error:
            quiet_train(reference.config, tmp_path / "run", init=folder)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 32}, r"dense_layers/input_layernorm: expected shape \(1, 32\), got \(1, 16\)"),
        ({"n_routed_experts": 8}, r"moe_layers/mlp/experts/down_proj: expected shape \(1, 8, 8, 16\), got \(1, 4, 8, 16\)"),
        ({"num_nextn_predict_layers": 0}, r"router bias: expected shape \(1, 4\), got \(2, 4\)"),
        ({"q_lora_rank": 8}, r"self_attn/q_a_layernorm: expected shape \(1, 8\), got none"),
        ({"tie_word_embeddings": "true"}, r"lm_head: expected shape none, got \(400, 16\)"),
    ],
)
def test_other_shapes_are_one_line_that_names_the_first_parameter(reference, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        quiet_train(override(reference.config, settings), tmp_path / "run", init=reference.workdir)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_and_its_file_named(reference, tmp_path, monkeypatch):
    data = replace(reference.config.data, holdout_fraction=0.3)  # other training text, so other merges
    vocab_size = reference.config.model.vocab_size
    key = json.loads((reference.workdir / "run.json").read_text())["data"]["key"]
    with pytest.raises(ValueError, match=f"a run with the tokenizer of this one.*tokens-{key} in its cache_dir") as error:
        loop._require_same_tokenizer(reference.workdir, build_data(data, vocab_size))
    assert "\n" not in str(error.value)
    file = f"{data.cache_dir}/tokens-{key}/tokenizer.json"
    loop._require_same_tokenizer(reference.workdir, build_data(replace(data, tokenizer=file), vocab_size))
    monkeypatch.setattr(loop, "build_data", lambda config, size: build_data(replace(config, holdout_fraction=0.3), size))
    with pytest.raises(ValueError, match="the tokenizer of this one"):
        quiet_train(reference.config, tmp_path / "run", init=reference.workdir)


def rounded(tree, dtype):
    return jax.tree.map(lambda a: np.asarray(a).astype(dtype), tree)


@pytest.mark.parametrize("name", ["one device", "2x4", "fully sharded"])
def test_on_any_mesh_masters_are_what_is_read_and_all_lies_in_the_pieces_of_the_first_state(tmp_path, name):
    checkpoint = random_checkpoint(tmp_path)  # its BF16 parameters are no rounding of its masters
    save(tmp_path, tmp_path / "run" / "checkpoints", "one device", checkpoint)
    config = cell_config(tmp_path, name)
    placement = placement_of(config)
    state, master = state_from(tmp_path / "run", config, placement), checkpoint.state.opt_state.master
    assert bits((state.opt_state.master, state.bias)) == bits((master, checkpoint.state.bias))
    assert bits(state.params) == bits(rounded(master, jnp.bfloat16))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu)))
    for array, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract_placed(config, placement)), strict=True):
        assert array.dtype == wanted.dtype and array.sharding.is_equivalent_to(wanted.sharding, array.ndim)


def test_a_run_in_float32_takes_the_masters_of_one_in_bf16_and_the_other_way_round(reference, tmp_path):
    checkpoint = random_checkpoint(tmp_path)
    save(tmp_path, tmp_path / "run" / "checkpoints", "one device", checkpoint)
    wide = state_from(tmp_path / "run", cell_config(tmp_path, "one device", param_dtype="float32"), None)
    assert wide.opt_state.master is None and bits(wide.params) == bits(checkpoint.state.opt_state.master)
    narrow = state_from(reference.workdir, override(reference.config, {"param_dtype": "bfloat16"}), None)
    assert bits(narrow.opt_state.master) == bits(reference.result.state.params)
    assert bits(narrow.params) == bits(rounded(reference.result.state.params, jnp.bfloat16))
