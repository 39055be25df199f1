"""The program that measures the accumulation's error: table, files, and mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest
from absl import flags

from experiments import accumulate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def call(*arguments):
    values = flags.FlagValues()
    accumulate.define_flags(values)
    values(["accumulate", *arguments])
    return accumulate.main(values)


def test_out_holds_numbers_and_figure_and_the_table_ends_with_a_sentence(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert call(f"--out={out}", "--seeds=2", "--longest=64", "--size=2") == 0
    assert sorted(os.listdir(out)) == ["accumulate.json", "accumulate.png"]
    assert (out / "accumulate.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((out / "accumulate.json").read_text())
    assert (stored["k"], stored["seeds"], stored["size"]) == ([32, 64], [0, 1], 2)
    assert stored["command"] == f"python -m experiments.accumulate --out={out} --seeds=2 --longest=64 --size=2"
    said = capsys.readouterr().out
    mean = stored["errors"]["uniform"]["promoted, aligned"]["mean"]
    assert len(mean) == 2 and all(f"{value:.1e}" in said for value in mean)
    assert stored["verdict"] in said and max(map(len, said.split(stored["verdict"])[0].splitlines())) <= 80


@pytest.mark.parametrize("wrong, said", [
    ("--longest=48", "--longest: expected a power of two from 32 on, got 48"), ("--seeds=0", "--seeds: expected at least 1"),
    ("--size=-1", "--size: expected at least 1"), ("--out=", "--out: expected a folder, got none"),
    ("--out=/dev/null/x", "--out: expected a folder or where one can be made"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_any_work(tmp_path, capsys, wrong, said):
    with pytest.raises(ValueError) as error:
        call(f"--out={tmp_path}", wrong)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not os.listdir(tmp_path) and not capsys.readouterr().out


def test_the_program_ends_a_mistake_with_status_2():
    command = [sys.executable, "-m", "experiments.accumulate", "--longst=64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: Unknown command line flag 'longst'") and done.stderr.count("\n") == 1
