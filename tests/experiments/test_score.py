"""The scoring program: its file, its flags, and a model larger than its memory."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from absl import flags as absl_flags

from dsv3_jax.fp8.precision import SERVING
from dsv3_jax.inference.loaded import load
from experiments import _cli
from experiments import score as program
from oracles.cases import DATA, load_case
from oracles.jobs import environment
from oracles.released_folder import released_config, released_tensors, write_folder
from oracles.unchecked import unchecked


def parsed(*arguments):
    values = absl_flags.FlagValues()
    program.define_flags(values)
    values(["score", *_cli.with_underscores(list(arguments))])
    return values


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, load_case("mtp").expected["input_ids"].astype(np.int64))
    return path


def test_the_file_holds_the_scores(tmp_path, tokens, capsys):
    for name, flag in (("whole", "--nostream_layers"), ("stream", "--stream-layers")):
        assert program.main(parsed(f"--checkpoint={DATA / 'mtp'}", f"--tokens={tokens}", f"--out={tmp_path / name}", flag)) == 0
    out = capsys.readouterr().out
    expected = load_case("mtp").expected
    assert f"mean loss of the next token {float(expected['loss']):.4f}" in out
    with np.load(tmp_path / "whole") as whole, np.load(tmp_path / "stream") as stream:
        names = {"logits", "mtp_logits", "router_indices", "router_weights", "mtp_router_indices", "hidden"}
        assert set(whole.files) == set(stream.files) == names
        for name in names:
            np.testing.assert_array_equal(whole[name], stream[name], err_msg=name)
        # Two correct float32 implementations differ by 1.5e-5.
        np.testing.assert_allclose(whole["logits"], expected["logits"], rtol=0, atol=4e-5)


def test_fp8_is_that_of_load_and_the_same_from_memory_and_from_disk(tmp_path):
    ids, folder = load_case("fp8").expected["input_ids"].astype(np.int64), DATA / "fp8"
    np.save(tmp_path / "t.npy", ids)
    for name, flags in (("exact", []), ("whole", ["--fp8"]), ("stream", ["--fp8", "--stream-layers"])):
        out = tmp_path / f"{name}.npz"
        assert program.main(parsed(f"--checkpoint={folder}", f"--tokens={tmp_path / 't.npy'}", f"--out={out}", *flags)) == 0
    exact, whole, stream = (np.load(tmp_path / f"{name}.npz")["logits"] for name in ("exact", "whole", "stream"))
    np.testing.assert_array_equal(whole, stream)
    np.testing.assert_array_equal(whole, load(folder, keep_fp8=True, fp8=SERVING).score(ids).logits)
    assert 1e-4 < np.linalg.norm(whole - exact) / np.linalg.norm(exact) < 0.5


def hostile_tokens(path, kind):
    if kind == "text":
        path.write_text("1 2 3")
    elif kind == "pickle":
        np.save(path, np.array([{}]), allow_pickle=True)
    elif kind == "giant":  # a header that promises more than the file holds
        np.save(path, np.zeros((1, 1), np.int64))
        path.write_bytes(path.read_bytes().replace(b"(1, 1), }" + b" " * 16, b"(99999999, 999999), }    "))
    elif kind == "floats":
        np.save(path, np.zeros((1, 2)))
    elif kind == "flat":
        np.save(path, np.zeros(3, int))
    elif kind == "beyond":
        np.save(path, np.array([[512]]))
    return path


@pytest.mark.parametrize("kind", ["absent", "text", "pickle", "giant", "floats", "flat", "beyond"])
def test_tokens_that_are_none_are_one_line(tmp_path, kind):
    path = hostile_tokens(tmp_path / "t.npy", kind)
    with pytest.raises(ValueError, match="tokens") as error:
        flags = parsed(f"--checkpoint={DATA / 'base'}", f"--tokens={path}", f"--out={tmp_path / 'o.npz'}")
        unchecked(lambda: program.main(flags))
    assert "\n" not in str(error.value) and not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "--checkpoint: expected a path"),
        ({"checkpoint": "absent"}, "absent: expected a checkpoint's folder"),
        ({"out": None}, "--out: expected a path"),
        ({"out": "absent/o.npz"}, "--out: expected a file in a folder that is there"),
        ({"out": "."}, "--out: expected a file"),
        ({"dtype": "float16"}, "--dtype: expected one of float32, bfloat16"),
        ({"set": "batch_size=3"}, "--set: expected one of"),
        ({"set": "layout=triangle"}, "layout"),
        ({"set": "mesh_expert=3"}, "mesh"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, tokens, changes, message):
    given = {"checkpoint": DATA / "mtp", "tokens": tokens, "out": tmp_path / "o.npz"} | changes
    with pytest.raises(ValueError, match=message) as error:
        flags = parsed(*(f"--{name}={value}" for name, value in given.items() if value is not None))
        unchecked(lambda: program.main(flags))
    assert "\n" not in str(error.value) and not (tmp_path / "o.npz").exists()


def run(folder, tokens, out, *more, limit_mb=None):
    """The program by itself, its private memory limited."""
    command = [sys.executable, "-m", "experiments.score", f"--checkpoint={folder}", f"--tokens={tokens}", f"--out={out}", *more]
    if limit_mb:
        command = ["bash", "-c", f'ulimit -d {limit_mb * 1024}; exec "$@"', "limited", *command]
    return subprocess.run(command, env=environment(1), capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_model_several_times_larger_than_memory_is_streamed_and_gives_the_same_numbers(tmp_path):
    """Two GB of weights as float32; JAX with its compiler and threads takes some 400 MB of private memory for itself."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 8, "num_hidden_layers": 20}
    released = released_config(**sizes)
    tensors = released_tensors(released, 0, dtype=ml_dtypes.bfloat16)
    in_memory = 4 * sum(tensor.size for tensor in tensors.values())
    write_folder(tmp_path / "model", released, tensors, shards=4)
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 50, (2, 8)))
    limit = 680
    assert in_memory > 3 * limit * 10**6
    folder, tokens = tmp_path / "model", tmp_path / "t.npy"
    whole = run(folder, tokens, tmp_path / "whole.npz")
    assert whole.returncode == 0, whole.stderr
    refused = run(folder, tokens, tmp_path / "refused.npz", limit_mb=limit)
    assert refused.returncode != 0 and not (tmp_path / "refused.npz").exists()
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: "), refused.stderr[-2000:]
    stream = run(folder, tokens, tmp_path / "stream.npz", "--stream-layers", limit_mb=limit)
    assert stream.returncode == 0, stream.stderr[-2000:]
    with np.load(tmp_path / "whole.npz") as a, np.load(tmp_path / "stream.npz") as b:
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--checkpoint=absent"], ["--frobnicate"], ["surplus"], ["--dtype=x"]])
def test_the_program_ends_in_one_line_and_status_2(tmp_path, tokens, flags):
    ended = run(DATA / "mtp", tokens, tmp_path / "o.npz", *flags)
    assert ended.returncode == 2 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("error: "), ended.stderr
