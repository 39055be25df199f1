"""Bundles of a compiled kernel, from text as libtpu writes it."""

import pytest

from dsv3_jax.planner import bundles

UTILISATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""
# A kernel of 12 bundles: the grid's loop has 9 of them, a loop inside 4 (the branch back is printed as outside of it, and so is
# what is empty) and another one 2.
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = sld [smem:[#allocation0]] /* core id */ } /* entry bundle: %kernel.1 */
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { %s3 = sadd.s32 1, %s2 }
   0x3 LB: >> { %v1 = vmatmul.bf16.gmra.mxu0 %v0 }
   0x4   :  {}
   0x5   : > { %9 = sbr.rel (%p1) target = $region1 }
   0x6   : >> { %v2 = vpop.f32.mrf.mxu0 }
   0x7 PF: > { %s4 = smov 0 }
   0x8 LB: >> { %10 = vst [vmem:[#allocation2]] %v2 }
   0x9   : >> { %11 = sbr.rel (%p2) target = $region2 }
   0xa   :  { %12 = vsyncpa [#allocation7], 1 }
   0xb   :  { %13 = vsyncpa [#allocation8], 1 } /* exit bundle: %kernel.1 */
"""


def used(*, mxu=(), valu=(), vpop=(), fill=(), spill=()):
    rows = []
    for i in range(13):  # one more than there are bundles, as libtpu has it
        row = [4 * (i in mxu), 0, 3 * (i in valu), 2 * (i in vpop), 0, 0, int(i in fill), 0, int(i in spill), 0]
        rows.append(" ".join(map(str, row)))
    return UTILISATION + "\n".join(rows) + "\n"


def test_loops_are_found_with_their_slots():
    program = bundles.program("kernel", used(mxu=[3, 4, 6], fill=[2], spill=[4]), BUNDLES)
    assert (program.body.bundles, program.body.own) == (12, 3)
    grid = program.grid
    assert (grid.bundles, grid.own, [loop.bundles for loop in grid.inner]) == (9, 3, [4, 2])
    main = grid.innermost()
    assert main is grid.inner[0] and program.share(main, "MXU") == 3 / 4
    assert (main.spills, grid.spills) == (1, 2)


def test_the_busiest_unit_is_the_one_with_the_largest_share_of_its_slots():
    program = bundles.program("kernel", used(mxu=[3, 4, 6], valu=[3, 4], vpop=[3, 6], spill=[3, 4, 5, 6]), BUNDLES)
    main = program.grid.innermost()
    assert (main.slots["VALU"], main.slots["VPOP"]) == (6, 4)  # of 16 and of 8; spills are stores, no unit of their own
    assert program.busiest(main, apart="MXU") == "VPOP" and program.busiest(main, apart="VPOP") == "MXU"


def test_cycles_are_bundles_times_trips():
    program = bundles.program("kernel", used(mxu=[3]), BUNDLES)
    assert program.cycles(10, (5, 0.5)) == 3 + 10 * (3 + 5 * 4 + 0.5 * 2)
    with pytest.raises(ValueError, match="kernel: expected trips of 2 loops, got 1"):
        program.cycles(10, (5,))
    assert program.cycles(10, (5,), copies=True) == 3 + 10 * (3 + 5 * 4 + 2)  # the other has nothing to do with vectors
    with pytest.raises(ValueError, match="kernel: expected trips of 1 loops, got 0"):
        program.cycles(10, (), copies=True)
    program = bundles.program("kernel", used(mxu=[3], valu=[8]), BUNDLES)
    with pytest.raises(ValueError, match="kernel: expected trips of 2 loops, got 1"):
        program.cycles(10, (5,), copies=True)


def test_branches_and_loops_are_the_parts_of_a_step():
    # A grid of 900 bundles whose step, 20 to 880, is jumped over at its end: a branch of 100 with a loop of 40, a guard around
    # a loop of 200, and one that is too small to be counted.
    loops = [(899, 0), (89, 50), (449, 250)]
    branches = [(19, 880), (29, 130), (245, 455), (600, 620)]
    step, parts = bundles._parts([*branches, *loops])
    assert parts == (("branch", 60), ("loop", 40), ("loop", 200)) and step == 900 - 100 - 200
    program = bundles.program("kernel", used(mxu=[3]), BUNDLES)._replace(step=step, parts=parts)
    program = program._replace(parts=tuple(bundles.Part(*part) for part in parts))
    assert program.cycles_of_parts(10, (0.5, 2, 3)) == 3 + 10 * (600 + 0.5 * 60 + 2 * 40 + 3 * 200)
    with pytest.raises(ValueError, match=r"kernel: expected trips of 3 parts \(branch of 60, loop of 40, loop of 200\), got 1"):
        program.cycles_of_parts(10, (1,))
    assert program.cycles_of_parts(10, (0.5, 9, 2, 3), small=(1,)) == program.cycles_of_parts(10, (0.5, 2, 3), small=(1,))
    assert program.cycles_of_parts(10, (0.5, 2), copies=True) == program.cycles_of_parts(10, (0.5, 2, 1))


def test_jumps_are_read_from_the_bundles_comments():
    text = BUNDLES.replace("/* core id */", "/* core id */ /* Start region 9 */")
    text = text.replace("[#allocation8], 1 }", "[#allocation8], 1 } /* x :: Start/End empty region 4 */")
    text = text.replace("{ %s4 = smov 0 }", "{ %7 = sbr.rel (!%p9) target = $region9 }")
    program = bundles.program("kernel", used(), text)
    assert (program.step, program.parts) == (8, ())  # from the first bundle to the jump back


def test_the_files_of_a_kernel_are_the_last_of_its_name(tmp_path):
    for stamp, name, text in ((1, "kernel.1", ""), (2, "transpose_jvp_kernel__.2", BUNDLES), (3, "kernel_b.1", "")):
        (tmp_path / f"{stamp}-{name}-00-final_hlo-static-per-bundle-utilization.txt").write_text(used(mxu=[3]))
        (tmp_path / f"{stamp}-{name}-01-schedule-analysis_final_bundles.txt").write_text("")
        (tmp_path / f"{stamp}-{name}-02-final_bundles.txt").write_text(text)
    assert bundles.read(tmp_path, "kernel").body.bundles == 12
    with pytest.raises(ValueError, match="expected the program of a kernel other, found none"):
        bundles.read(tmp_path, "other")


def test_vmem_is_what_the_compiler_allocated_to_the_kernel_of_this_name():
    def call(name, used, target="tpu_custom_call"):
        attributes = f'frontend_attributes={{a="{{\n  b\n}}"}}, backend_config={{"body":"TUx",{used}}}'
        return f'  %{name} = (f32[8]{{0}}) custom-call(%p), custom_call_target="{target}", {attributes}'

    def space(number, size):
        return f'{{"memory_space":"{number}","offset":"0","size":"{size}"}}'

    lines = [
        call("jvp_kernel_.1", f'"used_scoped_memory_configs":[{space(1, 100)},{space(5, 7)},{space(1, 20)}]'),
        call("transpose_jvp_kernel_backward__.2", f'"used_scoped_memory_configs":[{space(1, 3000)}]'),
        call("kernel_backward.3", f'"used_scoped_memory_configs":[{space(1, 9)}]', "other"),
        call("silent.4", '"retry_config":{}'),
        call("small", '"used_scoped_memory_configs":[]'),
    ]
    hlo = "\n".join(["HloModule jit_run", *lines])
    assert [bundles.vmem_bytes(hlo, name) for name in ("kernel", "kernel_backward", "small")] == [120, 3000, 0]
    with pytest.raises(ValueError, match="expected a kernel other in the program, found none"):
        bundles.vmem_bytes(hlo, "other")
    with pytest.raises(ValueError, match="silent: expected used_scoped_memory_configs"):
        bundles.vmem_bytes(hlo, "silent")


def test_files_that_do_not_belong_together_are_refused():
    short = UTILISATION + "0 0 0 0 0 0 0 0 0 0\n"
    with pytest.raises(ValueError, match="kernel: expected the slots of 12 bundles, got 1"):
        bundles.program("kernel", short, BUNDLES)
