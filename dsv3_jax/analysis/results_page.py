"""The ablations' results as a page of Markdown: first every claim and its verdict, then each ablation's setting and numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv3_jax.analysis.metrics import paired_interval

HEAD = """# Results

The report's claims at small scale: the same seeds and data for every arm, differences within a seed, Student's 95 % interval
over seeds. *Reproduced*: the interval lies wholly where the claim says. *Contradicted*: wholly elsewhere. *Not resolved*: it
reaches both; in brackets the smallest difference that as many seeds would have found in four cases of five. Each claim is
judged by itself: where there is no difference at all, one interval in twenty excludes 0 by chance. The ablations are meant for
five seeds; a verdict of fewer, which Student's interval allows for but which sees less, says so behind their number. A measure
that is not finite in one run or more, as after a run that diverged, resolves nothing, and the number of these runs stands in
its place. This page is written by `python -m experiments.ablations`.
"""
SEEDS = 5  # of a verdict that stands without a remark


def difference_text(claim: Mapping[str, Any]) -> str:
    """`+0.0012 ± 0.0007`, and what could have been seen where nothing was resolved; or of how many runs there is no number."""
    half, absolute = claim["half_width_95"], claim["than"] is None
    value = claim["arm_mean" if absolute else "mean"]
    if value is None:
        runs = claim["not_finite"]
        return f"not finite in {runs} run{'s' * (runs != 1)}"
    text = number(value, signed=not absolute)
    text += f" ± {number(half)}" if half is not None else ""
    if claim["verdict"] == "not resolved" and claim["detectable"] is not None:
        text += f" ({number(claim['detectable'])})"
    return text


def number(value: float | None, signed: bool = False) -> str:
    """With four digits behind the point where there is none before it, fewer for larger ones; None: there is none."""
    if value is None:
        return "not finite"
    digits = 4 if abs(value) < 10 else 2 if abs(value) < 100 else 0
    return f"{value:+.{digits}f}" if signed else f"{value:,.{digits}f}"


def setting_text(result: Mapping[str, Any]) -> str:
    """What the numbers hang on, in a line."""
    versions, corpus = result["versions"], result["corpus"]
    device = " ".join(dict.fromkeys(result["device"].split()))  # "cpu cpu" says no more than "cpu"
    return (
        f"{size_text(result)}, {result['steps']:,} steps; corpus `{corpus['sha256']}` ({corpus['bytes'] / 1e6:.1f} MB); "
        f"{device}, Python {versions['python']}, jax {versions['jax']}; {result['date']}"
    )


def size_text(result: Mapping[str, Any]) -> str:
    """How much a run read, and how often the same."""
    epochs, seeds = result["tokens"] / result["corpus"]["train_tokens"], f"{result['seeds']} seed{'s' * (result['seeds'] != 1)}"
    return f"`{result['preset']}`, {result['tokens'] / 1e6:.1f}M tokens, {epochs:.1f} epochs, {seeds}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def verdicts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row a claim and preset."""
    lines = [_row(["claim", "measured", "the report", "verdict", "at"]), _row(["---"] * 5)]
    for result in results:
        at = size_text(result) + f" (fewer than {SEEDS})" * (result["seeds"] < SEEDS)
        for claim in result["claims"]:
            lines.append(_row([claim["text"], difference_text(claim), claim["report"], f"**{claim['verdict']}**", at]))
    return lines


def section(result: Mapping[str, Any], figure: str | None) -> list[str]:
    """An ablation: command, setting, every arm's measures with their differences from the first."""
    scores, base, titles = result["scores"], result["baseline"], result["titles"]
    lines = [f"## {result['question']} (`{result['preset']}`)", "", f"    {result['command']}", "", setting_text(result), ""]
    lines += [_row(["arm", "parameters, activated", *titles.values()]), _row(["---"] * (2 + len(titles)))]
    for arm, of_arm in scores.items():
        counts, cells = result["arms"][arm], []
        for measure in titles:
            cell = number(_mean([score[measure] for score in of_arm]))
            d = result["differences"][arm][measure] if arm != base else None
            if d is not None and d["mean"] is not None:
                cell += f" ({number(d['mean'], signed=True)}"
                cell += f" ± {number(d['half_width_95'])})" if d["half_width_95"] is not None else ")"
            cells.append(cell)
        lines.append(_row([arm, f"{counts['total']:,}, {counts['active_with_head']:,}", *cells]))
    lines += ["", f"In brackets: the difference from {base}, paired by seed."]
    shown = {*titles, *(claim["measure"] for claim in result["claims"])}
    for arm, of_arm in scores.items():
        further = [name for name in of_arm[0] if name not in shown and name not in scores[base][0]]
        if further:
            parts = [f"{name} {_interval([score[name] for score in of_arm])}" for name in further]
            lines += ["", f"Of {arm}: {'; '.join(parts)}."]
    return [*lines, "", *([f"![{result['question']}]({figure})", ""] if figure else [])]


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is: a number that was not finite."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _interval(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return number(None)
    mean, half_width, _ = paired_interval(known)
    return number(mean) + (f" ± {number(half_width)}" if half_width else "")


def page(results: Sequence[Mapping[str, Any]], figures: Mapping[str, str]) -> str:
    """`figures`: `NAME-PRESET` -> path from the page."""
    lines = [HEAD, *verdicts(results), ""]
    for result in results:
        lines += section(result, figures.get(f"{result['name']}-{result['preset']}"))
    return "\n".join(lines).rstrip() + "\n"
