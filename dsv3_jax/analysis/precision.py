"""What a training format costs [§3.3, appendix B]: gaps in loss between whole runs and, with the same weights on one batch, the
errors of every layer's activations and gradients, and the routers' choices that turn out otherwise.

The report's claim is of the loss: |FP8 - BF16| / BF16 < 0.25 %, both smoothed with coefficient 0.9. Gaps are in percent.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.analysis.metrics import paired_interval, smooth
from dsv3_jax.config import Config
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mtp import predicts_within_document
from dsv3_jax.model.transformer import block, embed, make_context
from dsv3_jax.moe.router import Routing
from dsv3_jax.training.objective import Batch, depth_losses

COEFFICIENT, CLAIM = 0.9, 0.25  # of the smoothing; percent
CURVE_POINTS = 250  # of a run's steps, as many as a figure shows
MARGINS = 10.0 ** np.arange(-5, 0.25, 0.5)  # edges of the bins; one more below, one more above

Records = Sequence[Mapping[str, Any]]  # of a run, one a step


# --- loss ---


def smoothed(records: Records) -> Float[np.ndarray, "T"]:
    """Main training loss after the exponential average, debiased; a step that was skipped changes nothing."""
    return smooth([r["main_loss"] for r in records], -1 / math.log(COEFFICIENT))


def gap(ours: Records, base: Records) -> Float[np.ndarray, "T"]:
    """(ours - base) / base in percent, of the smoothed losses, over the steps that both have."""
    n = min(len(ours), len(base))
    a, b = smoothed(ours[:n]), smoothed(base[:n])
    return 100 * (a - b) / b


def diverged(records: Records) -> bool:
    """Whether a loss is not finite in the last quarter of a run."""
    return any(r["main_loss"] is None for r in _last_quarter(records))


def verdict(mean: float, half_width: float | None) -> str:
    """On the claim: "within" or "outside" where all of the interval is, else "not resolved", as one seed always is."""
    if half_width is None:
        return "not resolved"
    if abs(mean) + half_width < CLAIM:
        return "within"
    return "outside" if abs(mean) - half_width > CLAIM else "not resolved"


def loss_gap(ours: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON-able, of two arms' runs, paired by seed: the gap's curve, its mean over the last quarter, and its largest value.

    `largest` is of the mean over seeds, without the first tenth of the steps. `validation` is None where a run has none.
    """
    gaps_ST = np.array([gap(a["metrics"], b["metrics"]) for a, b in zip(ours, base, strict=True)])
    n = gaps_ST.shape[1]
    late = _interval(gaps_ST[:, n - max(1, n // 4) :].mean(axis=1).tolist())
    shown = np.unique(np.linspace(0, n - 1, CURVE_POINTS).astype(int))
    curve = [paired_interval(gaps_ST[:, t].tolist()) for t in shown]
    scores = [[_validation(run) for run in arm] for arm in (ours, base)]
    pairs = [100 * (a - b) / b for a, b in zip(*scores, strict=True) if a is not None and b is not None]
    failed = any(diverged(run["metrics"][:n]) for run in [*ours, *base])
    return {
        **late,
        "largest": _finite(np.abs(gaps_ST.mean(axis=0)[n // 10 :]).max()),
        "validation": _interval(pairs) if len(pairs) == len(ours) else None,
        "verdict": "diverged" if failed or late["mean"] is None else verdict(late["mean"], late["half_width_95"]),
        "curve": {
            "step": [int(ours[0]["metrics"][t]["step"]) for t in shown],
            "mean": [_finite(point.mean) for point in curve],
            "half_width_95": [_finite(point.half_width) for point in curve],
        },
    }


def _last_quarter(records: Records) -> Records:
    return records[len(records) - max(1, len(records) // 4) :]


def _validation(run: Mapping[str, Any]) -> float | None:
    return run["validation"]["raw"]["loss"]["all"] if run["validation"] else None


def _interval(pairs: Sequence[float]) -> dict[str, Any]:
    mean, half_width, _ = paired_interval(pairs)
    return {"pairs": [_finite(p) for p in pairs], "mean": _finite(mean), "half_width_95": _finite(half_width)}


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


# --- layers ---


class Pass(NamedTuple):
    """A forward and backward pass of the main model, layer by layer. Positions are those of the batch, padding included."""

    loss: Float[Array, ""]  # nats a target
    activations: Float[Array, "L B T D"]  # the residual stream after each layer
    gradients: Float[Array, "L B T D"]  # of the loss with respect to it
    parameters: dict[str, Any]  # the gradients of the layers' parameters, stacked as they are
    routing: Routing | None  # of the MoE layers, stacked; None without one


@partial(jax.jit, static_argnames="config")
def observe(params: Mapping[str, Any], bias_LE: Float[Array, "L E"], batch: Batch, *, config: Config) -> Pass:
    """The pass in `config`'s formats. The stream's gradients are those of zeros that are added to it after each layer."""
    model, n_dense = config.model, config.model.n_dense_layers
    tokens_BT, segments_BT = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    context = make_context(segments_BT, model, cross_document=config.data.cross_document_attention)
    n_targets = predicts_within_document(batch["segment_ids"], 0).sum(dtype=jnp.int32).astype(jnp.float32)
    stacks = {name: params[name] for name in ("dense_layers", "moe_layers") if name in params}

    def loss(stacks: Mapping[str, Any], probes_LBTD: Array) -> tuple[Array, Any]:
        x_BTD, stream, routings = embed(params, tokens_BT, model), [], []
        for i in range(model.num_hidden_layers):
            stack, at = ("dense_layers", i) if i < n_dense else ("moe_layers", i - n_dense)
            weights = jax.tree.map(lambda leaf, at=at: leaf[at], stacks[stack])
            x_BTD, routing = block(weights, None if i < n_dense else bias_LE[at], x_BTD, context, model)
            x_BTD = x_BTD + probes_LBTD[i]
            stream.append(x_BTD)
            routings += [] if routing is None else [routing]
        normed_BTD = rms_norm(x_BTD, params["norm"], model.rms_norm_eps)
        total, _ = depth_losses(params, batch, [normed_BTD], config)[0]
        routing = jax.tree.map(lambda *layers: jnp.stack(layers), *routings) if routings else None
        return total / n_targets, (jnp.stack(stream), routing)

    shape = (model.num_hidden_layers, *tokens_BT.shape, model.hidden_size)
    probes_LBTD = jnp.zeros(shape, model.compute_dtype)
    (value, (stream, routing)), (d_stacks, d_probes) = jax.value_and_grad(loss, (0, 1), has_aux=True)(stacks, probes_LBTD)
    return Pass(value, stream, d_probes, d_stacks, routing)


def relative_error(ours: Sequence[Any], reference: Sequence[Any]) -> float:
    """Frobenius norm of the difference over that of `reference`, both several arrays taken as one, in float64."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(ours, reference, strict=True)]
    difference, norm = (math.sqrt(total) for total in np.sum([[np.sum((a - b) ** 2), np.sum(b**2)] for a, b in pairs], axis=0))
    return difference / norm if norm else math.inf if difference else 0.0


def layer_errors(ours: Pass, reference: Pass, valid_BT: Bool[np.ndarray, "B T"]) -> dict[str, list[float]]:
    """Relative error of every layer's activations, their gradients, and its parameters' gradients; without padding."""

    def of_stream(name: str) -> list[float]:
        pairs = zip(getattr(ours, name), getattr(reference, name), strict=True)
        return [relative_error([np.asarray(a)[valid_BT]], [np.asarray(b)[valid_BT]]) for a, b in pairs]

    def of_layer(grads: Pass, stack: str, at: int) -> list[Any]:
        return [leaf[at] for leaf in jax.tree.leaves(grads.parameters[stack])]

    places = [(stack, at) for stack in sorted(ours.parameters) for at in range(_depth(ours.parameters[stack]))]
    parameters = [relative_error(of_layer(ours, *place), of_layer(reference, *place)) for place in places]
    return {"activations": of_stream("activations"), "gradients": of_stream("gradients"), "parameters": parameters}


def _depth(stack: Any) -> int:
    return len(jax.tree.leaves(stack)[0])


# --- routing ---


class Flips(NamedTuple):
    """Of every token in every MoE layer: how many of the reference's experts were not chosen, and the reference's margin."""

    exchanged_LN: Int[np.ndarray, "L N"]
    margin_LN: Float[np.ndarray, "L N"]


def flips(ours: Routing, reference: Routing, valid_BT: Bool[np.ndarray, "B T"]) -> Flips:
    """The order of the chosen experts does not matter. Without padding."""
    a, b = (np.asarray(routing.indices)[:, valid_BT] for routing in (ours, reference))
    kept = (b[..., :, None] == a[..., None, :]).any(axis=-1)
    return Flips((~kept).sum(axis=-1), np.asarray(reference.margin)[:, valid_BT])


def summarise_flips(by_seed: Sequence[Flips]) -> dict[str, Any]:
    """JSON-able: the share of (token, layer) whose set of experts differs, in all, by layer, and by the reference's margin.

    The margin compares single experts, so a flip at a large one is that of a whole group. A bin without a token has rate None.
    """
    exchanged = np.concatenate([f.exchanged_LN for f in by_seed], axis=1)
    margin = np.concatenate([f.margin_LN for f in by_seed], axis=1)
    flipped, bins = exchanged > 0, np.digitize(margin, MARGINS)
    tokens = np.bincount(bins.ravel(), minlength=len(MARGINS) + 1)
    hits = np.bincount(bins.ravel(), weights=flipped.ravel(), minlength=len(MARGINS) + 1)
    return {
        "rate": float(flipped.mean()),
        "experts_exchanged": float(exchanged.mean()),
        "rate_by_layer": flipped.mean(axis=1).tolist(),
        "margin": {
            "edges": MARGINS.tolist(),
            "tokens": tokens.tolist(),
            "rate": [float(h / n) if n else None for h, n in zip(hits, tokens, strict=True)],
        },
    }
