"""The program that evaluates: every task to its files, what was stopped goes on, and every mistake in one line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags as absl_flags

from dsv3_jax.evaluation import human_eval
from experiments import _cli, evaluate
from oracles.cases import DATA
from oracles.jobs import environment
from oracles.talkative import ANSWER, write_talkative

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHOICES = [
    {"context": "a", "choices": ["q", ANSWER[1:], "né"], "answer": 1, "category": "x"},
    {"context": "what comes behind an a", "choices": ["xyz", "q"], "answer": 0, "category": "y"},
    {"question": "n", "choices": ["1", "é19b."], "answer": 1},
]
ANSWERS = [
    {"prompt": "a", "answer": ANSWER.strip()},
    {"prompt": "xn", "answer": ["no", "é19b."]},
    {"prompt": "x1", "answer": "no"},
]


def run(*arguments):
    values = absl_flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", *_cli.with_underscores(list(arguments))])
    return evaluate.main(values)


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talkative(tmp_path_factory.mktemp("talkative"))


@pytest.fixture
def files(tmp_path):
    """Two task files, and two texts in folders of their own."""
    for name, text in (("one", "a" + ANSWER), ("two", "né" * 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
    return lines(tmp_path / "mc.jsonl", *CHOICES), lines(tmp_path / "em.jsonl", *ANSWERS), f"{tmp_path}/*/text.txt"


def test_all_tasks_leave_their_files_and_are_not_done_again(folder, files, tmp_path, capsys, monkeypatch):
    mc, em, texts = files
    out = tmp_path / "out"
    arguments = [f"--checkpoint={folder}", f"--tasks={mc},bits_per_byte,{em}", f"--data={texts}", f"--out={out}"]
    arguments += ["--batch_tokens=64", "--batch-size=3", "--max_new_tokens=12"]
    assert run(*arguments) == 0
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert said.splitlines()[-1] == f"results: {out / 'results.json'}" and max(map(len, said.splitlines())) < 120
    tasks = results["tasks"]
    assert list(tasks) == ["mc", "bits_per_byte", "em"] and results["window"] == 48 and len(results["model"]) == 64
    assert tasks["mc"]["summary"]["accuracy_per_byte"]["value"] >= 2 / 3 and len(tasks["mc"]["settings"]["file"]) == 64
    assert tasks["em"]["summary"]["exact_match"]["value"] == pytest.approx(2 / 3)
    bits = tasks["bits_per_byte"]["summary"]
    assert list(bits["domains"]) == ["one", "two"] and bits["all"]["bytes"] == len(("a" + ANSWER + "né" * 30).encode())
    for name, n in (("mc", 3), ("em", 3), ("bits_per_byte", 2)):
        assert len((out / f"{name}.jsonl").read_text().splitlines()) == n
        assert f"\n{name}\n" in "\n" + said
    assert (out / "evaluation.png").stat().st_size > 5000
    for module, name in (
        (evaluate.multiple_choice, "_outcome"),
        (evaluate.exact_match, "outcome"),
        (evaluate.bits_per_byte, "_outcome"),
    ):
        monkeypatch.setattr(module, name, None)
    assert run(*arguments) == 0 and capsys.readouterr().out == said
    with pytest.raises(ValueError, match="has mc with other settings: unconditional False, not True"):
        run(*arguments, "--unconditional")
    with pytest.raises(ValueError, match="of another evaluation: window 48, not 20"):
        run(*arguments, "--window=20")


def test_ctrl_c_keeps_what_is_finished(folder, files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [f"--checkpoint={folder}", f"--tasks={files[0]}", f"--out={out}", "--batch_tokens=64"]
    real, calls = evaluate.multiple_choice._outcome, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:  # the first record is shorter, and of a batch of its own
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(evaluate.multiple_choice, "_outcome", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert "the same command continues it" in capsys.readouterr().err
    assert len((out / "mc.jsonl").read_text().splitlines()) == 1
    assert json.loads((out / "results.json").read_text())["tasks"]["mc"]["summary"] is None
    assert run(*arguments) == 0 and len(calls) == 4


def test_layers_from_disk_score_the_same_and_do_not_generate(folder, files, tmp_path):
    mc, em, _ = files
    shared = [f"--checkpoint={folder}", "--batch_tokens=64"]
    run(*shared, f"--tasks={mc}", f"--out={tmp_path / 'a'}")
    run(*shared, f"--tasks={mc}", f"--out={tmp_path / 'b'}", "--stream-layers")
    assert (tmp_path / "a" / "mc.jsonl").read_bytes() == (tmp_path / "b" / "mc.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--stream_layers: expected only tasks that score, got em, which generates"):
        run(*shared, f"--tasks={em}", f"--out={tmp_path / 'c'}", "--stream-layers", "--max_new_tokens=12")


def test_results_lie_beside_the_checkpoint_unless_told(files, tmp_path):
    own = write_talkative(tmp_path / "model")
    assert run(f"--checkpoint={own}", f"--tasks={files[0]}", "--limit=1", "--batch_tokens=64") == 0
    assert json.loads((own / "evaluation" / "results.json").read_text())["tasks"]["mc"]["summary"]["records"] == 1


def test_code_is_run_only_with_leave(folder, tmp_path, monkeypatch, capsys):
    problems = [{"task_id": f"T/{i}", "prompt": "a", "test": "def check(f): pass", "entry_point": "a"} for i in range(3)]
    monkeypatch.setattr(human_eval, "read_problems", lambda: problems)
    arguments = [
        f"--checkpoint={folder}",
        "--tasks=humaneval",
        f"--out={tmp_path / 'out'}",
        "--max_new_tokens=12",
        "--workers=1",
    ]
    monkeypatch.setattr(human_eval, "run_program", None)
    with pytest.raises(ValueError, match="--allow_code_execution permits it"):
        run(*arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(human_eval, "read_problems", lambda: problems)
    assert run(*arguments, "--allow_code_execution", "--batch_size=3") == 0
    assert "pass@1" in capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / "out" / "humaneval.jsonl").read_text().splitlines()]
    assert [(each["task_id"], each["completion"], each["passed"]) for each in kept] == [
        (f"T/{i}", ANSWER, False) for i in range(3)
    ]


MODEL, MC = "--checkpoint=MODEL", "--tasks=mc.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MC], "--checkpoint: expected a folder, got none"),
        ([MODEL], "--tasks: expected bits_per_byte, humaneval or .jsonl files, separated by commas, got none"),
        ([MODEL, "--tasks=mmlu"], "--tasks: no file mmlu; expected bits_per_byte, humaneval or a .jsonl file"),
        ([MODEL, "--tasks=mc.jsonl,mc.jsonl"], "there is another task of the name 'mc'"),
        ([MODEL, MC, "--dtype=int8"], "--dtype: expected one of float32, bfloat16, got 'int8'"),
        ([MODEL, MC, "--window=49"], r"--window: expected 2\.\.48, the model's max_position_embeddings, got 49"),
        ([MODEL, MC, "--window=20", "--overlap=20"], r"--overlap: expected 0\.\.19"),
        ([MODEL, MC, "--shots=3"], "--shots: expected fewer than the 3 records"),
        ([MODEL, MC, "--normalise=stem"], "--normalise: expected some of"),
        ([MODEL, "--tasks=em.jsonl"], "max_new_tokens: expected fewer than the window of 48 tokens, got 64; set --max_new"),
        ([MODEL, "--tasks=bits_per_byte", "--data=none/*.txt"], "no file matches 'none/"),
        (
            [MODEL, "--tasks=humaneval", "--allow_code_execution", "--k=2"],
            "--k: expected one that is at most --samples=1, got 2",
        ),
        ([MODEL, "--tasks=humaneval", "--allow_code_execution", "--k=x"], "--k: expected numbers from 1 on, got 'x'"),
        ([MODEL, "--tasks=humaneval", "--allow_code_execution", "--top_p=0"], "top_p: expected 0 < top_p <= 1"),
        (["--checkpoint=none", MC], "none: expected a checkpoint's folder, got nothing"),
        ([f"--checkpoint={DATA / 'base'}", MC], r"--checkpoint: .* has no tokenizer\.json; copy the model's there"),
        ([MODEL, MC, "--out=mc.jsonl"], "--out: expected a folder or where one can be made"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folder, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        run(
            *([] if any("--out" in each for each in arguments) else ["--out=out"]),
            *(a.replace("MODEL", str(folder)) for a in arguments),
        )
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_program_as_a_command(folder, files, tmp_path):
    command = [sys.executable, "-m", "experiments.evaluate", f"--checkpoint={folder}", "--batch_tokens=64"]
    found = subprocess.run([*command, "--tasks=none.jsonl"], capture_output=True, text=True, env=environment(1), check=False)
    assert found.returncode == 2 and found.stderr == (
        "error: --tasks: no file none.jsonl; expected bits_per_byte, humaneval or a .jsonl file\n"
    )
    # Windows without end: it is stopped within.
    (tmp_path / "long.txt").write_text("né19b. " * 30_000)
    # Where the tests run in the background, children ignore Ctrl-C unless they are told not to.
    heard = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command[1:3] = ["-c", heard + "runpy.run_module('experiments.evaluate', run_name='__main__', alter_sys=True)"]
    long = [*command, "--tasks=bits_per_byte", f"--data={tmp_path}/long.txt,{tmp_path}/*/text.txt", f"--out={tmp_path / 'out'}"]
    with subprocess.Popen(long, stderr=subprocess.PIPE, text=True, env=environment(1)) as process:
        deadline, kept = time.monotonic() + 120, tmp_path / "out" / "bits_per_byte.jsonl"
        while time.monotonic() < deadline and not (kept.exists() and kept.read_text()):
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command continues it" in error and "Traceback" not in error
    assert kept.read_text().endswith("\n")
