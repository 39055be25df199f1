"""The report of a finished run: `report.md` with its figures, and validation beside what needs no network."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.analysis import figures
from dsv3_jax.analysis.metrics import relative_load
from dsv3_jax.analysis.sample import sample
from dsv3_jax.config import Config
from dsv3_jax.data.baselines import baselines
from dsv3_jax.data.pipeline import build_data
from dsv3_jax.settings import from_dict
from dsv3_jax.training.header import header_lines
from dsv3_jax.training.journal import read_metrics, read_routing, write_json, write_text

LOAD_STEPS = 20  # last steps whose expert counts the load map adds up


def write_report(workdir: str | Path) -> str:
    """Writes report.md and its figures into the folder of a finished run; returns the table of validation scores.

    The report ends with samples of what the model writes. Raises OSError or ValueError if the run's files are missing.
    """
    workdir = Path(workdir)
    run, validation = (json.loads((workdir / name).read_text()) for name in ("run.json", "validation.json"))
    config = from_dict(run["config"])
    data = build_data(config.data, config.model.vocab_size)
    if "baselines" not in validation:
        validation["baselines"] = baselines(data)
        write_json(workdir / "validation.json", validation)
    drawn = _draw(workdir, config, run["domains"])
    table = validation_table(validation)
    text = _markdown(run, validation, drawn, read_metrics(workdir)) + "\n" + sample(workdir, data)
    write_text(workdir / "report.md", text)
    return f"{table}\nreport: {workdir / 'report.md'}"


def layer_names(config: Config) -> list[str]:
    """Names of the MoE layers: the main model's by their number, then the MTP depths'."""
    model = config.model
    main = [f"layer {i}" for i in range(model.first_k_dense_replace, model.num_hidden_layers)]
    return main + [f"MTP {k}" for k in range(1, model.num_nextn_predict_layers + 1)]


def score_columns(validation: dict[str, Any]) -> tuple[list[str], dict[str, list[float | None]]]:
    """Column names, and domain -> bits per byte: weights, their average, then the baselines, whose row for `all` is
    weighted by bytes."""
    n_bytes, base = validation["eval_bytes"], validation["baselines"]
    ours = [name for name in ("raw", "ema") if name in validation]
    others: list[str] = list(next(iter(base.values())))
    rows = {}
    for domain in validation["raw"]["bits_per_byte"]:
        if domain in base:
            marks = [base[domain][name] for name in others]
        else:
            marks = [sum(base[d][name] * n for d, n in n_bytes.items()) / sum(n_bytes.values()) for name in others]
        rows[domain] = [validation[name]["bits_per_byte"][domain] for name in ours] + marks
    titles: dict[str, str] = {"raw": "weights", "ema": "EMA", "byte_bigram": "bigram", "byte_5gram": "5-gram"}
    return [titles.get(name, str(name)) for name in ours + others], rows


def validation_table(validation: dict[str, Any]) -> str:
    """Bits per byte on held-out text, for a terminal of 100 columns."""
    names, rows = score_columns(validation)
    lines = [
        "bits per byte on held-out text, lower is better",
        f"{'domain':<16}{'bytes':>10}" + "".join(f"{name:>10}" for name in names),
    ]
    for domain, scores in rows.items():
        n_bytes = validation["eval_bytes"].get(domain, sum(validation["eval_bytes"].values()))
        lines.append(f"{domain[:15]:<16}{n_bytes:>10,}" + "".join(f"{_number(score):>10}" for score in scores))
    return "\n".join(lines)


def _number(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _draw(workdir: Path, config: Config, domains: list[str]) -> list[tuple[str, str]]:
    """Draws every figure that this model has; [(file, caption)]."""
    layers, records = layer_names(config), read_metrics(workdir)
    figures.save(figures.losses(records), workdir / "losses.png")
    drawn = [("losses.png", "Losses (smoothed; grey: every step), losses by domain, gradient norm and learning rate.")]
    if not layers:
        return drawn
    routing = read_routing(workdir, len(layers), config.model.n_routed_experts)
    recent = routing["load"][-LOAD_STEPS:].astype(np.int64).sum(axis=0)
    domain_load = np.load(workdir / "validation_load.npy")
    title = f"Relative expert load, last {min(LOAD_STEPS, len(routing))} training steps (1: balance)"
    by_domain = "Relative expert load by domain, held-out text (1: balance within the domain)"
    every = max(1, len(routing) // 1000)  # more points than pixels would only cost time
    for file, caption, figure in (
        ("max_vio.png", "MaxVio: the busiest expert's load over the mean, minus 1.", figures.violation(records, layers)),
        (
            "bias.png",
            "The router bias of every expert, as the controller moved it.",
            figures.bias_paths(routing["step"][::every], routing["bias"][::every], layers),
        ),
        ("load.png", "Layer x expert.", figures.load_map(relative_load(recent), layers, title)),
        ("domains.png", "Domain x expert.", figures.domain_maps(relative_load(domain_load), domains, layers, by_domain)),
    ):
        figures.save(figure, workdir / file)
        drawn.append((file, caption))
    return drawn


def _markdown(
    run: dict[str, Any], validation: dict[str, Any], drawn: list[tuple[str, str]], records: list[dict[str, Any]]
) -> str:
    names, rows = score_columns(validation)
    table = [f"| domain | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    table += [f"| {domain} | {' | '.join(map(_number, scores))} |" for domain, scores in rows.items()]
    tail = records[-LOAD_STEPS:]
    max_vio = sum(r["max_vio_mean"] for r in tail) / len(tail)
    wall = sum(r["seconds"] for r in records)
    depths = ", ".join(f"depth {k}: {_number(x)}" for k, x in enumerate(validation["raw"]["mtp_loss"], 1))
    return "\n".join(
        [
            "# Training run",
            "",
            f"{validation['step']:,} steps in {wall / 60:.1f} minutes; skipped updates: {records[-1]['skipped']}; "
            f"mean MaxVio of the last {len(tail)} steps: {max_vio:.2f}; dead experts in the last step: "
            f"{sum(records[-1]['dead_experts'])}.",
            "",
            "## Validation: bits per byte on held-out text",
            "",
            *table,
            "",
            "`weights`: the trained parameters; `EMA`: their average; `bigram` and `5-gram`: interpolated byte n-grams counted "
            "on the training text; `lzma`: the held-out text compressed by itself.",
            *(["", f"MTP loss on held-out text, nats per token: {depths}."] if depths else []),
            "",
            *(line for file, caption in drawn for line in (f"![{caption}]({file})", "", caption, "")),
            "## Run",
            "",
            "```",
            *header_lines(run),
            "```",
            "",
        ]
    )
