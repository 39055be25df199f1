"""The precision table's program: the table that the model follows, what a layer keeps, and mistakes in one line."""

import json
import subprocess
import sys

import pytest
from absl import flags

from dsv3_jax.config import Fp8Recipe
from dsv3_jax.fp8.precision import products, table
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from experiments import precision


def call(*arguments):
    values = flags.FlagValues()
    precision.define_flags(values)
    values(["precision", *arguments])
    return precision.main(values)


@pytest.mark.parametrize("fp8", ["report", "null", '{"tile": 16, "gradient_format": "e5m2", "accumulation": "promoted"}'])
def test_every_run_prints_a_table_that_fits_a_terminal(fp8, capsys):
    assert call("--preset=tiny", f"--set=fp8={fp8}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= (110 if "e5m2" in fp8 else 100) and any(line.startswith("o_proj") for line in lines)


def test_out_leaves_table_and_bytes_as_json(tmp_path, capsys):
    assert call("--preset=tiny", "--set=fp8=report", f"--out={tmp_path}/new") == 0
    stored = json.loads((tmp_path / "new" / "precision.json").read_text())
    row = next(row for row in stored["table"] if row["operation"] == "o_proj")
    assert row["kept"] == "e5m6 1x128 2^n"
    assert stored["kept_bytes_per_token"]["MoE layer"]["this run"]["uint8"] > 0


def test_the_table_says_of_every_linear_operation_what_the_model_asks_for():
    config = override(preset("deepseek_v3_671b"), {"fp8": "report"})
    for row in table(config):
        how = products(config.model, row.operation)
        if how is not None:
            assert row.fprop == f"{how.x} . {how.weight}".replace("e4m3 ", "")
            assert row.dgrad == str(how.gradient).removeprefix("e4m3 ")


def test_what_the_report_leaves_high_stays_high():
    config = override(preset("deepseek_v3_671b"), {"fp8": "report"})
    rows = {row.operation: row for row in table(config)}
    for name in ("embed_tokens", "eh_proj", "combine"):
        assert rows[name].fprop == "bfloat16", name
    assert rows["gate"].fprop == rows["norms"].fprop == rows["weight gradients"].wgrad == "float32"
    assert rows["AdamW"].kept == "bfloat16"
    assert (
        products(config.model, "gate") is products(config.model, "lm_head") is products(config.model, "input_layernorm") is None
    )


def test_runs_differ_in_the_table_s_rows_alone():
    fp8, bf16 = (override(preset("deepseek_v3_671b"), {"fp8": value}) for value in ("report", "null"))
    assert [row.operation for row in table(fp8)] == [row.operation for row in table(bf16)]
    same = {row.operation for row, other in zip(table(fp8), table(bf16), strict=True) if row == other}
    assert same >= {"embed_tokens", "norms", "attention core", "gate", "combine", "eh_proj", "lm_head, loss", "AdamW"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("fp8=repotr", "fp8: expected JSON or null"),
        ('fp8={"tiel": 32}', "unknown key 'tiel'; nearest: tile"),
        ('fp8={"scaling": "fin"}', "scaling: expected one of fine, tensor, delayed"),
        ('fp8={"promotion_interval": 48}', "promotion_interval: expected a multiple of 32"),
        ('fp8={"amax_floor": 0}', "amax_floor: expected at least 1e-32"),
    ],
)
def test_a_wrong_recipe_is_one_line(setting, said):
    command = [sys.executable, "-m", "experiments.precision", "--preset=tiny", f"--set={setting}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr


def test_a_recipe_survives_json():
    from dsv3_jax.settings import from_dict, to_dict

    config = override(preset("tiny"), {"fp8": '{"tile": 32, "router": true}'})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert config.model.fp8 == Fp8Recipe(tile=32, router=True)
