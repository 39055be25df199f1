"""lm-eval drives our models over local tasks, and comes to our own numbers."""

import importlib
import json
import math
import runpy
import subprocess
import sys

import pytest

from dsv3_jax.data.documents import Document
from dsv3_jax.evaluation.bits_per_byte import run_documents
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.multiple_choice import run_choices
from dsv3_jax.evaluation.tasks import read_task
from oracles.jobs import environment
from oracles.talkative import ANSWER

MISSING = "the extra `lm-eval` is not installed"
RECORDS = [
    {"context": "a", "choices": ["q", ANSWER[1:], "né"], "answer": 1},
    {"context": "what comes behind an a", "choices": ["x" + ANSWER[1:], "q"], "answer": 0},
    {"context": "Q: n\nA:", "choices": ["1", "é19b."], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
{more}
metric_list:
"""


def test_without_the_package_the_command_says_in_one_line_what_to_install(monkeypatch, capsys):
    name = "dsv3_jax.evaluation.lm_eval_adapter"
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(name, run_name="__main__")
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "pip install 'dsv3_jax[lm-eval]'" in said
    with pytest.raises(ImportError, match=r"install the extra: pip install 'dsv3_jax\[lm-eval\]'"):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of three tasks and the file of the multiple-choice one."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "mine.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    metrics = ("acc", "acc_bytes", "acc_mutual_info")

    def write(name, kind, text, target, more, *metrics):
        text = TASK.format(name=name, file=data, kind=kind, text=text, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text + "".join(f"  - metric: {metric}\n" for metric in metrics))

    write("mine_choice", "multiple_choice", "{{context}}", "answer", "doc_to_choice: choices", *metrics)
    write("mine_text", "loglikelihood_rolling", "", '"{{context}}"', "", "bits_per_byte")
    until = "generation_kwargs: {until: ['b'], max_gen_toks: 12}"
    write("mine_answer", "generate_until", "{{context}}", f'"{ANSWER.removesuffix("b.")}"', until, "exact_match")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # another package's
def test_local_tasks_come_to_our_numbers(folder, subject, tasks, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason=MISSING)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    from dsv3_jax.evaluation import lm_eval_adapter  # noqa: F401  registers the model

    found = lm_eval.simple_evaluate(
        model="dsv3_jax", model_args={"checkpoint": str(folder), "batch_tokens": 64}, batch_size=2,
        tasks=["mine_choice", "mine_text", "mine_answer"], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    task = read_task(tasks / "mine.jsonl")
    with Journal(tmp_path, "t") as journal:
        ours = run_choices(
            subject.supply, subject.tokenizer, task.records, journal, window=subject.window, batch_tokens=64, unconditional=True
        )
        kept = journal.finished
    theirs = found["results"]["mine_choice"]
    names = {"acc": "accuracy", "acc_bytes": "accuracy_per_byte", "acc_mutual_info": "accuracy_unconditional"}
    for their_name, name in names.items():
        assert theirs[f"{their_name},none"] == pytest.approx(ours[name]["value"])
    assert 0 < theirs["acc,none"] < 1 or theirs["acc,none"] != theirs["acc_bytes,none"]  # not all alike
    for sample in found["samples"]["mine_choice"]:
        own = kept[sample["doc_id"]]
        nats = [float(answer[0]) for answer in sample["filtered_resps"]]
        # The same program in other batches: float32's rounding.
        assert nats == pytest.approx(own["logprobs"] + own["unconditional_logprobs"], abs=1e-4)
    documents = [Document("mine", record["context"]) for record in RECORDS]
    with Journal(tmp_path, "d") as journal:
        bits = run_documents(
            subject.supply, subject.tokenizer, documents, journal, window=subject.window, overlap=subject.window // 2,
            batch_tokens=64, seed=0,
        )  # fmt: skip
    assert found["results"]["mine_text"]["bits_per_byte,none"] == pytest.approx(bits["all"]["bits_per_byte"]["value"], rel=1e-5)
    # Two of the three contexts end in a letter whose successors ANSWER holds; up to the stop text it is the first one's.
    texts = [sample["filtered_resps"][0] for sample in found["samples"]["mine_answer"]]
    assert texts[0] == texts[1] == ANSWER.removesuffix("b.") and not any("b" in text for text in texts)
    assert math.isclose(found["results"]["mine_answer"]["exact_match,none"], sum(t == texts[0] for t in texts) / 3)


@pytest.mark.slow
def test_the_command_is_lm_evals_own(folder, tasks, tmp_path):
    pytest.importorskip("lm_eval", reason=MISSING)
    words = ["-m", "dsv3_jax.evaluation.lm_eval_adapter", "--model_args", f"checkpoint={folder}", "--tasks=mine_choice"]
    where = {"HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, *words, f"--include_path={tasks}", f"--output_path={tmp_path / 'out'}"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment(1) | where, check=False)
    assert found.returncode == 0, found.stderr
    assert "mine_choice" in found.stdout and "acc_bytes" in found.stdout and list((tmp_path / "out").rglob("results_*.json"))
    command[4] = "checkpoint=none"
    found = subprocess.run(command, capture_output=True, text=True, env=environment(1) | where, check=False)
    assert found.returncode == 2 and found.stderr.splitlines()[-1].startswith("error: none: expected a checkpoint's folder")
