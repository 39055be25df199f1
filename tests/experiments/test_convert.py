"""The converter's command line."""

import pytest
from absl import flags

from experiments import _cli, convert
from oracles.cases import DATA
from oracles.unchecked import unchecked


def parsed(*arguments):
    values = flags.FlagValues()
    convert.define_flags(values)
    values(["convert", *_cli.with_underscores(list(arguments))])
    return values


def test_a_conversion_says_where_it_went(tmp_path, capsys):
    assert (
        convert.main(
            parsed(f"--source={DATA / 'base'}", f"--target={tmp_path / 'a-b'}", "--shard-gb=0.0003", "--dtype=bfloat16")
        )
        == 0
    )
    out, errors = capsys.readouterr()
    assert out == f"converted: {tmp_path / 'a-b'}\n" and "written" in errors
    assert len(list((tmp_path / "a-b").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source: expected a folder"),
        (["--source=x"], "--target: expected a folder"),
        (["--source=absent", "--target=TARGET"], "absent: expected a checkpoint's folder, got nothing"),
        (["--source=BASE", "--target=TARGET", "--format=gguf"], "--format: expected one of hf, orbax, got 'gguf'"),
        (["--source=BASE", "--target=TARGET", "--dtype=int8"], "--dtype: expected one of keep, float32, bfloat16, fp8"),
        (["--source=BASE", "--target=TARGET", "--scales=e5"], "--scales: expected float32 or ue8m0"),
        (["--source=BASE", "--target=TARGET", "--shard_gb=0"], "--shard_gb: expected a positive number"),
        (["--source=BASE", "--target=TARGET", "--shard_gb=nan"], "--shard_gb: expected a positive number"),
        (["--source=BASE", "--target=TARGET", "--shard_gb=inf"], "--shard_gb: expected"),
        (["--source=BASE", "--target=TARGET", "--average"], "only a training run has averaged weights"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(tmp_path, arguments, message, capsys):
    target = tmp_path / "target"
    arguments = [a.replace("BASE", str(DATA / "base")).replace("TARGET", str(target)) for a in arguments]
    with pytest.raises(ValueError, match=message) as error:
        unchecked(lambda: convert.main(parsed(*arguments)))
    assert "\n" not in str(error.value) and not target.exists() and capsys.readouterr() == ("", "")


def test_dashes_in_a_flag_are_underscores_and_in_its_value_stay():
    given = ["x", "--stream-layers", "--shard-gb=1e-3", "--set=layout=a-b", "-a-b", "--no-x=--y-z", "c-d"]
    assert _cli.with_underscores(given) == [
        "x", "--stream_layers", "--shard_gb=1e-3", "--set=layout=a-b", "-a-b", "--no_x=--y-z", "c-d",
    ]  # fmt: skip
