"""Figure of a simulated pipeline schedule [Fig. 5 of the report]: a row a rank, a box an action, over time.

Readable without colour: boxes carry kind and micro-batch, overlapped pairs lie one above the other in a common frame, W is
hatched, and chunks of direction 1 stand on a black bar.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dsv3_jax.analysis.figures import new_figure
from dsv3_jax.parallel.schedules import Chunk
from dsv3_jax.parallel.simulate import Span, Timeline, label

NAMES = {"F": "forward", "B": "full backward", "I": "backward, input gradient only", "W": "weight gradient"}
# The later the kind in its micro-batch's life, the darker; one tint a direction.
FILLS = {"F": ("#e3eff8", "#fdefdc"), "B": ("#7fb6dc", "#efae62"), "I": ("#b3d3ea", "#f6cf9c"), "W": ("#ffffff", "#ffffff")}
HATCH, EDGE = "////", "#b0b0b0"
HEIGHT, BAR = 0.84, 0.07  # of a row's pitch
INCHES, CHARACTER = 0.3, 0.066  # of the shortest action, where the figure has room; of a character
WIDEST = 40


def draw(timeline: Timeline, unit: str = "units of the costs") -> Figure:
    """All ranks over time; right of each, the share of the makespan in which it idles."""
    spans = [(rank, span) for rank, row in enumerate(timeline.spans) for span in row]
    shortest = min(span.end - span.start for _, span in spans if span.end > span.start)
    width = min(WIDEST, max(7, INCHES * timeline.makespan / shortest))
    figure, (ax,) = new_figure(1, 1, width + 1.5, 1.6 + 0.45 * len(timeline.spans))
    for rank, span in spans:
        _draw_action(ax, rank, span, inches=width / timeline.makespan)
    for rank, idle in enumerate(timeline.idle):
        share = f"idle {idle / timeline.makespan:.1%}"
        ax.annotate(share, (1, rank), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)
    schedule, costs = timeline.schedule, timeline.costs
    ax.set(
        xlim=(0, timeline.makespan),
        ylim=(len(timeline.spans) - 0.5, -0.5),
        xlabel=f"time [{unit}: F = {costs.F:g}, B = {costs.B:g}, W = {costs.W:g}, F&B = {costs.FB:g}, hop = {costs.hop:g}]",
        title=f"{schedule.name}: {len(timeline.spans)} ranks, {schedule.stages} stages, {schedule.micro_batches} micro-batches",
    )
    ax.set_yticks(range(len(timeline.spans)), [f"rank {rank}" for rank in range(len(timeline.spans))])
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)

    chunks = [chunk for _, span in spans for chunk in span.action]
    handles: list[Patch | Line2D] = [
        Patch(facecolor=FILLS[kind][0], edgecolor=EDGE, hatch=HATCH if kind == "W" else None, label=f"{kind} {name}")
        for kind, name in NAMES.items()
        if any(chunk.kind == kind for chunk in chunks)
    ]
    if any(chunk.direction for chunk in chunks):
        handles.append(Line2D([], [], color="black", linewidth=3, label="on a bar: direction 1 (forwards towards rank 0)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _draw_action(ax: Axes, rank: int, span: Span, inches: float) -> None:
    start, length, height = span.start, span.end - span.start, HEIGHT / len(span.action)
    top = rank - HEIGHT / 2
    for i, chunk in enumerate(span.action):
        _draw_chunk(ax, chunk, start, top + i * height, length, height)
        text = label((chunk,))
        if CHARACTER * len(text) <= length * inches:
            ax.text(start + length / 2, top + (i + 0.47) * height, text, ha="center", va="center", fontsize=6.5)
    frame = 1.6 if len(span.action) > 1 else 0.5
    ax.add_patch(Rectangle((start, top), length, HEIGHT, fill=False, linewidth=frame))


def _draw_chunk(ax: Axes, chunk: Chunk, left: int | float, top: float, length: int | float, height: float) -> None:
    hatch = HATCH if chunk.kind == "W" else None
    fill = FILLS[chunk.kind][chunk.direction]
    ax.add_patch(Rectangle((left, top), length, height, facecolor=fill, hatch=hatch, edgecolor=EDGE, linewidth=0.4))
    if chunk.direction:
        ax.add_patch(Rectangle((left, top + height - BAR), length, BAR, facecolor="black", linewidth=0))
