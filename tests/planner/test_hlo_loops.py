import gzip
import re

import pytest
from planner.hlo_programs import DATA
from planner.hlo_texts import BY_TWO, DOWN, UP, hlo_loop

from dsv3_jax.planner.hlo import cost_of


@pytest.mark.parametrize(
    ("trips", "arguments"),
    [
        (5, ("0", UP, "(%i_c, %five), direction=LT")),
        (6, ("0", UP, "(%i_c, %five), direction=LE")),
        (3, ("2", UP, "(%i_c, %five), direction=LT")),
        (3, ("0", BY_TWO, "(%i_c, %five), direction=LT")),
        (4, ("0", UP, "(%ahead, %five), direction=LT")),
        (5, ("0", UP, "(%five, %i_c), direction=GT")),
        (9, ("0", UP, "(%i_c, %limit), direction=LT")),
        (4, ("9", DOWN, "(%i_c, %five), direction=GT")),
        (5, ("9", DOWN, "(%i_c, %five), direction=GE")),
        (0, ("7", UP, "(%i_c, %five), direction=LT")),
        (8, ("0", UP, "(%i_c, %five), direction=NE", "%limit_b", ', backend_config={"known_trip_count":{"n":"8"}}')),
        (None, ("0", UP, "(%i_c, %five), direction=NE")),
        (None, ("0", DOWN, "(%i_c, %five), direction=LT")),
        (None, ("0", "multiply(%i, %two)", "(%i_c, %five), direction=LT")),
        (None, ("0", UP, "(%i_c, %limit), direction=LT", "%next")),
        (None, ("0", "add(%limit_b, %one)", "(%i_c, %five), direction=LT")),
        (None, ("0", UP, "(%five, %five), direction=LT")),
    ],
)
def test_trip_counts_follow_from_the_condition(trips: int | None, arguments: tuple[str, ...]) -> None:
    (product,) = cost_of(hlo_loop(*arguments)).products
    assert (product.flops, product.times, product.dynamic) == (2 * 2 * 3 * 3, 1 if trips is None else trips, trips is None)


@pytest.mark.parametrize("name", ["h100_summed", "h100_nested", "h100_ragged"])
def test_what_the_text_states_of_loops_can_be_worked_out_too(name: str) -> None:
    text = gzip.open(DATA / f"{name}.txt.gz", "rt").read()
    unstated = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert unstated != text and cost_of(unstated) == cost_of(text)


def test_a_condition_is_checked_once_more_than_the_body_runs() -> None:
    reduced = "  %r = s32[] all-reduce(%i_c), replica_groups={}, to_apply=%add\n  ROOT %test"
    text = hlo_loop("0", UP, "(%i_c, %five), direction=LT").replace("  ROOT %test", reduced)
    (collective,) = cost_of(text).collectives
    assert collective.times == 6
