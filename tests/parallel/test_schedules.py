"""Pipeline schedules: their lists, their simulation against independent checks and published bubbles, their figure."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from dsv3_jax.analysis import figures, schedule_figure
from dsv3_jax.parallel.schedules import (
    SCHEDULES,
    Chunk,
    Costs,
    Schedule,
    dualpipe,
    dualpipe_steps,
    dualpipev,
    one_f_one_b,
    zb1p,
)
from dsv3_jax.parallel.simulate import Span, Timeline, compare, label, simulate


@st.composite
def sizes(draw):
    """Name, ranks, micro-batches. Tests build them: in a strategy, hypothesis objects to beartype's random look into tuples."""
    name, half, extra = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    least = {"dualpipe": (2 * half, 4 * half + extra % 2), "dualpipev": (half, 2 * half)}
    ranks, micro_batches = least.get(name, (half, 1))
    return name, ranks, micro_batches + extra


def build(size) -> Schedule:
    name, ranks, micro_batches = size
    return SCHEDULES[name].build(ranks, micro_batches)


@st.composite
def all_costs(draw, longest_hop):
    F, B_input, W = (draw(st.integers(1, 9)) for _ in range(3))
    B = B_input + W
    return Costs(F, B, W, draw(st.integers(max(F, B), F + B)), draw(st.integers(0, longest_hop)))


def lists(schedule):
    return [" ".join(label(action) for action in actions) for actions in schedule.actions]


def check_times(timeline: Timeline, micro_batches: int, stages: int, costs: Costs) -> None:
    """From starts and ends alone: each chunk once, each rank one thing at a time, nothing before its inputs, nothing late."""
    begin: dict[tuple[str, int, int], tuple[int | float, int | float, int]] = {}
    for rank, spans in enumerate(timeline.spans):
        for action, start, end in spans:
            kinds = "".join(chunk.kind for chunk in action)
            assert end - start == {"F": costs.F, "B": costs.B, "I": costs.B - costs.W, "W": costs.W, "FB": costs.FB}[kinds]
            for kind, m, s, _ in action:
                for part in {"B": "IW"}.get(kind, kind):
                    assert (part, m, s) not in begin, "computed twice"
                    begin[part, m, s] = start, end, rank
    assert set(begin) == {(part, m, s) for part in "FIW" for m in range(micro_batches) for s in range(stages)}
    for rank, spans in enumerate(timeline.spans):
        free = 0
        for action, start, end in spans:
            earliest = free
            for kind, m, s, _ in action:
                before = {"F": [("F", m, s - 1)], "W": [("I", m, s)]}.get(kind, [("F", m, s), ("I", m, s + 1)])
                for _, ready, source in (begin[key] for key in before if key in begin):
                    earliest = max(earliest, ready + (costs.hop if source != rank else 0))
            assert start == earliest, f"rank {rank}: {action} starts at {start}, its inputs are there at {earliest}"
            free = end


# Lists --------------------------------------------------------------------------------------------------------------------


def test_small_schedules_equal_those_written_by_hand():
    assert lists(one_f_one_b(2, 3)) == ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]
    assert lists(zb1p(2, 3)) == ["F0 F1 I0 W0 F2 I1 W1 I2 W2", "F0 I0 F1 I1 W0 F2 I2 W1 W2"]
    assert lists(dualpipe(2, 4)) == ["F0 F2 F1 B2 F3&B0 B3 I1 W1", "F2 F0 F3 B0 F1&B2 B1 I3 W3"]
    assert lists(dualpipev(1, 2)) == ["F0 F0 F1 B0 F1&B0 B1 I1 W1"]


def test_steps_of_dualpipe_for_8_ranks_and_20_micro_batches():
    assert [dualpipe_steps(4, depth, 10) for depth in range(4)] == [
        (6, 1, 3, 3, 3, 1, 3, 1),
        (4, 2, 2, 4, 2, 2, 2, 2),
        (2, 3, 1, 5, 1, 3, 1, 3),
        (0, 4, 0, 6, 0, 4, 0, 4),
    ]


def test_all_pairs_of_dualpipe_overlap_but_the_first_on_the_two_middle_ranks():
    pairs = [sum(len(action) == 2 for action in actions) for actions in dualpipe(8, 20).actions]
    assert pairs == [2 * 3 + 3, 2 * 4 + 2, 2 * 5 + 1, 2 * 6 - 1, 2 * 6 - 1, 2 * 5 + 1, 2 * 4 + 2, 2 * 3 + 3]
    middle = lists(dualpipe(8, 20))[3].split()
    assert middle[8:11] == ["F4", "B10", "F14&B0"]


def test_weight_gradients_are_made_up_for_in_the_order_in_which_they_were_put_off():
    for schedule in (zb1p(5, 9), dualpipe(8, 20), dualpipev(4, 11)):
        for actions in schedule.actions:
            put_off, made = ([chunk[1:] for action in actions for chunk in action if chunk.kind == kind] for kind in "IW")
            assert put_off == made


def test_dualpipev_is_the_first_half_of_the_ranks_of_dualpipe():
    def shape(actions):
        return [[(chunk.kind, chunk.stage, chunk.direction, chunk.micro_batch % 9) for chunk in action] for action in actions]

    assert [shape(a) for a in dualpipev(4, 9).actions] == [shape(a) for a in dualpipe(8, 18).actions[:4]]


def test_both_directions_of_dualpipe_mirror_each_other():
    def mirrored(chunk):
        return chunk._replace(direction=1 - chunk.direction, micro_batch=(chunk.micro_batch + 10) % 20)

    schedule = dualpipe(8, 20)
    for actions, opposite in zip(schedule.actions, schedule.actions[::-1], strict=True):
        assert [tuple(mirrored(chunk) for chunk in action) for action in actions] == list(opposite)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_hold_as_many_stages_as_published_on_as_many_devices(name):
    method = SCHEDULES[name]
    schedule = method.build(method.devices(8), 16)
    assert schedule.stages == 8
    assert len(schedule.actions) == {"dualpipev": 4}.get(name, 8)
    held = [{chunk.stage for action in actions for chunk in action} for actions in schedule.actions]
    assert {len(stages) for stages in held} == {method.parameters}
    assert set().union(*held) == set(range(8))


@pytest.mark.parametrize(
    ("build", "ranks", "micro_batches", "message"),
    [
        (one_f_one_b, 0, 4, "at least 1, got 0 and 4"),
        (zb1p, 4, 0, "at least 1, got 4 and 0"),
        (dualpipe, 7, 20, "even number of ranks, at least 2, got 7; add one"),
        (dualpipe, 0, 20, "even number of ranks, at least 2, got 0"),
        (dualpipe, 8, 21, "even number of micro-batches, at least 2 x 8 ranks, got 21; split the batch into 22"),
        (dualpipe, 8, 14, "got 14; split the batch into 16"),
        (dualpipev, 0, 4, "at least one rank and two micro-batches a rank, got 0 and 4"),
        (dualpipev, 4, 7, "got 4 and 7; split the batch into 8"),
    ],
)
def test_illegal_sizes_are_refused_in_one_line(build, ranks, micro_batches, message):
    with pytest.raises(ValueError, match=message) as error:
        build(ranks, micro_batches)
    assert "\n" not in str(error.value)


def test_steps_are_refused_where_dualpipe_has_none():
    for half, depth, micro_batches in ((4, 4, 10), (4, -1, 10), (4, 0, 7)):
        with pytest.raises(ValueError, match="expected 0 <= depth < half"):
            dualpipe_steps(half, depth, micro_batches)


# Simulation ---------------------------------------------------------------------------------------------------------------


@given(sizes(), all_costs(longest_hop=3))
def test_everything_runs_once_in_order_and_as_soon_as_its_inputs_are_there(size, costs):
    schedule = build(size)
    timeline = simulate(schedule, costs)
    check_times(timeline, schedule.micro_batches, schedule.stages, costs)
    assert timeline.makespan == max(span.end for spans in timeline.spans for span in spans)
    for spans, idle in zip(timeline.spans, timeline.idle, strict=True):
        gaps = [b.start - a.end for a, b in zip(spans, spans[1:], strict=False)]
        assert idle == spans[0].start + sum(gaps) + timeline.makespan - spans[-1].end


@given(sizes(), all_costs(longest_hop=3))
def test_peak_is_the_most_micro_batches_between_their_forward_and_their_weight_gradient(size, costs):
    schedule = build(size)
    timeline = simulate(schedule, costs)
    for spans, peak in zip(timeline.spans, timeline.peak, strict=True):
        lives: dict[tuple[int, int], list[int | float]] = {}
        for action, start, end in spans:
            for kind, m, s, _ in action:
                if kind == "F":
                    lives[m, s] = [start]
                elif kind != "I":
                    lives[m, s].append(end)
        # The kept ones only grow in number where an action starts.
        assert peak == max(sum(born <= span.start < dies for born, dies in lives.values()) for span in spans)


@pytest.mark.parametrize("delay", [-1, 1])
def test_the_check_of_times_notices_one_action_that_is_moved(delay):
    timeline = simulate(dualpipe(4, 8))
    spans = [list(row) for row in timeline.spans]
    action, start, end = spans[2][9]
    spans[2][9] = Span(action, start + delay, end + delay)
    with pytest.raises(AssertionError, match="its inputs are there at"):
        check_times(timeline._replace(spans=tuple(map(tuple, spans))), 8, 4, Costs())


def test_hops_count_between_ranks_only():
    # Down the V and back on two ranks: between stages 1 and 2 nothing travels.
    (first, _), costs = simulate(dualpipev(2, 4), Costs(hop=10)).spans, Costs(hop=10)
    arrival = next(span.start for span in first if span.action[0][:3] == ("F", 0, 3))
    assert arrival == 3 * costs.F + 2 * costs.hop


def with_list(schedule: Schedule, rank: int, actions) -> Schedule:
    return schedule._replace(actions=schedule.actions[:rank] + (tuple(actions),) + schedule.actions[rank + 1 :])


@given(sizes(), st.data())
def test_a_backward_before_its_own_forward_is_a_deadlock(size, data):
    schedule = build(size)
    rank = data.draw(st.integers(0, len(schedule.actions) - 1))
    actions = list(schedule.actions[rank])
    place = {chunk[:3]: i for i, action in enumerate(actions) for chunk in action}
    key = data.draw(st.sampled_from(sorted(key for key in place if key[0] == "F")))
    there = next(place[kind, *key[1:]] for kind in "BI" if (kind, *key[1:]) in place)
    here = place[key]
    actions[here], actions[there] = actions[there], actions[here]
    with pytest.raises(ValueError, match=r"deadlock, rank \d+ expected \w\d+ of stage \d+ before .* change the order"):
        simulate(with_list(schedule, rank, actions))


def test_a_deadlock_names_rank_action_and_what_it_waits_for():
    schedule = one_f_one_b(2, 2)
    actions = schedule.actions[1]
    broken = with_list(schedule, 1, (actions[1], actions[0], *actions[2:]))
    with pytest.raises(ValueError, match="rank 0 expected I0 of stage 1 before B0") as error:
        simulate(broken)
    assert "\n" not in str(error.value)


def test_a_weight_gradient_before_its_input_gradient_is_a_deadlock():
    schedule = zb1p(2, 3)
    first, second, ahead, weight, *rest = schedule.actions[0]
    with pytest.raises(ValueError, match="rank 0 expected I0 of stage 0 before W0"):
        simulate(with_list(schedule, 0, (first, second, weight, ahead, *rest)))


def test_missing_and_repeated_chunks_are_refused():
    schedule = zb1p(3, 4)
    actions = schedule.actions[1]
    with pytest.raises(ValueError, match="expected W3 on stage 1 1 times, got it 0 times"):
        simulate(with_list(schedule, 1, actions[:-1]))
    with pytest.raises(ValueError, match="expected F0 on stage 1 1 times, got it 2 times"):
        simulate(with_list(schedule, 1, (actions[0], *actions)))
    with pytest.raises(ValueError, match="expected F4 on stage 1 0 times, got it 1 times"):
        simulate(with_list(schedule, 1, ((Chunk("F", 4, 1),), *actions)))


def test_impossible_costs_are_refused():
    for costs in (Costs(F=-1), Costs(B=2, W=3)):
        with pytest.raises(ValueError, match="W within B"):
            simulate(one_f_one_b(2, 2), costs)


# Published figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "micro_batches", "FB", "bubbles"),
    [
        (4, 16, 3, (9, 3, 2, 2)),
        (8, 20, 3, (21, 7, 6, 6)),
        (16, 64, 3, (45, 15, 14, 14)),
        (16, 64, 2.5, (45, 15, 10.5, 10.5)),
    ],
)
def test_simulated_idle_time_and_memory_equal_the_published_ones_where_F_I_and_W_are_equal(stages, micro_batches, FB, bubbles):
    rows = compare(stages, micro_batches, Costs(F=1, B=2, W=1, FB=FB))
    assert [row.name for row in rows] == ["1f1b", "zb1p", "dualpipe", "dualpipev"]
    assert tuple(row.published_idle for row in rows) == bubbles
    assert tuple(row.idle for row in rows) == bubbles
    assert [row.difference for row in rows] == [0, 0, 0, 0]
    assert [row.peak for row in rows] == [row.published_peak for row in rows] == [stages, stages, stages + 1, stages + 1]
    assert [row.ranks for row in rows] == [stages, stages, stages, stages // 2]


@pytest.mark.parametrize(
    ("costs", "micro_batches", "published", "simulated"),
    [
        # The input gradient takes longer than F; shorter than F; and less time than W.
        (Costs(F=2, B=4, W=1, FB=5), 20, (42, 28, 18, 18), (42, 28, 16, 16)),
        (Costs(F=3, B=4, W=2, FB=6), 20, (49, 21, 12, 12), (49, 21, 15, 15)),
        (Costs(F=1, B=3, W=2, FB=4), 20, (28, 0, 3, 3), (28, 7, 6, 6)),
        # Hops take time, of which the formulas know nothing. Ranks then wait for every round trip, so it grows with the batch.
        (Costs(hop=1), 20, (21, 7, 6, 6), (67, 44, 34, 45)),
        (Costs(hop=1), 40, (21, 7, 6, 6), (103, 62, 52, 75)),
    ],
)
def test_where_the_simulation_differs_from_the_published_formula_at_8_stages(costs, micro_batches, published, simulated):
    rows = compare(8, micro_batches, costs)
    assert tuple(row.published_idle for row in rows) == published
    assert tuple(row.idle for row in rows) == simulated
    assert [row.difference for row in rows] == [a - b for a, b in zip(simulated, published, strict=True)]


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(0, 6), all_costs(longest_hop=0))
def test_simulation_and_formula_differ_by_the_stated_terms_and_not_with_the_number_of_micro_batches(half, extra, costs):
    F, B_input, W, h = costs.F, costs.B - costs.W, costs.W, half - 1
    dual = h * (max(0, F - B_input) + max(0, W - B_input)) - min(h * max(0, B_input - F), F)
    rows = compare(2 * half, 4 * half + 2 * extra, costs)
    assert [row.difference for row in rows] == [0, (2 * half - 1) * max(0, W - min(F, B_input)), dual, dual]
    assert [row.peak for row in rows] == [row.published_peak for row in rows]


def test_zb1p_needs_a_micro_batch_per_rank_to_fill_its_drain():
    idle = [max(simulate(zb1p(8, micro_batches)).idle) for micro_batches in range(1, 11)]
    assert idle == [14, 13, 12, 11, 10, 9, 8, 7, 7, 7]  # published: 7


def test_1f1b_idles_as_published_with_any_number_of_micro_batches():
    assert {max(simulate(one_f_one_b(8, micro_batches)).idle) for micro_batches in range(1, 20)} == {21}


# Figure -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_drawn_as_png(name, tmp_path):
    method = SCHEDULES[name]
    figures.save(schedule_figure.draw(simulate(method.build(method.devices(4), 8))), tmp_path / "schedule.png")
    content = (tmp_path / "schedule.png").read_bytes()
    assert content[:4] == b"\x89PNG"
    assert len(content) > 10_000


def test_boxes_name_their_chunks_and_those_of_direction_1_stand_on_a_bar_so_that_no_colour_is_needed():
    timeline = simulate(dualpipe(4, 8))
    (ax,) = schedule_figure.draw(timeline, "ms").axes
    chunks = [chunk for actions in timeline.schedule.actions for action in actions for chunk in action]
    texts = Counter(text.get_text() for text in ax.texts)
    assert texts == Counter(label((chunk,)) for chunk in chunks) + Counter({"idle 7.7%": 4})
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    bars = Counter((box.get_x(), round(box.get_y())) for box in boxes if box.get_facecolor() == (0, 0, 0, 1))
    placed = [(start, rank, chunk) for rank, row in enumerate(timeline.spans) for action, start, _ in row for chunk in action]
    assert bars == Counter((start, rank) for start, rank, chunk in placed if chunk.direction)
    assert sum(box.get_hatch() is not None for box in boxes) == sum(chunk.kind == "W" for chunk in chunks) > 0
    assert ax.get_xlabel() == "time [ms: F = 1, B = 2, W = 1, F&B = 3, hop = 0]"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["rank 0", "rank 1", "rank 2", "rank 3"]


def test_numbers_are_left_out_where_boxes_are_too_narrow():
    schedule = one_f_one_b(2, 2)
    (ax,) = schedule_figure.draw(simulate(schedule, Costs(F=1, B=1000, W=500))).axes
    assert {text.get_text() for text in ax.texts} == {"B0", "B1", "idle 33.3%"}
