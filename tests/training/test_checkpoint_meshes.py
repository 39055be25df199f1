"""Checkpoints move between meshes and processes: whatever wrote it, whatever reads it, the same bits."""

import jax
import numpy as np
import pytest

from dsv3_jax.training.placed import abstract_placed, averaged_params, first_state, placement_of
from oracles import checkpoint_cells
from oracles.checkpoint_cells import cell_config, random_checkpoint, restore, save
from oracles.jobs import finish, free_port, running


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


def assert_same_bits(actual, expected):
    assert actual.progress == expected.progress and actual.ema.n_updates == expected.ema.n_updates
    for ours, theirs in ((actual.state, expected.state), (actual.ema.average, expected.ema.average)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_lies_as(checkpoint, root, name):
    config = cell_config(root, name)
    like = abstract_placed(config, placement_of(config))
    for array, wanted in zip(jax.tree.leaves(checkpoint.state), jax.tree.leaves(like), strict=True):
        assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim)


@pytest.mark.parametrize("names", [
    ["one device", "2x4", "one device"],
    pytest.param(["one device", "eight", "2x4", "fully sharded", "tensor", "eight", "one device"], marks=pytest.mark.slow),
], ids=" ".join)  # fmt: skip
def test_saved_on_one_mesh_and_restored_on_another_and_back_equal(root, tmp_path, names):
    expected = checkpoint = random_checkpoint(root)
    for i, (writer, reader) in enumerate(zip(names, names[1:], strict=False)):
        save(root, tmp_path / str(i), writer, checkpoint)
        checkpoint = restore(root, tmp_path / str(i), reader)
        assert_lies_as(checkpoint, root, reader)
        assert_same_bits(checkpoint, expected)


def test_two_processes_read_what_one_wrote_and_one_reads_what_two_wrote(root, tmp_path):
    expected = random_checkpoint(root)
    save(root, tmp_path / "one", "one device", expected)
    address = f"127.0.0.1:{free_port()}"
    arguments = [str(root), str(tmp_path / "one"), str(tmp_path / "two")]
    with running([[checkpoint_cells.__file__, address, str(i), *arguments] for i in range(2)], devices=4) as job:
        for status, out, err in map(finish, job):
            assert status == 0, err
            assert "pieces 0.5" in out, "half of the average each"
    for reader in ("one device", "eight", "fully sharded"):
        assert_same_bits(restore(root, tmp_path / "two", reader), expected)


@pytest.mark.parametrize("name", ["eight", "2x4", "fully sharded", "tensor"])
def test_the_first_state_is_that_of_one_device_in_pieces(root, name):
    configs = [cell_config(root, n) for n in ("one device", name)]
    one, many = (first_state(config, placement_of(config)) for config in configs)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    wanted = abstract_placed(configs[1], placement_of(configs[1]))
    for array, like in zip(jax.tree.leaves(many), jax.tree.leaves(wanted), strict=True):
        assert array.sharding.is_equivalent_to(like.sharding, array.ndim)
    buffers = [{s.data.unsafe_buffer_pointer() for s in a.addressable_shards} for a in jax.tree.leaves(many)]
    assert len(set().union(*buffers)) == sum(map(len, buffers)), "a leaf's buffers, which are donated, are no other leaf's"


def test_averaged_weights_lie_as_the_parameters_do(root):
    config = cell_config(root, "2x4")
    state = first_state(config, placement_of(config))
    ema = random_checkpoint(root).ema
    for a, p, e in zip(*map(jax.tree.leaves, (averaged_params(ema, state), state.params, ema.average)), strict=True):
        assert a.dtype == p.dtype and a.sharding == p.sharding
        np.testing.assert_array_equal(np.asarray(a), e.astype(p.dtype))
