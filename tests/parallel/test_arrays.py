"""Host arrays on the mesh: the right rows on the right devices, and what cannot be divided said in one line."""

import jax
import numpy as np
import pytest

from dsv3_jax.parallel import arrays
from dsv3_jax.parallel.arrays import (
    any_of,
    batch_to_mesh,
    check_batch,
    check_streams,
    rows_by_process,
    told_by_all,
    told_by_first,
)
from dsv3_jax.training.placed import check_placement, placement_of
from oracles.checkpoint_cells import cell_config

LAYOUTS = ["eight", "2x4", "fully sharded", "tensor"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("arrays")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_batch_lies_on_the_mesh_row_by_row(root, name):
    placement = placement_of(cell_config(root, name))
    batch = {"tokens": np.arange(2 * 16 * 3, dtype=np.int32).reshape(2, 16, 3)}
    rows = rows_by_process(placement, 16)
    assert list(rows) == [0] and rows[0].tolist() == list(range(16))
    placed = batch_to_mesh(batch, rows[0], 16, placement)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert placed.addressable_shards[0].data.shape == (2, 16 // placement.batch_ranks, 3)


def test_rows_that_are_not_here_need_not_be_there(root, monkeypatch):
    placement = placement_of(cell_config(root, "2x4"))
    batch, wanted = np.arange(2 * 16 * 3, dtype=np.int32).reshape(2, 16, 3), []

    def asked(shape, sharding, piece):
        wanted.append((shape, piece))
        return jax.device_put(np.zeros(1))

    monkeypatch.setattr(jax, "make_array_from_callback", asked)
    batch_to_mesh({"tokens": batch[:, 8:]}, range(8, 16), 16, placement)
    ((shape, piece),) = wanted
    assert shape == (2, 16, 3)
    np.testing.assert_array_equal(piece((slice(None), slice(12, 14), slice(None))), batch[:, 12:14])
    with pytest.raises(AssertionError):
        piece((slice(None), slice(6, 8), slice(None)))


def test_rows_that_do_not_divide_are_refused_with_the_axes(root):
    placement = placement_of(cell_config(root, "2x4"))
    check_batch(placement, 16, "batch_size")
    with pytest.raises(ValueError) as error:
        check_batch(placement, 12, "batch_size")
    assert str(error.value) == (
        "batch_size: expected a multiple of 8, the ranks that share a batch (pipe 1 x data 2 x expert 4), got 12"
    )


@pytest.mark.parametrize(
    ("shares", "fitting"),
    [
        ([range(8), range(8)], [1, 2, 4, 8]),  # tensor ranks of two processes: both have every row
        ([range(4), range(4, 8)], [2, 4, 8]),
        ([[0, 1, 4, 5], [2, 3, 6, 7]], [4, 8]),  # devices need not be in the processes' order
        ([range(2), range(2, 8)], [4, 8]),
    ],
)
def test_streams_are_refused_where_two_processes_would_share_one_for_different_rows(root, monkeypatch, shares, fitting):
    monkeypatch.setattr(arrays, "rows_by_process", lambda *_: dict(enumerate(map(np.array, shares))))
    placement = placement_of(cell_config(root, "2x4"))
    for n_streams in (1, 2, 4, 8):
        if n_streams in fitting:
            check_streams(placement, 8, n_streams)
        else:
            with pytest.raises(
                ValueError, match=f"data_streams: expected a multiple of {fitting[0]} that divides 8.*got {n_streams}"
            ):
                check_streams(placement, 8, n_streams)


def test_one_process_hears_itself(root):
    placement = placement_of(cell_config(root, "eight"))
    assert told_by_all({"a": [1]}) == [{"a": [1]}] and told_by_first(None) is None
    assert [bool(any_of(flag, placement)) for flag in (False, True)] == [False, True]


def test_a_state_too_large_for_its_devices_is_refused_and_fits_on_more(root, monkeypatch):
    config = cell_config(root, "fully sharded")
    placement = placement_of(config)
    check_placement(config, placement)
    pages = {"SC_PHYS_PAGES": 8, "SC_PAGE_SIZE": 4096}  # 4096 bytes for each of eight
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    with pytest.raises(ValueError, match="each of 8 devices holds 0 GB; .* smaller sizes, or more devices"):
        check_placement(config, placement)
