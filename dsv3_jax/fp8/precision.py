"""In which format every operation of the model runs, forward and backward [§3.3.1-3.3.3]: one table, which the model follows.

FP32, BF16 and FP8 runs differ in this table alone. `table(config)` is for reading, `python -m experiments.precision` prints it;
`products(config, operation)` is what the code asks for.
"""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from dsv3_jax.config import Config, Fp8Recipe, ModelConfig
from dsv3_jax.fp8.accumulate import Accumulation
from dsv3_jax.fp8.formats import FORMATS
from dsv3_jax.fp8.linear import Products
from dsv3_jax.fp8.quantize import RELEASED_FLOOR, WHOLE, Quantiser
from dsv3_jax.kernels.modes import chosen

# What released code does with activations when it serves its FP8 weights; nothing is kept, as nothing is differentiated.
SERVING = Fp8Recipe(amax_floor=RELEASED_FLOOR, power_of_two="nowhere", attention_cache="compute", swiglu_cache="compute")

ATTENTION = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")  # of dense layers and of shared experts
EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")
LINEAR = ATTENTION + MLP + EXPERTS  # what the report runs in FP8


def products(config: ModelConfig, operation: str) -> Products | None:
    """How a linear operation runs in FP8; None: in the compute dtype (the router: in float32)."""
    recipe = config.fp8
    if recipe is None or not (operation in LINEAR or (operation == "gate" and recipe.router)):
        return None
    return _products(recipe, operation, chosen(config.fp8_implementation, "xla", possible=recipe.fits_kernels))


def is_linear(path: Sequence[Any], config: ModelConfig) -> bool:
    """Whether the parameter at a tree's path is the weight of an operation that runs in FP8."""
    names = [str(getattr(key, "key", key)) for key in path]
    return products(config, ".".join(names[-2:] if "experts" in names else names[-1:])) is not None


@cache
def _products(recipe: Fp8Recipe, operation: str, implementation: str = "xla") -> Products:
    # Powers of two: what is rounded once more in other tiles, which then adds no error (after attention), and what is sent.
    sent = operation in ("experts.gate_proj", "experts.up_proj")
    x = _quantiser(recipe, recipe.activation_format, (1, recipe.tile), sent or operation == "o_proj")
    weight = _quantiser(recipe, recipe.weight_format, (recipe.tile, recipe.tile), False)
    side = recipe.tile if recipe.gradient_scaling == "block" else 1
    gradient = _quantiser(recipe, recipe.gradient_format, (side, recipe.tile), operation == "experts.down_proj")
    accumulation = Accumulation(recipe.accumulation, recipe.accumulator, recipe.promotion_interval)
    return Products(x, weight, gradient, x.transposed, gradient.transposed, accumulation, implementation)


def _quantiser(recipe: Fp8Recipe, form: str, tile: tuple[int, int], in_report: bool) -> Quantiser:
    power_of_two = {"report": in_report, "everywhere": True, "nowhere": False}[recipe.power_of_two]
    return Quantiser(FORMATS[form], tile if recipe.scaling == "fine" else (WHOLE, WHOLE), power_of_two, recipe.amax_floor)


def attention_cache(config: ModelConfig) -> Quantiser | None:
    """How the attention's output is kept, for its own backward pass and for o_proj's; None: as it is."""
    return _cache(config.fp8, config.fp8.attention_cache, True) if config.fp8 else None


def swiglu_cache(config: ModelConfig) -> Quantiser | None:
    """How SwiGLU's inputs are kept, from which its output is computed again; None: as they are."""
    return _cache(config.fp8, config.fp8.swiglu_cache, False) if config.fp8 else None


def _cache(recipe: Fp8Recipe, form: str, in_report: bool) -> Quantiser | None:
    if form == "compute":
        return None
    fine = (1, recipe.tile)  # whatever the products do: an amax of the whole would have to be of all devices
    power_of_two = {"report": in_report, "everywhere": True, "nowhere": False}[recipe.power_of_two]
    return Quantiser(FORMATS[form], fine, power_of_two, recipe.amax_floor)


class Wire(NamedTuple):
    """How rows travel to experts on other devices, and the gradients of their outputs; None: in the compute dtype."""

    x: Quantiser | None = None
    gradient: Quantiser | None = None


AS_IT_IS = Wire()


def wire(config: ModelConfig) -> Wire:
    """What the experts' products would round to anyway, rounded before it is sent; what they return travels as it is.

    Scales must be a row's own and powers of two: then to round once more, on arrival, changes nothing.
    """
    recipe = config.fp8
    if recipe is None or recipe.dispatch == "compute":
        return AS_IT_IS
    ends = _products(recipe, "experts.gate_proj").x, _products(recipe, "experts.down_proj").gradient
    return Wire(*(how if how.power_of_two and how.tile[0] == 1 else None for how in ends))


class Row(NamedTuple):
    """One line of the table: the operands of Fprop, the gradient that comes into Dgrad, both operands of Wgrad."""

    operation: str
    fprop: str
    dgrad: str
    wgrad: str
    kept: str  # between forward and backward pass; -: recomputed


LEGEND = "1x128: values that share a scale, e4m3 unless named; 2^n: powers of two; -: recomputed"


def table(config: Config) -> list[Row]:
    """Every operation of a training step."""
    model = config.model
    compute, params = model.compute_dtype, model.param_dtype
    attention_kept, swiglu_kept = (
        "-" if model.remat == "full" else _text(cache) or compute for cache in (attention_cache(model), swiglu_cache(model))
    )
    sent, sent_back = (_text(how) or compute for how in wire(model))

    def recomputed(what: str) -> str:
        return what if model.remat == "none" else "-"

    def linear(name: str, kept: str | None = None) -> Row:
        how = products(model, name)
        if how is None:
            high = "float32" if name == "gate" else compute
            return Row(name, high, high, high, kept or recomputed(high))
        wgrad = f"{_text(how.x_wgrad)} . {_text(how.gradient_wgrad)}"
        return Row(name, f"{_text(how.x)} . {_text(how.weight)}", _text(how.gradient), wgrad, kept or recomputed(_text(how.x)))

    rows = [
        Row("embed_tokens", compute, compute, compute, "tokens"),
        Row("norms", "float32", "float32", "float32", recomputed(compute)),
    ]
    rows += map(linear, _projections(model))
    rows += [
        Row("attention core", f"{compute}, softmax f32", compute, "", recomputed(compute)),
        linear("o_proj", attention_kept),
    ]
    if model.n_dense_layers or model.n_shared_experts:
        rows += [linear("gate_proj"), linear("up_proj"), linear("down_proj", "-" if swiglu_cache(model) else None)]
    if model.n_moe_layers:
        rows += [
            linear("gate", "float32"),
            Row("dispatch", sent, f"dy: {sent_back}", "", ""),
            *(linear(name, "-" if name == "experts.down_proj" else None) for name in EXPERTS),
            Row("combine", compute, f"dx: {compute}", "", ""),
        ]
    swiglu = "float32" if swiglu_cache(model) else compute
    rows.append(Row("SwiGLU", swiglu, swiglu, "", swiglu_kept))
    if model.num_nextn_predict_layers:
        rows.append(linear("eh_proj"))
    sums = ["float32" if model.fp8 else compute, params, *(["float32"] if config.train.n_micro_batches > 1 else [])]
    return rows + [
        Row("lm_head, loss", f"{compute}, softmax f32", compute, compute, compute),
        Row("sums of products", accumulation(model), "as Fprop", "as Fprop", ""),
        Row("weight gradients", "", "", ", ".join(dtype for dtype, _ in groupby(sums)), ""),
        Row("AdamW", "float32, masters too", "", "", config.train.moment_dtype),
        Row("router bias, counts", "float32, int32", "", "", "float32"),
    ]


def _text(how: Quantiser | None) -> str:
    return "" if how is None else str(how).removeprefix("e4m3 ")


def _projections(model: ModelConfig) -> tuple[str, ...]:
    if model.attention != "mla":
        return "q_proj", "k_proj", "v_proj"
    query = ("q_proj",) if model.q_lora_rank is None else ("q_a_proj", "q_b_proj")
    return *query, "kv_a_proj_with_mqa", "kv_b_proj"


def accumulation(config: ModelConfig) -> str:
    """How the products of linear operations are added up."""
    return str(_products(config.fp8, "q_a_proj").accumulation) if config.fp8 else "float32"
