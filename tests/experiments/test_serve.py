"""The program that serves on a mesh: a table before and after, files beside it, mistakes in one line."""

import json

import numpy as np
import pytest
from absl import flags

from experiments import serve
from oracles.cases import DATA

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "T.npy"
    np.save(path, np.random.default_rng(3).integers(0, 512, (6, 12)))
    return str(path)


def call(*arguments):
    values = flags.FlagValues()
    serve.define_flags(values)
    values(["serve", *arguments])
    return serve.main(values)


@pytest.mark.parametrize("layout", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_the_load_is_more_even_after_than_before(tokens, tmp_path, capsys, layout):
    out = tmp_path / "out"
    assert call(f"--checkpoint={DATA / 'base'}", f"--tokens={tokens}", f"--layout={layout}", "--new=4", f"--out={out}") == 0
    said = capsys.readouterr().out
    written = json.loads((out / "serve.json").read_text())
    rows = {name: np.array(rows) for name, rows in written["rows"].items()}
    assert rows["before"].sum() == rows["after"].sum() == rows["each expert once"].sum() == written["served_rows"]
    # 3 prompts of 12 tokens, and 3 of the 4 new ones of each; four experts a token, or five.
    assert written["served_rows"] == 2 * 3 * (12 + 3) * (5 if layout == "decode" else 4) == written["measured_rows"]
    assert written["changed"] == 0 and written["layout"]["mesh"]["tensor"] * written["layout"]["mesh"]["expert"] == 8
    shares = [(rows[name].max(axis=1) / rows[name].mean(axis=1)).mean() for name in ("each expert once", "before", "after")]
    assert shares[2] < shares[1] and all(f"{share:.3f}" in said for share in shares)
    assert (out / "serve.png").read_bytes().startswith(b"\x89PNG") and "0 of 3 sequences changed" in said


@pytest.mark.parametrize("wrong, said", [
    ({"tokens": "none.npy"}, "none.npy"), ({"layout": "train"}, "prefill, decode"), ({"dtype": "int8"}, "--dtype"),
    ({"tensor": "3"}, "tensor"), ({"cpu_devices": "0"}, "--cpu_devices"), ({"checkpoint": ""}, "--checkpoint"),
    ({"checkpoint": "/no/such/folder"}, "/no/such/folder"), ({"new": "0"}, "max_new_tokens"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_written(tokens, tmp_path, wrong, said):
    given = {"checkpoint": str(DATA / "base"), "tokens": tokens} | wrong
    with pytest.raises(ValueError) as error:
        call(*(f"--{name}={value}" for name, value in given.items()))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_one_row_cannot_be_measured_and_served(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((1, 4), int))
    with pytest.raises(ValueError, match="two rows or more"):
        call(f"--checkpoint={DATA / 'base'}", f"--tokens={tmp_path / 'one.npy'}")
