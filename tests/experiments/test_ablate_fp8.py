"""The FP8 ablation: what the arms differ in, what is computed of them, and what is left behind."""

import json
import sys
from types import SimpleNamespace

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from dsv3_jax.presets import preset
from dsv3_jax.settings import to_dict
from dsv3_jax.training.journal import read_metrics
from experiments import _cli, ablate_fp8, compare
from oracles.micro import micro_settings, set_flags

BASE = preset("tiny")
LAYERS = {"activations": [0.1, 0.2, 0.3], "gradients": [0.1, 0.2, 0.3], "parameters": [0.1, 0.2, 0.3]}


def test_every_fp8_arm_differs_from_the_recipe_in_one_ingredient_and_the_tile():
    arms = ablate_fp8.chosen_arms(ablate_fp8.ARMS, BASE, 32)
    recipe = to_dict(arms["fp8"])["model"]["fp8"]
    assert recipe["tile"] == 32 and arms["fp32"].model.fp8 is None and arms["bf16"].model.fp8 is None
    assert (arms["fp32"].model.compute_dtype, arms["bf16"].model.compute_dtype) == ("float32", "bfloat16")
    assert arms["ulp"].train.init_ulps == 1 and arms["ulp"].model == arms["fp32"].model
    for name in [n for n in arms if n not in ("fp32", "ulp", "bf16", "fp8")]:
        changed = {k: v for k, v in to_dict(arms[name])["model"]["fp8"].items() if v != recipe[k]}
        assert changed == ablate_fp8.INGREDIENTS[name] and len(changed) == 1
        assert arms[name].train == arms["bf16"].train and arms[name].data == arms["bf16"].data


def call(workdir, *flags):
    """(exit status) of the program with these flags."""
    arguments = ["ablate_fp8", "--preset=tiny", f"--workdir={workdir}", *flags]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", arguments)
        _cli.run(ablate_fp8.main)
    return end.value.code or 0


@pytest.fixture(autouse=True)
def defined_flags():
    if "preset" not in absl_flags.FLAGS:
        _cli.define_config_flags()
    if "seeds" not in absl_flags.FLAGS:
        compare.define_run_flags()
    if "arms" not in absl_flags.FLAGS:
        ablate_fp8.define_flags()


@pytest.fixture
def begun(monkeypatch):
    """The runs that were begun, faked, as (FP8 accumulation or dtype, seed, steps)."""
    runs = []

    def fake_train(config, workdir, step_limit=None, **options):
        model, steps = config.model, step_limit or config.train.steps
        runs.append((model.fp8.accumulation if model.fp8 else model.compute_dtype, config.train.seed, steps))
        workdir.mkdir(parents=True)
        loss = 3.03 if model.fp8 else 3.0
        lines = [{"step": s, "main_loss": loss, "max_vio_mean": 0.0, "seconds": 1.0} for s in range(1, steps + 1)]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if steps == config.train.steps:
            (workdir / "validation.json").write_text(json.dumps({"raw": {"loss": {"all": loss}}}))
        return SimpleNamespace(interrupted=False)

    monkeypatch.setattr(compare, "train", fake_train)
    monkeypatch.setattr(ablate_fp8._ablation, "setting", lambda name, question, command, plan, folder: dict(plan))
    monkeypatch.setattr(ablate_fp8._ablation, "measures", lambda folder, config: {"loss": 3.0, "train_loss": 3.0})
    monkeypatch.setattr(ablate_fp8, "pass_through", lambda arms, seeds, workdir: ({"bf16": LAYERS}, {}))
    return runs


FEW = "--arms=fp32,bf16,fp8,no_promotion"


def test_slow_arms_stop_early_and_are_compared_over_their_steps(begun, tmp_path, capsys):
    assert call(tmp_path, FEW, "--seeds=2", "--set=steps=8", "--slow_steps=3") == 0
    kinds = [("float32", 8), ("bfloat16", 8), ("float32", 8), ("tensor_core", 3)]
    assert begun == [(kind, seed, steps) for seed in (0, 1) for kind, steps in kinds]
    result = json.loads((tmp_path / "fp8.json").read_text())
    whole, short = (result["arms"][arm]["gaps"]["bf16"] for arm in ("fp8", "no_promotion"))
    assert whole["mean"] == pytest.approx(1.0) and whole["validation"]["mean"] == pytest.approx(1.0)
    assert whole["verdict"] == "outside" and len(whole["curve"]["step"]) == 8
    assert short["validation"] is None and short["curve"]["step"] == [1, 2, 3]
    assert list(result["scores"]) == ["fp32", "bf16", "fp8"], "measures are of whole runs"
    (claim,) = result["claims"]
    assert claim["mean"] == pytest.approx(1.0) and claim["verdict"] == "contradicted" and claim["within"] == 0.25
    assert "no_promotion: gaps of the first 3 steps" in capsys.readouterr().out
    assert (tmp_path / "fp8.png").exists() and (tmp_path / "layers.png").exists()


def test_a_resumed_ablation_computes_no_finished_run_again_short_ones_included(begun, tmp_path):
    flags = (FEW, "--seeds=1", "--set=steps=8", "--slow_steps=3")
    assert call(tmp_path, *flags) == 0 and len(begun) == 4
    (tmp_path / "2-fp8" / "seed-0" / "validation.json").unlink()
    (tmp_path / "2-fp8" / "seed-0" / "metrics.jsonl").unlink()
    (tmp_path / "2-fp8" / "seed-0").rmdir()
    begun.clear()
    assert call(tmp_path, *flags, "--resume") == 0 and begun == [("float32", 0, 8)]


def test_the_budget_counts_slow_arms_by_their_limit(begun, tmp_path):
    assert call(tmp_path, FEW, "--seeds=1", "--budget=2", "--slow_steps=10") == 0
    # 120 s; three arms of 1 s a step and one of 10 steps, all taken 15 % slower; the fake's own milliseconds
    steps = json.loads((tmp_path / "plan.json").read_text())["steps"]
    assert 28 <= steps <= 31


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms=fp32,bf16,fp9"], "--arms: unknown arm 'fp9'; expected some of fp32, ulp, bf16, fp8"),
        (["--arms=fp32,fp8"], "--arms: expected fp32 and bf16, the baselines"),
        ([FEW, "--tile=0"], "tile: expected a positive number, got 0"),
        ([FEW, "--slow_steps=0"], "--slow_steps: expected at least 1, got 0"),
        ([FEW, "--seeds=0"], "--seeds: expected at least 1, got 0"),
        ([FEW, "--resume", "--tile=64"], "another comparison: tile differs"),
        ([FEW, "--resume", "--slow_steps=5"], "another comparison: limits differs"),
        ([FEW], "holds a comparison already; add --resume"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(begun, tmp_path, capsys, flags, message):
    assert call(tmp_path, FEW, "--seeds=1", "--set=steps=8") == 0
    begun.clear()
    capsys.readouterr()
    assert call(tmp_path, "--seeds=1", "--set=steps=8", *flags) == 2
    err = capsys.readouterr().err.strip()
    assert begun == [] and err.startswith("error: ") and message in err and "\n" not in err


@pytest.mark.slow
def test_an_ablation_measures_loss_layers_and_routing_and_goes_on_where_it_stopped(tmp_path, quick_compilation):
    settings = set_flags({**micro_settings(tmp_path), "steps": "8"})
    flags = ["--seeds=2", "--tile=8", "--arms=fp32,bf16,fp8", *settings]
    assert call(tmp_path / "w", *flags) == 0
    result = json.loads((tmp_path / "w" / "fp8.json").read_text())
    assert result["steps"] == 8 and list(result["arms"]) == ["fp32", "bf16", "fp8"] and result["moe_layers"] == [2]
    bf16, fp8 = result["arms"]["bf16"], result["arms"]["fp8"]
    assert result["arms"]["fp32"]["layers"] is None
    for name in ("activations", "gradients", "parameters"):
        assert len(fp8["layers"][name]) == 2
        assert all(0 < b < f < 1 for b, f in zip(bf16["layers"][name], fp8["layers"][name], strict=True))
    assert 0 <= bf16["flips"]["rate"] <= fp8["flips"]["rate"] <= 1
    assert sum(fp8["flips"]["margin"]["tokens"]) == sum(bf16["flips"]["margin"]["tokens"]) > 0
    assert fp8["gaps"]["bf16"]["mean"] != 0 and len(fp8["gaps"]["bf16"]["pairs"]) == 2
    for name in ("fp8.png", "layers.png", "flips.png"):
        assert (tmp_path / "w" / name).read_bytes()[:4] == b"\x89PNG"
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").glob("*/seed-*/metrics.jsonl")}
    assert len(written) == 6 and len(read_metrics(next(iter(written)).parent)) == 8
    assert call(tmp_path / "w", *flags, "--resume") == 0
    assert all(p.stat().st_mtime_ns == t for p, t in written.items())
    again = json.loads((tmp_path / "w" / "fp8.json").read_text())
    assert {**again, "command": ""} == {**result, "command": ""}
