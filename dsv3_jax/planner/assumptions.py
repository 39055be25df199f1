"""What a plan takes for granted, in numbered sentences below its tables; those that do not concern a run are left out."""

from dsv3_jax.parallel.mesh import EXPERT, LAYOUTS, PIPE
from dsv3_jax.planner import pipelines
from dsv3_jax.planner.chips import NUMBERS, Chip
from dsv3_jax.planner.question import Question
from dsv3_jax.planner.rows import Section
from dsv3_jax.planner.share import FLOAT32, Share

REMAT = {
    "none": "operations keep what they ask for, as JAX lists it",
    "report": "latents, attention's output, residual stream, SwiGLU inputs and router logits are kept, the rest is repeated",
    "full": "a layer keeps its input and the router's logits, all else is repeated",
}


def assumptions(share: Share, chip: Chip, asked: Question, pipeline: Section | None) -> tuple[str, ...]:
    lines = *_chip(chip), *_step(share), *_links(share, chip), *_rates(share, asked, pipeline)
    return tuple(line for line in lines if line)


def _chip(chip: Chip) -> list[str]:
    by_source: dict[str, list[str]] = {}
    for name in NUMBERS:
        by_source.setdefault(chip.sources[name], []).append(name)
    return [f"{chip.name}: {', '.join(names)}: {source}." for source, names in by_source.items()]


def _step(share: Share) -> list[str]:
    config, sizes = share.config, share.sizes
    layout = LAYOUTS[config.parallel.layout]
    return [
        f"Layout {config.parallel.layout}: {layout.description}; moments and masters in pieces over all data axes.",
        "Pipe ranks take further shares of the batch and hold every layer: no pipeline's bubble, no stage's saving."
        if sizes[PIPE] > 1
        else "",
        "Matrices are gathered in the compute dtype for the forward pass"
        + (" and again for the backward pass" if config.model.remat != "none" else "")
        + " of each micro-batch, their gradients reduced as often; gains lie whole."
        if layout.shard_parameters
        else "Gradients are reduced, and new weights gathered, once a step.",
        f"Rematerialisation {config.model.remat}: {REMAT[config.model.remat]}. Attention's backward pass repeats its scores.",
        "Routers are in perfect balance: one round of the exchange, every rank sends every rank the same; rows are not merged "
        f"by node; a round has room for {config.parallel.exchange_buffer:g} times a rank's share."
        if sizes[EXPERT] > 1
        else "",
        f"Experts' pre-activations are {'float32, as ragged_dot leaves them' if share.experts_bytes == FLOAT32 else 'narrow'}.",
        "Memory is what the program asks for: one layer's weights at a time, nothing for the compiler's copies, fragmentation "
        "or the runtime. The average of the weights is on the host.",
        "FLOPs are those of matrix products; norms, softmax, rotation, selection and the optimiser's arithmetic count none.",
        "Memory traffic: each product reads its operands and writes its result once, elementwise work rides along; attention's "
        "scores travel as in the unfused implementation, but where a kernel keeps them; the optimiser reads and writes each of "
        "its pieces once.",
    ]


def _links(share: Share, chip: Chip) -> list[str]:
    if share.devices == 1:
        return []
    if share.tensor > 1:
        return ["Over tensor ranks, the gradients of one input are added up before they are reduced.", *_fabric(share, chip)]
    return _fabric(share, chip)


def _fabric(share: Share, chip: Chip) -> list[str]:
    if chip.torus_dims:
        return [
            "All devices are in one pod, a torus; gathers and reductions use all its links; the exchange takes the shortest "
            "ways in a torus of its own."
        ]
    return [
        f"Nodes of {share.config.parallel.node_size}; gathers and reductions go axis by axis, and what one needs from other "
        "nodes enters a node once; every link at its full rate, no contention."
    ]


def _rates(share: Share, asked: Question, pipeline: Section | None) -> list[str]:
    return [
        "FP8 peak for attention's projections, MLPs and experts; BF16 for scores, head, routers and MTP's projection; bytes "
        "kept and moved are those of the compute dtype all the same."
        if asked.compute == "fp8"
        else "",
        "Float32 products are timed at the BF16 peak, which no chip here reaches with them."
        if share.config.model.compute_dtype == "float32"
        else "",
        "MFU counts the main model's causal FLOPs over the BF16 peak, as the ISCA'25 paper does." if asked.mfu else "",
        *(pipelines.assumptions(pipeline, asked.costs) if pipeline else []),
        "Hours leave out restarts, evaluation and checkpoints, and take every step at the full batch.",
        "The price is an input, the report's for an H800 unless it is given.",
        "Serving: BF16 latents, replicated over tensor ranks; decoding is bound by FP8 dispatch and BF16 combine of every "
        "layer over the slowest link, shared experts served as one more routed one, two micro-batches in turn.",
    ]
