"""Checkpoints: exact, complete or absent, one clear line otherwise."""

import gc
import json
import shutil
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training.checkpoint import FREE_ON_RESUME, Checkpoint, Checkpoints, Progress, config_changes
from dsv3_jax.training.ema import Ema

CONFIG = preset("tiny")


class State(NamedTuple):
    params: Any
    master: Any
    step: jax.Array


def example(step):
    keys = jax.random.split(jax.random.key(step), 2)
    params = {"a": jax.random.normal(keys[0], (64, 5)).astype(jnp.bfloat16), "norm": jax.random.normal(keys[1], (7,))}
    state = State(params, None, jnp.int32(step))
    ema = Ema(jax.tree.map(lambda p: np.asarray(p).astype(np.float32) * 2, params), step)
    return Checkpoint(state, ema, Progress(step, 1000 * step, {"epoch": 1, "position": [step, 3]}))


def zeros(checkpoint):
    return (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoint.state),
        Ema(jax.tree.map(np.zeros_like, checkpoint.ema.average), 0),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def save(folder, *steps, config=CONFIG):
    with Checkpoints(folder, config) as checkpoints:
        for step in steps:
            checkpoints.save(example(step))


def test_what_is_restored_is_what_was_saved_bits_and_dtypes(tmp_path):
    save(tmp_path, 3, 8)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest() == 8
        restored = checkpoints.restore(*zeros(example(8)))
    assert_same(restored, example(8))
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(restored.ema.average)), "the average stays on the host"


def test_a_run_without_an_average_stores_none(tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(example(2)._replace(ema=None))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert_same(checkpoints.restore(zeros(example(2))[0], None), example(2)._replace(ema=None))


def test_arrays_may_be_donated_or_overwritten_as_soon_as_save_returns(tmp_path):
    checkpoint, expected = example(1), example(1)
    big = jnp.arange(1 << 20, dtype=jnp.float32)
    checkpoint = checkpoint._replace(state=checkpoint.state._replace(params={"a": big}), ema=Ema({"a": np.ones(1 << 20)}, 1))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(checkpoint)
        jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(big))
        checkpoint.ema.average["a"][:] = -1
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        state = expected.state._replace(params={"a": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)})
        restored = checkpoints.restore(state, Ema({"a": np.zeros(1 << 20)}, 0))
    np.testing.assert_array_equal(restored.state.params["a"], np.arange(1 << 20))
    np.testing.assert_array_equal(restored.ema.average["a"], 1)


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, config=override(CONFIG, {"keep_checkpoints": 2}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_a_folder_under_its_temporary_name_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "2.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest() == 1
        assert_same(checkpoints.restore(*zeros(example(1))), example(1))


def test_another_config_is_refused_with_both_values_and_the_reason_for_steps(tmp_path):
    save(tmp_path, 1)
    other = override(CONFIG, {"learning_rate": "0.5", "steps": "301", "n_group": "2"})
    with Checkpoints(tmp_path, other) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(*zeros(example(1)))
    line = str(error.value)
    assert "\n" not in line and str(tmp_path) in line
    for part in ("learning_rate=0.004, now 0.5", "steps=300, now 301 (the schedules", "n_group=4, now 2"):
        assert part in line


def test_fields_that_change_no_bit_may_change_on_resume(tmp_path):
    free = {"checkpoint_every": "7", "keep_checkpoints": "9", "eval_every": "5", "nonfinite_limit": "3", "cache_dir": "/x"}
    assert set(free) == FREE_ON_RESUME
    assert config_changes(CONFIG, override(CONFIG, free)) == []
    assert config_changes(CONFIG, replace(CONFIG, data=replace(CONFIG.data, data_seed=1))) == ["data_seed=0, now 1"]


def damage_meta(folder):
    (folder / "meta" / "metadata").write_text('{"config": {')


def damage_config(folder):
    (folder / "meta" / "metadata").write_text(json.dumps({"config": {"model": {"no_such_field": 1}}, "progress": {}}))


def damage_manifest(folder):
    (folder / "state" / "manifest.ocdbt").write_bytes(b"")


def damage_arrays(folder):
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_ema(folder):
    shutil.rmtree(folder / "ema")


# Orbax leaves the coroutines of a failed read behind: they are collected in this test, not in whichever runs next.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [damage_meta, damage_config, damage_manifest, damage_arrays, damage_ema])
def test_a_damaged_checkpoint_is_one_line_naming_its_folder_and_is_never_skipped_silently(tmp_path, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(*zeros(example(2)))
    assert "\n" not in str(error.value)
    assert f"checkpoint {tmp_path / '2'} is damaged" in str(error.value)
    del error, checkpoints
    gc.collect()


def test_a_folder_that_cannot_be_made_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints", CONFIG)
