"""How fast is a routing trace beside the forward pass alone, and how much memory does it take?

    python -m experiments.bench_trace [--preset=tiny] [--tokens=1000000]

One JSON line: tokens a second of a trace that is written to disk, and of the forward pass of the same batches alone (with MTP),
in turns, group by group, with the median of the groups' ratios; megabytes of the trace, and by how much the process grew from
the first group to the last. Random weights and tokens. A minute or two on two cores.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dsv3_jax.model.module import init_variables
from dsv3_jax.model.mtp import mtp_forward
from dsv3_jax.model.transformer import forward, make_context
from dsv3_jax.presets import preset
from dsv3_jax.tracing.capture import Batch, Whole, batches, choices_of, has_groups, tokens_of
from dsv3_jax.tracing.store import Text, Writer, about_model
from experiments import _bench, _cli

TARGET = 0.7  # of the forward pass's speed
GROUPS = 10


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("preset", "tiny", "whose model", flag_values=values)
    flags.DEFINE_integer("tokens", 1_000_000, "of the trace", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch_tokens", 8192, "tokens of one pass", lower_bound=1, flag_values=values)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    whole = preset(values.preset)
    config, length = whole.model, whole.data.seq_len
    variables = init_variables(config)
    tracer = Whole(variables.params, variables.bias_LE, config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, values.tokens).astype(np.int32)
    starts = np.append(np.arange(0, values.tokens, length), values.tokens)
    one = np.zeros(len(starts) - 1, np.int32)
    text = Text(ids, starts, one, one, ("random",))
    todo = batches(text, values.batch_tokens)

    @jax.jit
    def alone(params: Any, bias: jax.Array, tokens: jax.Array) -> list[jax.Array]:
        context = make_context(jnp.ones(tokens.shape, jnp.int32), config, cross_document=True)
        how: dict[str, Any] = {"summary": lambda routing, extra: None}
        main = forward(params, bias, tokens, context, config, **how)
        depths = mtp_forward(params, bias, tokens, main, context, config, **how) if config.num_nextn_predict_layers else []
        return [main.normed_BTD, *(depth.normed_BTD for depth in depths)]

    def forwarded(group: Sequence[Batch]) -> None:
        for batch in group:
            jax.block_until_ready(alone(variables.params, variables.bias_LE, tokens_of(text, batch)))

    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        about = about_model(
            config, model="random", tokenizer=None, domains=text.domains, source="random", batch_tokens=values.batch_tokens,
            how={},
        )  # fmt: skip
        writer = Writer(Path(folder) / "trace", about, text, config.n_group if has_groups(config) else 0)

        def traced(group: Sequence[Batch]) -> None:
            for batch in group:
                found = choices_of(tracer.run(tokens_of(text, batch)), text, batch, config)
                writer.write([text.sequence(i) for i in batch.sequences], found)

        for batch in {(batch.rows, batch.length): batch for batch in todo}.values():  # compiled before anything is timed
            forwarded([batch])
            jax.block_until_ready(tracer.run(tokens_of(text, batch)).hidden_BTD)
        size, times, start_mb = -(-len(todo) // GROUPS), [], 0.0
        for i in range(0, len(todo), size):
            group = todo[i : i + size]
            n = sum(int(text.lengths[list(batch.sequences)].sum()) for batch in group)
            times.append((n, _seconds(traced, group), _seconds(forwarded, group)))
            start_mb = start_mb or _peak_mb()
        writer.finish()
        written = sum(path.stat().st_size for path in (Path(folder) / "trace").iterdir()) / 2**20
    total, trace_s, alone_s = (sum(column) for column in zip(*times, strict=True))
    ratios = [forward_s / traced_s for _, traced_s, forward_s in times]
    _bench.show({
        "what": "trace", "preset": values.preset, "tokens": total, "tokens_per_s": round(total / trace_s),
        "forward_tokens_per_s": round(total / alone_s), "speed_over_forward": round(statistics.median(ratios), 3),
        "groups": [round(ratio, 3) for ratio in ratios], "target": TARGET, "trace_mb": round(written, 3),
        "grew_mb": round(_peak_mb() - start_mb, 1), "peak_mb": round(_peak_mb()),
    })  # fmt: skip
    return 0


def _seconds(run: Callable[[Sequence[Batch]], None], group: Sequence[Batch]) -> float:
    start = time.perf_counter()
    run(group)
    return time.perf_counter() - start


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
