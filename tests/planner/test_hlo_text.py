from typing import Any

import pytest
from planner.hlo_texts import hlo_module

from dsv3_jax.planner.hlo import cost_of


def _collective(line: str, **options: str) -> Any:
    entry = "  %p = f32[2,3]{1,0} parameter(0)\n  %q = s4[3,5]{1,0:T(8,128)E(4)} parameter(1)\n"
    (found,) = cost_of(hlo_module(f"{entry}  ROOT %c = {line}", **options)).collectives
    return found


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("{{0,1,2},{3}}", [[0, 1, 2], [3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['x'=8] {'x'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=2,'y'=2,'z'=2] {'z','x'}", [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['x'=2,'y'=4], device_ids=(7,6,5,4,3,2,1,0) {'x'}", [[7, 3], [6, 2], [5, 1], [4, 0]]),
        ("mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['x'=8] {}", [[0], [1], [2], [3], [4], [5], [6], [7]]),
    ],
)
def test_groups_are_expanded_from_every_notation(text: str, groups: list[list[int]]) -> None:
    found = _collective(f"f32[2,3]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={text}, use_global_device_ids=true")
    assert found.groups == tuple(map(tuple, groups))


def test_groups_that_the_text_omits_are_all_devices() -> None:
    header = "HloModule hand, replica_count=2, num_partitions=3"
    assert _collective("f32[2,3]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add", header=header).groups == (
        (0, 1, 2, 3, 4, 5),
    )


def test_groups_of_a_permute_are_its_pairs() -> None:
    line = "f32[2,3]{1,0} collective-permute(%p), channel_id=1, source_target_pairs={{0,4},{4,0},{1,5}}"
    assert _collective(line).groups == ((0, 4), (4, 0), (1, 5))


@pytest.mark.parametrize(
    ("line", "operand", "result"),
    [
        # 15 elements of 4 bits take 8 bytes.
        ("(s4[3,5]{1,0}, s4[12,5]{1,0}, u32[]{:S(2)}) all-gather-start(%q), dimensions={0}", 8, 30),
        (
            "((f32[2,3]{1,0}, s4[3,5]{1,0}), (f32[4,3]{1,0}, s4[6,5]{1,0})) all-gather-start(%p, /*index=1*/%q)",
            32,
            63,
        ),
        ("(f32[2,3]{1,0:T(8,128)}, s4[3,5]{1,0:T(8,128)(4,1)}) all-reduce-start(%p, %q), to_apply=%add", 32, 32),
        ("(f32[2,3]{1,0}, s4[3,5]{1,0}) all-to-all(%p, %q)", 32, 32),
        ("(f32[2,3]{1,0}, f32[2,3]{1,0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}", 24, 24),
        ("((f32[2,3]{1,0}, s4[3,5]{1,0}), s4[3,5]{1,0}) ragged-all-to-all-start(%p, %q)", 24, 8),
        ("(f8e4m3fn[7]{0}, pred[5]{0}, c64[2]{0}) collective-broadcast(%q)", 8, 28),
    ],
)
def test_bytes_of_all_forms_of_collectives(line: str, operand: int, result: int) -> None:
    found = _collective(line)
    assert (found.operand_bytes, found.result_bytes) == (operand, result)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the text of a module.*as_text"):
        cost_of("module @jit_f {\n}")
