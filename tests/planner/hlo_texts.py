"""HLO texts written by hand."""


def hlo_module(entry: str, *computations: str, header: str = "HloModule hand, num_partitions=8") -> str:
    return "\n".join([header, *computations, "ENTRY %main (p: f32[2,3]) -> f32[2,3] {", entry, "}"])


def hlo_loop(start: str, step: str, comparison: str, limit: str = "%limit_b", known: str = "") -> str:
    state = "(s32[], s32[], f32[2,3]{1,0}, f32[3,3]{1,0})"
    condition = f"""%cond (c: {state}) -> pred[] {{
  %c = {state} parameter(0)
  %i_c = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=1
  %one_c = s32[] constant(1)
  %five = s32[] constant(5)
  %ahead = s32[] add(%one_c, %i_c)
  ROOT %test = pred[] compare{comparison}
}}"""
    body = f"""%body (b: {state}) -> {state} {{
  %b = {state} parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %limit_b = s32[] get-tuple-element(%b), index=1
  %x = f32[2,3]{{1,0}} get-tuple-element(%b), index=2
  %w = f32[3,3]{{1,0}} get-tuple-element(%b), index=3
  %one = s32[] constant(1)
  %two = s32[] constant(2)
  %next = s32[] {step}
  %y = f32[2,3]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = {state} tuple(%next, {limit}, %y, %w)
}}"""
    entry = f"""  %p = f32[2,3]{{1,0}} parameter(0)
  %q = f32[3,3]{{1,0}} parameter(1)
  %start = s32[] constant({start})
  %bound = s32[] constant(9)
  %init = {state} tuple(%start, %bound, %p, %q)
  ROOT %loop = {state} while(%init), condition=%cond, body=%body{known}"""
    return hlo_module(entry, condition, body)


UP, DOWN, BY_TWO = "add(%i, %one)", "subtract(%i, %one)", "add(%i, %two)"
