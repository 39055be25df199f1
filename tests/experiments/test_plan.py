"""The planner's program: table, files, receipts, and mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest
from absl import flags

from dsv3_jax.analysis import plan_figure
from experiments import plan

SMALL = ["--preset=tiny", "--chips=4", "--chip=h100", "--set=layout=report", "--set=mesh_expert=2"]


def call(*arguments):
    """The program's main with its own set of flags: other programs define flags of the same names."""
    values = flags.FlagValues()
    plan.define_flags(values)
    values(["plan", *arguments])
    return plan.main(values)


def test_a_plan_is_a_table_of_at_most_100_columns_with_numbered_assumptions(capsys):
    assert call(*SMALL, "--mfu=0.4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for title in ("Inputs", "Parameters", "Memory of a device", "Time of a step", "Cost of the run", "Serving", "Assumptions"):
        assert any(line.startswith(title) for line in lines), title
    assert any(line.strip().startswith("1. ") for line in lines)


def test_out_leaves_the_plan_as_json_and_a_figure(tmp_path, capsys):
    assert call(*SMALL, f"--out={tmp_path}/new/folder") == 0
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["plan.json", "plan.png"]
    stored = json.loads((folder / "plan.json").read_text())
    assert stored["config"]["model"]["vocab_size"] == 1024 and stored["question"]["chips"] == 4
    assert stored["sections"]["memory"]["rows"]["weights"]["value"] > 0
    assert (folder / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (folder / "plan.png").stat().st_size > 20_000


def test_schedules_are_drawn(tmp_path, capsys):
    assert call(*SMALL, "--schedule=all", "--stages=4", "--micro_batches=8", "--schedule_set=hop=0.1", f"--out={tmp_path}") == 0
    drawn = {f"schedule-{name}.png" for name in ("1f1b", "zb1p", "dualpipe", "dualpipev")}
    assert set(os.listdir(tmp_path)) == {"plan.json", "plan.png"} | drawn
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["question"]["costs"]["hop"] == 0.1 and stored["sections"]["schedules"]["rows"]["1f1b"]["apart"] > 0
    assert "Pipelines, 4 stages, 8 micro-batches" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_said_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="--out: expected a folder"):
            call(*SMALL, f"--out={out}")
    assert not capsys.readouterr().out


def test_the_figure_shows_every_bound_and_what_it_consists_of():
    from dsv3_jax.planner.chips import chip_named
    from dsv3_jax.planner.plan import make_plan
    from dsv3_jax.planner.question import Question
    from dsv3_jax.presets import preset
    from dsv3_jax.settings import override

    config = override(preset("tiny"), {"layout": "report", "mesh_expert": 2})
    times = plan_figure.times(make_plan(config, chip_named("h100"), Question(chips=4)))
    wholes = {label: seconds for label, seconds, part in times if not part}
    assert list(wholes) == ["compute bound", "memory bound", "link bound, node", "link bound, network"]
    parts = [seconds for label, seconds, part in times if part and ", node" in label]
    assert sum(parts) == pytest.approx(wholes["link bound, node"]) and parts


def test_receipts_stand_beside_the_published_figures(capsys):
    assert call("--receipts") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    (line,) = (line for line in lines if line.startswith("bytes stored"))
    assert "688,574,839,360 688,574,839,360    exact" in line
    (line,) = (line for line in lines if line.startswith("bubble by the formula"))
    assert "-42.9" in line, "what does not match is shown as plainly as what does"


def test_a_chip_s_numbers_and_the_price_can_be_given(capsys):
    def dollars(*arguments):
        call(*SMALL, *arguments)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  dollars "))
        return float(line.split()[1].replace(",", ""))

    slow = ["--chip_set=hbm_gbs=1", "--tokens=1e15"]  # bound by memory
    assert dollars(*slow, "--dollars_per_hour=6") == pytest.approx(3 * dollars(*slow, "--dollars_per_hour=2"), rel=1e-3)
    assert dollars(*slow, "--chip_set=hbm_gbs=2") == pytest.approx(dollars(*slow) / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip=h9000"], "expected one of h800, h100, h200, v5p, v6e, tpu7x"),
        (["--preset=huge"], "unknown preset 'huge'"),
        (["--set=mesh_data=3"], "mesh: "),
        (["--set=batch_size=6", "--set=batch_size_start=6"], "6 sequences do not divide over 4 ranks"),
        (["--set=n_group=3"], "n_group: expected a divisor"),
        (["--chip_set=speed=1"], "--chip_set: expected one of"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        call(*SMALL, *arguments)
    assert "\n" not in str(error.value)


def test_the_program_ends_in_status_2_with_one_line_for_a_mistake():
    command = [sys.executable, "-m", "experiments.plan", *SMALL, "--chips=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: mesh: ") and done.stderr.count("\n") == 1
