"""A folder: shards and their index agree, or one line says which file and tensor do not."""

import json

import numpy as np
import pytest

from dsv3_jax.interop.folder import INDEX, ReleasedFolder, is_file_name
from oracles.released_folder import write_folder, write_safetensors

TENSORS = {name: np.full((2, 2), i, np.float32) for i, name in enumerate("abcde")}


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "m", {"x": 1}, TENSORS, shards=2)
    return tmp_path / "m"


def shard(folder, i):
    return folder / f"model-{i:05d}-of-000002.safetensors"


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        ReleasedFolder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_are_found_whatever_the_number_of_files(tmp_path, shards):
    write_folder(tmp_path, {"x": 1}, TENSORS, shards)
    source = ReleasedFolder(tmp_path)
    assert source.config_json == {"x": 1} and set(source.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(source.tensor(name), tensor)
    layout = source.layout()
    assert sorted(name for s in layout.shards for name in s.names) == sorted(TENSORS) and len(layout.shards) == shards


def test_an_index_of_one_file_is_enough(tmp_path):
    write_folder(tmp_path, {}, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "weights.safetensors")}))
    assert set(ReleasedFolder(tmp_path).entries) == set(TENSORS)


@pytest.mark.parametrize(
    "name",
    ["../m.safetensors", "/etc/m.safetensors", "sub/m.safetensors", "..\\m.safetensors", "m.bin", "", ".safetensors",
     "a\n.safetensors", "a\0.safetensors", "\ud800.safetensors", 3, None, ["m.safetensors"]],
)  # fmt: skip
def test_an_index_cannot_name_a_path_out_of_the_folder(folder, name):
    assert not is_file_name(name)
    edit_index(folder, lambda index: index["weight_map"].update(a=name))
    refused(folder, "tensor 'a': expected a .safetensors file of this folder")


def test_a_missing_shard_is_named(folder):
    shard(folder, 2).unlink()
    refused(folder, "model-00002-of-000002.safetensors: expected a safetensors file, got no file")


def test_a_truncated_shard_is_named_with_its_tensor(folder):
    shard(folder, 2).write_bytes(shard(folder, 2).read_bytes()[:-1])
    refused(folder, "model-00002-of-000002.safetensors: tensor 'd': ends at byte")


def test_a_tensor_that_the_index_misses_is_named(folder):
    edit_index(folder, lambda index: index["weight_map"].pop("a"))
    refused(folder, "model-00001-of-000002.safetensors: tensor 'a' is not there by model.safetensors.index.json")


def test_a_tensor_that_only_the_index_has_is_named(folder):
    edit_index(folder, lambda index: index["weight_map"].update(z=shard(folder, 1).name))
    refused(folder, "model-00001-of-000002.safetensors: tensor 'z' is missing")


def test_a_tensor_in_two_shards_is_named(folder):
    write_safetensors(shard(folder, 2), {name: TENSORS[name] for name in "bda"})
    refused(folder, "model-00002-of-000002.safetensors: tensor 'a' is in model-00001-of-000002.safetensors too")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    edit_index(folder, lambda index: index.update(weight_map=weight_map))
    refused(folder, "weight_map: expected an object")


def test_a_folder_that_holds_no_checkpoint_is_refused(tmp_path, folder):
    refused(tmp_path / "absent", "expected a checkpoint's folder, got nothing")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "got a file")
    write_safetensors(folder / "model.safetensors", TENSORS)
    refused(folder, "both model.safetensors and model.safetensors.index.json")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    refused(folder, "found neither")
    (folder / "config.json").unlink()
    refused(folder, "config.json: no such file")


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1, "a": 1}', '{"a": \ud800}'.encode("utf-8", "surrogatepass")])
def test_a_damaged_config_or_index_is_refused(folder, text):
    for name in (INDEX, "config.json"):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(folder, name)
