"""The tracing programs: from the command line to the files, a replay, a difference, and every mistake in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags as absl_flags

from dsv3_jax.tracing.store import open_trace
from experiments import _cli, bench_trace, trace, trace_diff
from oracles.cases import DATA
from oracles.jobs import environment

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(program, *arguments):
    values = absl_flags.FlagValues()
    program.define_flags(values)
    values(["program", *_cli.with_underscores(list(arguments))])
    return program.main(values)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (5, 20)))
    return path


def test_a_trace_its_replay_and_their_difference(tmp_path, tokens, capsys):
    checkpoint, a, b, c = f"--checkpoint={DATA / 'mtp'}", tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert run(trace, checkpoint, f"--data={tokens}", f"--out={a}", "--seq_len=16", "--batch_tokens=64", "--scores") == 0
    out = capsys.readouterr().out
    assert "100 tokens in 10 sequences of 1 domains" in out and "mtp 1" in out and "MaxVio" in out
    found = open_trace(a)
    assert found.choices.scores_NLE is not None and found.about.source == str(tokens) and found.about.tokenizer is None
    assert run(trace, checkpoint, f"--replay={a}", f"--out={b}") == 0
    replay = open_trace(b)
    for ours, theirs in zip(found.choices[:4], replay.choices[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert run(trace, checkpoint, f"--data={tokens}", f"--out={c}", "--seq_len=16", "--dtype=bfloat16", "--stream-layers") == 0
    assert run(trace_diff, f"--a={a}", f"--b={c}", f"--out={tmp_path / 'diff'}") == 0
    assert "of choices differ" in capsys.readouterr().out
    written = json.loads((tmp_path / "diff" / "diff.json").read_text())
    assert 0 < written["flipped"] < 0.5 and written["same_model"] and (tmp_path / "diff" / "diff.png").stat().st_size > 1000


def test_text_files_have_domains_and_a_checkpoint_without_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json; give tokens"):
        run(trace, f"--checkpoint={DATA / 'mtp'}", "--data=embedded", f"--out={tmp_path / 'a'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x", "--data=y"], "--checkpoint: expected a path, got none"),
        ([f"--checkpoint={DATA / 'mtp'}", "--out=x"], "--data: expected a text, got none"),
        ([f"--checkpoint={DATA / 'mtp'}", "--out=x", "--data=y", "--replay=z"], "expected either this or --replay, got both"),
        ([f"--checkpoint={DATA / 'mtp'}", f"--out={DATA}", "--data=y"], "exists; name another folder, or remove it"),
        ([f"--checkpoint={DATA / 'mtp'}", "--out=x", "--data=none.npy"], "--data: no file none.npy"),
        ([f"--checkpoint={DATA / 'mtp'}", "--out=x", f"--replay={DATA / 'mtp'}"], r"trace\.json: expected a file of the trace"),
        ([f"--checkpoint={DATA / 'mtp'}", "--out=x", "--replay=none"], "expected the folder of a routing trace, got nothing"),
        (["--checkpoint=none", "--out=x", "--data=y"], "expected a checkpoint's folder, got nothing"),
        ([f"--checkpoint={DATA / 'mtp'}", "--out=x", "--data=y", "--dtype=int8"], "--dtype: expected one of"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        run(trace, *arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_mistake_leaves_nothing_that_the_corrected_command_meets(tmp_path, tokens):
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.array([[1, 2**20]]))
    checkpoint, out = f"--checkpoint={DATA / 'base'}", f"--out={tmp_path / 'a'}"
    for arguments, message in (
        ([f"--data={wrong}"], f"tokens: expected 0.*, got {2**20}"),
        ([f"--data={tokens}", "--set=lay=out"], "--set: expected one of .*, got 'lay'"),
        ([f"--data={tokens}", "--set=mesh_expert=4096"], "4096"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            run(trace, checkpoint, out, *arguments)
        assert "\n" not in str(error.value) and {path.name for path in tmp_path.iterdir()} == {"wrong.npy", "tokens.npy"}


def test_a_difference_that_there_is_none_of_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a routing trace"):
        run(trace_diff, f"--a={tmp_path / 'none'}", f"--b={tmp_path}", f"--out={tmp_path / 'd'}")
    assert not list(tmp_path.iterdir())


def test_a_replay_of_another_checkpoint_has_to_be_asked_for(tmp_path, tokens):
    a = tmp_path / "a"
    run(trace, f"--checkpoint={DATA / 'base'}", f"--data={tokens}", f"--out={a}")
    about = json.loads((a / "trace.json").read_text())
    (a / "trace.json").write_text(json.dumps(about | {"model": "other"}))
    with pytest.raises(ValueError, match="other weights of this architecture; --other_model lets it be"):
        run(trace, f"--checkpoint={DATA / 'base'}", f"--replay={a}", f"--out={tmp_path / 'b'}")
    assert run(trace, f"--checkpoint={DATA / 'base'}", f"--replay={a}", f"--out={tmp_path / 'b'}", "--other_model") == 0
    with pytest.raises(ValueError, match="--replay: expected a trace of this model's architecture"):
        run(trace, f"--checkpoint={DATA / 'mtp'}", f"--replay={a}", f"--out={tmp_path / 'c'}")


@pytest.mark.slow
def test_the_programs_run_as_commands(tmp_path, tokens):
    def command(name, *arguments):
        words = [sys.executable, "-m", f"experiments.{name}", *arguments]
        return subprocess.run(words, capture_output=True, text=True, env=environment(1), check=False)

    found = command("trace", f"--checkpoint={DATA / 'base'}", f"--data={tokens}", f"--out={tmp_path / 'a'}")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"trace: {tmp_path / 'a'}"
    failed = command("trace_diff", f"--a={tmp_path / 'a'}", f"--b={tmp_path}", f"--out={tmp_path / 'd'}")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and failed.stderr.startswith("error: ")


def test_the_benchmark_counts_every_token(capsys):
    assert run(bench_trace, "--tokens=1000", "--batch_tokens=256") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["tokens"] == 1000 and line["speed_over_forward"] > 0 and line["trace_mb"] > 0
