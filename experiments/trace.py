"""Which experts does a model choose for every token of a text? Writes a routing trace: compact, streamed, memory-mapped.

    python -m experiments.trace --checkpoint=DIR --data=embedded --out=TRACE [--stream-layers] [--max_tokens=1000000]
    python -m experiments.trace --checkpoint=DIR --replay=TRACE --out=TRACE2      # forced to TRACE's experts

DIR: a released folder, one that `experiments.convert` wrote, or a training run's (RUN/checkpoints/STEP: as it was then).
`--data`: `embedded` (held-out documents of the corpus that comes with the package, with their domains), globs of .txt, .jsonl
or .parquet files, or an .npy file of token ids [sequences, T]. TRACE holds for every token, in every MoE layer, MTP's too: the
experts in order, their gates, the margin to the first one left out, the groups that were kept, with `--scores` all affinities;
and token ids, documents, domains, and what model, tokenizer and text they are of. What a run has written when it is stopped is
continued by the same command.

`--stream-layers` reads one layer at a time: of a model larger than memory one layer and the activations of `--batch_tokens`
tokens must fit, and it is read once for each batch. `dsv3_jax.tracing.store.open_trace` opens a trace; `experiments.trace_diff`
compares two.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
from absl import flags

from dsv3_jax.analysis.metrics import max_violation
from dsv3_jax.analysis.routing import dead_experts, expert_load
from dsv3_jax.config import ModelConfig
from dsv3_jax.fp8.precision import SERVING
from dsv3_jax.inference.score import InMemory, Streamed, check_tokens
from dsv3_jax.inference.text import folder_tokenizer
from dsv3_jax.interop.digest import model_digest
from dsv3_jax.interop.read import load_bias, load_parameters
from dsv3_jax.interop.source import Source, open_source
from dsv3_jax.tracing.capture import ByLayer, Tracer, Whole, check_replay, has_groups, trace
from dsv3_jax.tracing.store import RoutingTrace, Text, Writer, about_model, open_trace
from dsv3_jax.tracing.text import data_of, read_text
from experiments import _cli
from experiments.score import DTYPES, placement_from


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("checkpoint", None, "folder of a model", flag_values=values)
    flags.DEFINE_string("data", None, "embedded, globs of files, or an .npy of token ids", flag_values=values)
    flags.DEFINE_string("out", None, "folder of the trace to write", flag_values=values)
    flags.DEFINE_string("replay", None, "a trace whose experts are used instead of the router's choice", flag_values=values)
    flags.DEFINE_bool("other_model", False, "the trace to replay may be of other weights", flag_values=values)
    flags.DEFINE_bool("stream_layers", False, "read one layer at a time from disk", flag_values=values)
    flags.DEFINE_bool("scores", False, "all affinities too: E numbers a token and layer", flag_values=values)
    flags.DEFINE_integer("seq_len", 1024, "tokens of a window; longer documents are cut", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch_tokens", 8192, "tokens of one pass", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "of the text; default: all", lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "domain_from", "path", "field of the records that names the domain; path: the folder", flag_values=values
    )
    flags.DEFINE_string("text_field", "text", "field of the records that holds the text", flag_values=values)
    flags.DEFINE_string("dtype", "float32", f"to compute in: {' or '.join(DTYPES)}", flag_values=values)
    flags.DEFINE_bool("fp8", False, "round the inputs of linear layers too", flag_values=values)
    flags.DEFINE_bool("mtp", True, "the MTP modules too", flag_values=values)
    flags.DEFINE_bool("average", False, "a run's averaged weights", flag_values=values)
    flags.DEFINE_multi_string("set", [], "layout=... and mesh_...=...; of config.py's ParallelConfig", flag_values=values)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    for name in ("checkpoint", "out"):
        if not getattr(values, name):
            raise ValueError(f"--{name}: expected a path, got none")
    if bool(values.data) == bool(values.replay):
        raise ValueError(
            "--data: expected either this or --replay, got both" if values.data else "--data: expected a text, got none"
        )
    if values.dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {values.dtype!r}")
    out = Path(values.out)
    if out.exists():  # before any work
        raise ValueError(f"--out: {out} exists; name another folder, or remove it")
    source = open_source(values.checkpoint, compute_dtype=values.dtype, mtp=values.mtp, average=values.average)
    if not source.config.n_moe_layers:
        raise ValueError(f"--checkpoint: {values.checkpoint} has no layer with a router")
    if values.fp8:
        source = source._replace(config=dataclasses.replace(source.config, fp8=SERVING))
    model = model_digest(source.tensors)
    forced, batch_tokens = None, values.batch_tokens
    if values.replay:
        forced = open_trace(values.replay)
        check_replay(forced, source.config, None if values.other_model else model)
        text, batch_tokens = forced.text, forced.about.batch_tokens
    else:
        tokenizer = folder_tokenizer(source.folder, source.config.vocab_size)
        text = read_text(
            data_of(values.data, values.seq_len, values.domain_from, values.text_field), tokenizer, values.max_tokens
        )
    check_tokens(np.asarray(text.tokens_N)[None], source.config)
    tracer = tracer_of(source, values)
    writer = writer_of(out, source, text, model, batch_tokens, values)  # last: what is begun belongs to these flags
    if writer.done:
        print(f"continuing {out}.part after {writer.done} batches", file=sys.stderr)
    try:
        trace(tracer, text, writer, batch_tokens, forced, progress=True)
    except KeyboardInterrupt:
        print(f"\nwhat is written stays in {out}.part; the same command continues it", file=sys.stderr)
        raise
    print(summary(open_trace(out)))
    print(f"trace: {out}")
    return 0


def writer_of(out: Path, source: Source, text: Text, model: str, batch_tokens: int, values: flags.FlagValues) -> Writer:
    tokenizer = source.folder / "tokenizer.json"
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else None
    how: dict[str, object] = {
        "dtype": values.dtype,
        "fp8": values.fp8,
        "stream_layers": values.stream_layers,
        "layout": sorted(values.set),
    }
    if values.replay:
        how["replay_of"] = str(values.replay)
    about = about_model(
        source.config, model=model, tokenizer=digest, domains=text.domains, source=str(values.data or values.replay),
        batch_tokens=batch_tokens, how=how,
    )  # fmt: skip
    return Writer(out, about, text, source.config.n_group if has_groups(source.config) else 0, values.scores)


def tracer_of(source: Source, values: flags.FlagValues) -> Tracer:
    config: ModelConfig = source.config
    placement = placement_from(values.set, config.n_routed_experts)
    if values.stream_layers or placement is not None:
        return ByLayer(Streamed(source.tensors, config, values.dtype, placement), values.scores)
    params, bias = load_parameters(source.tensors, config, values.dtype, keep_fp8=values.fp8), load_bias(source.tensors, config)
    if values.fp8:  # weights stay as they are stored: a layer at a time
        return ByLayer(InMemory(params, bias, config), values.scores)
    return Whole(params, bias, config, values.scores)


def summary(trace: RoutingTrace) -> str:
    """A layer a row: how even its experts' load is."""
    rows = [f"{'layer':<10}{'MaxVio':>10}{'dead experts':>14}{'median margin':>16}"]
    load_LE = expert_load(trace.choices.experts_NLK, trace.about.n_experts)
    vio_L, dead_L = max_violation(load_LE), dead_experts(load_LE).sum(axis=-1)
    for i, name in enumerate(trace.about.layers):
        vio = middle = float("nan")
        if load_LE[i].any():
            vio, middle = vio_L[i], float(np.nanmedian(trace.choices.margins_NL[:, i].astype(np.float32)))
        rows.append(f"{name:<10}{vio:>10.3f}{dead_L[i]:>14}{middle:>16.2e}")
    size = f"{trace.n_tokens:,} tokens in {len(trace.text.lengths):,} sequences of {len(trace.text.domains)} domains"
    return "\n".join([size, *rows])


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
