"""Conversions: bytes that come back, targets that are whole or do not look it, and what goes on where it stopped."""

import json
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.inference.loaded import load
from dsv3_jax.interop import convert as module
from dsv3_jax.interop.convert import STATE, convert
from dsv3_jax.interop.source import open_source
from oracles.cases import CASES, DATA, load_case
from oracles.checks_loader import check_same_parameters
from oracles.from_checkpoint import from_checkpoint, model_config
from oracles.jobs import environment
from oracles.released_folder import multiplied_out, released_config, released_tensors, write_folder
from oracles.safetensors_reader import read_safetensors

BF16, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_files(a, b):
    ours, theirs = content(a), content(b)
    assert ours.keys() == theirs.keys()
    for name, data in ours.items():
        assert data == theirs[name], name


@pytest.fixture
def source(tmp_path):
    """FP8 with scales of one byte, MTP, three shards, a header and an index of another hand than ours, a tokenizer."""
    released = released_config(hidden_size=130, num_nextn_predict_layers=1)
    tensors = released_tensors(released, 0, dtype=BF16, fp8=E8M0)
    write_folder(tmp_path / "source", released, dict(reversed(tensors.items())), shards=3)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "config.json").write_bytes(json.dumps(released, indent=3).replace("\n", "\r\n").encode())
    return tmp_path / "source"


@pytest.mark.parametrize("case", ["fp8", pytest.param("mtp", marks=pytest.mark.slow)])
def test_stored_cases_come_back_from_orbax_byte_by_byte(tmp_path, case):
    convert(open_source(DATA / case), tmp_path / "orbax", format="orbax")
    convert(open_source(tmp_path / "orbax"), tmp_path / "hf")
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (DATA / case / path.name).read_bytes(), path.name
    assert {p.name for p in (DATA / case).iterdir()} - {p.name for p in (tmp_path / "hf").iterdir()} == {
        "meta.json",
        "oracle.npz",
    }


def test_every_byte_of_every_file_comes_back(source, tmp_path):
    convert(open_source(source), tmp_path / "hf")
    same_files(source, tmp_path / "hf")
    convert(open_source(source), tmp_path / "orbax", format="orbax")
    convert(open_source(tmp_path / "orbax"), tmp_path / "again")
    same_files(source, tmp_path / "again")


@pytest.mark.slow
def test_orbax_holds_the_same_parameters(tmp_path):
    convert(open_source(DATA / "fp8"), tmp_path / "orbax", format="orbax")
    _, tensors, _ = load_case("fp8")
    config = model_config(load_case("fp8").config)
    check_same_parameters(load(tmp_path / "orbax").params, from_checkpoint(tensors, config, np)[0])


@pytest.mark.parametrize("target", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("by_way_of", ["hf", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_dtype_is_what_the_files_then_hold(source, tmp_path, target, by_way_of):
    held = multiplied_out({k: v for path in source.glob("*.safetensors") for k, v in read_safetensors(path).items()})
    convert(open_source(source), tmp_path / "a", format=by_way_of, dtype=target, shard_bytes=60_000)
    if by_way_of == "orbax":
        convert(open_source(tmp_path / "a"), tmp_path / "b")
    folder = tmp_path / ("b" if by_way_of == "orbax" else "a")
    shards = [read_safetensors(path) for path in sorted(folder.glob("*.safetensors"))]
    made = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(shards) > 1 and all(sum(t.nbytes for t in s.values()) <= 60_000 or len(s) == 1 for s in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(made) and index["metadata"]["total_size"] == sum(t.nbytes for t in made.values())
    assert ("quantization_config" in json.loads((folder / "config.json").read_text())) is (target == "fp8")
    kind = np.dtype(np.float32 if target == "float32" else BF16)
    for name, tensor in multiplied_out(made).items():
        wanted = held[name] if target == "fp8" or name.endswith("bias") else held[name].astype(kind)
        np.testing.assert_array_equal(tensor.astype(np.float32), wanted.astype(np.float32), err_msg=name)


def test_without_mtp_the_target_is_a_whole_model_without_it(tmp_path):
    for format in ("hf", "orbax"):
        convert(open_source(DATA / "mtp", mtp=False), tmp_path / format, format=format)
        assert json.loads((tmp_path / format / "config.json").read_text())["num_nextn_predict_layers"] == 0
        loaded = load(tmp_path / format)
        assert "mtp" not in loaded.params and loaded.config.num_nextn_predict_layers == 0


def test_a_target_that_holds_something_is_left_alone(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        convert(open_source(source), target)
    assert content(target) == {"notes.txt": b"mine"}
    with pytest.raises(ValueError, match="expected another folder than the source"):
        convert(open_source(source), source)
    with pytest.raises(ValueError, match="got the file"):
        convert(open_source(source), target / "notes.txt")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("format", ["hf", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_conversion_that_was_stopped_does_not_look_whole_and_goes_on(source, tmp_path, format, monkeypatch):
    target = tmp_path / "target"
    monkeypatch.setattr(module, "SMALLEST_GROUP", 20_000)
    written = []

    def stop(total):
        def hear(done):
            written.append(done)
            if sum(written) > total * (0.9 if format == "hf" else 0.5):
                raise Stopped

        return hear

    with pytest.raises(Stopped):
        convert(open_source(source), target, format=format, progress=stop)
    assert not (target / "config.json").exists() and (target / STATE).exists()
    with pytest.raises(ValueError, match="config.json: no such file"):
        open_source(target)
    made = []
    for name in ("write_file", "save_group"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *args, real=real: made.append(path.name) or real(path, *args))
    for name in ("dtype", "format"):
        other = {"format": format} | {name: "bfloat16" if name == "dtype" else {"hf": "orbax", "orbax": "hf"}[format]}
        with pytest.raises(ValueError, match="holds another conversion, begun and not ended"):
            convert(open_source(source), target, **other)
    heard = []
    convert(open_source(source), target, format=format, progress=lambda total: heard.append(total) or heard.append)
    assert sum(heard[1:]) == heard[0] and 0 < len(made) < (3 if format == "hf" else len(list((target / "tensors").iterdir())))
    convert(open_source(source), tmp_path / "straight", format=format)
    assert content_names(target) == content_names(tmp_path / "straight")
    convert(open_source(target), tmp_path / "again")
    same_files(source, tmp_path / "again")


def content_names(folder):
    return sorted(path.name for path in folder.iterdir())


def command(source, target, *more):
    return [sys.executable, "-m", "experiments.convert", f"--source={source}", f"--target={target}", *more]


@pytest.fixture
def interruptible():
    """Processes that a test starts take Ctrl-C, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler becomes the default in a new program
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_a_process_that_is_killed_leaves_what_the_same_command_completes(tmp_path, kill, format):
    released = released_config(hidden_size=512, moe_intermediate_size=512, n_routed_experts=16, num_hidden_layers=6)
    write_folder(tmp_path / "source", released, released_tensors(released, 0, dtype=BF16), shards=12)
    target, deadline = tmp_path / "target", time.monotonic() + 60
    process = subprocess.Popen(command(tmp_path / "source", target, f"--format={format}"), env=environment(1),
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    begun = target / "tensors" if format == "orbax" else target
    while process.poll() is None and len(list(begun.glob("0*" if format == "orbax" else "*.safetensors"))) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(kill)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else 130)
    assert "Traceback" not in errors and not (target / "config.json").exists()
    subprocess.run(command(tmp_path / "source", target, f"--format={format}"), env=environment(1), check=True, timeout=120)
    convert(open_source(target), tmp_path / "again")
    same_files(tmp_path / "source", tmp_path / "again")
    left = {"config.json", "tensors", "tensors.json"} if format == "orbax" else set(content(tmp_path / "source"))
    assert {path.name for path in target.iterdir()} == left
    if format == "orbax":
        assert all(path.name.isdecimal() for path in (target / "tensors").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_a_disk_that_is_full_is_one_line_and_the_same_command_goes_on(tmp_path, format):
    target = tmp_path / "target"
    whole = command(DATA / "base", target, f"--format={format}")
    small = ["bash", "-c", 'ulimit -f 300; exec "$@"', "small", *whole]  # KiB a file
    ended = subprocess.run(small, env=environment(1), capture_output=True, text=True, timeout=120)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2 and last.startswith("error: ") and "could not be written" in last, ended.stderr
    assert "Traceback" not in ended.stderr and not (target / "config.json").exists()
    subprocess.run(whole, env=environment(1), check=True, capture_output=True, timeout=120)
    convert(open_source(target), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (DATA / "base" / "model.safetensors").read_bytes()


HOSTILE = {
    "a shard out of the folder": lambda t: t["shards"][0].update(file="../../evil.safetensors"),
    "a tensor twice": lambda t: t["shards"][0]["names"].append(t["shards"][0]["names"][0]),
    "a tensor less": lambda t: t["shards"][0]["names"].pop(),
    "an unknown dtype": lambda t: t["tensors"]["lm_head.weight"].update(dtype="F99"),
    "a group that is none": lambda t: t["tensors"]["lm_head.weight"].update(group="x"),
    "no header": lambda t: t["shards"][0].pop("header"),
    "a negative side": lambda t: t["tensors"]["lm_head.weight"].update(shape=[-1, 2]),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "orbax"
    convert(open_source(DATA / "base"), folder, format="orbax")
    return folder, (folder / "tensors.json").read_text()


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_damaged_table_is_refused(table, fault):
    folder, text = table
    changed = json.loads(text)
    HOSTILE[fault](changed)
    (folder / "tensors.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="tensors.json: damaged") as error:
        open_source(folder)
    assert "\n" not in str(error.value)


def test_a_table_with_texts_of_other_tensors_is_written_by_what_it_holds(table, tmp_path):
    folder, text = table
    changed = json.loads(text)
    changed["shards"][0]["header"], changed["index_text"] = '{"evil": 1}', '{"weight_map": {"evil": "../x"}}'
    (folder / "tensors.json").write_text(json.dumps(changed))
    convert(open_source(folder), tmp_path / "hf")
    ours, theirs = (read_safetensors(path / "model.safetensors") for path in (tmp_path / "hf", DATA / "base"))
    assert {n: t.tobytes() for n, t in ours.items()} == {n: t.tobytes() for n, t in theirs.items()}


def test_a_missing_group_is_named(table):
    folder, text = table
    (folder / "tensors.json").write_text(text)
    (folder / "tensors" / "00000").rename(folder / "away")
    try:
        with pytest.raises(ValueError, match="cannot be read") as error:
            load(folder)
        assert "\n" not in str(error.value)
    finally:
        (folder / "away").rename(folder / "tensors" / "00000")


def test_every_stored_case_is_listed():
    assert {path.name for path in DATA.iterdir() if path.is_dir()} == set(CASES)
