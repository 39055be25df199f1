"""What does a model say of given tokens, and what did every router choose? The way to compare this port with another.

    python -m experiments.score --checkpoint=DIR --tokens=T.npy --out=O.npz [--dtype=bfloat16] [--fp8] [--stream_layers]

DIR: a released Hugging Face folder, one that `experiments.convert` wrote, or a training run's; T: integers [batch, seq].
O holds `logits` [B,T,V] and `hidden` [B,T,D] (after the final norm), float32; `router_indices` [L,B,T,K] int32, of the main
model's MoE layers, by descending biased score; `router_weights`, float32, aligned with it; with MTP `mtp_logits` [depth,B,T,V]
and `mtp_router_indices` [depth,B,T,K]: row i of depth k is fed by positions i and i+k and predicts i+k+1; unused rows hold NaN
and -1.
`--stream_layers` reads one layer at a time: a model larger than memory needs one layer and the activations. `--set=layout=...`
divides the rows, and the experts, among all devices. `--fp8` multiplies as released code serves [§3.3]: inputs of linear layers
rounded in tiles of 1 x 128, FP8 weights as they are stored, others rounded in blocks.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags

from dsv3_jax.config import Config, ParallelConfig
from dsv3_jax.fp8.precision import SERVING
from dsv3_jax.inference.score import InMemory, Streamed, Supply, check_tokens, mapped_array, score, write_scores
from dsv3_jax.interop.read import load_bias, load_parameters
from dsv3_jax.interop.source import open_source
from dsv3_jax.parallel.collectives import Placement
from dsv3_jax.settings import override, parse_settings
from dsv3_jax.training.placed import placement_of
from experiments import _cli

DTYPES = ("float32", "bfloat16")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("checkpoint", None, "folder of a model", flag_values=values)
    flags.DEFINE_string("tokens", None, ".npy file, integers [batch, seq]", flag_values=values)
    flags.DEFINE_string("out", None, ".npz file to write", flag_values=values)
    flags.DEFINE_string("dtype", "float32", f"to compute in: {' or '.join(DTYPES)}", flag_values=values)
    flags.DEFINE_bool("fp8", False, "round the inputs of linear layers too", flag_values=values)
    flags.DEFINE_bool("stream_layers", False, "read one layer at a time from disk", flag_values=values)
    flags.DEFINE_bool("mtp", True, "the MTP modules too", flag_values=values)
    flags.DEFINE_bool("average", False, "a run's averaged weights", flag_values=values)
    flags.DEFINE_multi_string("set", [], "layout=... and mesh_...=...; of config.py's ParallelConfig", flag_values=values)


def placement_from(settings: list[str], n_experts: int) -> Placement | None:
    """Raises ValueError for settings that are no field of the layout."""
    parsed = parse_settings(settings)
    names = {field.name for field in dataclasses.fields(ParallelConfig)}
    for name in parsed:
        if name not in names:
            raise ValueError(f"--set: expected one of {', '.join(sorted(names))}, got {name!r}")
    config = Config()
    model = dataclasses.replace(config.model, n_routed_experts=n_experts, n_group=1, topk_group=1, num_experts_per_tok=1)
    return placement_of(override(dataclasses.replace(config, model=model), parsed))


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    for name in ("checkpoint", "tokens", "out"):
        if not getattr(values, name):
            raise ValueError(f"--{name}: expected a path, got none")
    if values.dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {values.dtype!r}")
    tokens, out = mapped_array(Path(values.tokens), "--tokens"), Path(values.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that is there, got {out}")
    source = open_source(values.checkpoint, compute_dtype=values.dtype, mtp=values.mtp, average=values.average)
    if values.fp8:
        source = source._replace(config=dataclasses.replace(source.config, fp8=SERVING))
    check_tokens(tokens, source.config)
    placement = placement_from(values.set, source.config.n_routed_experts)
    supply: Supply
    if values.stream_layers or placement is not None:
        supply = Streamed(source.tensors, source.config, values.dtype, placement)
    else:
        params = load_parameters(source.tensors, source.config, values.dtype, keep_fp8=values.fp8)
        supply = InMemory(params, load_bias(source.tensors, source.config), source.config)
    scores = score(supply, tokens, progress=True)
    write_scores(out, scores)
    print(summary(tokens, scores.logits))
    print(f"scores: {out}")
    return 0


def summary(tokens: np.ndarray, logits: np.ndarray) -> str:
    """Mean loss of predicting each next token."""
    if tokens.shape[1] < 2:
        return f"{tokens.size} tokens"
    rows = jnp.asarray(logits[:, :-1])
    chosen = jnp.take_along_axis(rows, jnp.asarray(tokens[:, 1:, None], jnp.int32), axis=-1)[..., 0]
    loss = float((jnp.log(jnp.exp(rows - rows.max(-1, keepdims=True)).sum(-1)) + rows.max(-1) - chosen).mean())
    return f"{tokens.shape[0]} x {tokens.shape[1]} tokens, mean loss of the next token {loss:.4f}"


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
