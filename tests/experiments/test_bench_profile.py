"""The profile by component: from events and program text typed in by hand, and from a real trace."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.model.module import abstract_variables
from dsv3_jax.model.transformer import forward, make_context
from dsv3_jax.presets import preset
from experiments._bench_profile import IDLE, UNNAMED, Event, component, operations, shares, traced

TEXT = """\
HloModule jit_step

FileNames
1 "/somewhere/dsv3_jax/model/mla.py"
2 "/somewhere/dsv3_jax/moe/layer.py"
3 "/somewhere/dsv3_jax/model/layers.py"
4 "/somewhere/dsv3_jax/model/transformer.py"

FunctionNames
1 "attention"
2 "moe"
3 "swiglu"
4 "block"

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=8 end_column=31}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=8 end_column=31}
3 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=8 end_column=31}
4 {file_name_id=4 function_name_id=4 line=9 end_line=9 column=8 end_column=31}

StackFrames
1 {file_location_id=4 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=2}
4 {file_location_id=3 parent_frame_id=4}
5 {file_location_id=3 parent_frame_id=2}

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %a.1 = f32[4]{0} negate(%p), metadata={op_name="x" stack_frame_id=2}
  ROOT %a.2 = f32[4]{0} negate(%a.1), metadata={op_name="x" stack_frame_id=2}
}

ENTRY %main (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  %copy.1 = f32[4]{0} copy(%p.1)
  %fusion.1 = f32[4]{0} fusion(%copy.1), kind=kLoop, calls=%fused
  %copy.2 = f32[4]{0} copy(%fusion.1)
  %dot.1 = f32[4]{0} dot(%fusion.1, %p.1), metadata={op_name="y" stack_frame_id=4}
  %dot.2 = f32[4]{0} dot(%fusion.1, %p.1), metadata={op_name="y" stack_frame_id=5}
  ROOT %add.1 = f32[4]{0} add(%dot.1, %p.1), metadata={op_name="z" stack_frame_id=1}
}
"""


def test_an_operation_belongs_to_the_file_that_wrote_it_and_a_fusion_to_what_it_calls():
    names = operations(TEXT)
    assert names["fusion.1"] == "attention"
    assert names["dot.1"] == "shared expert"
    assert names["dot.2"] == "dense MLP"
    assert names["add.1"] == "norms, residuals, embedding"
    assert names["copy.2"] == "attention"  # its operand's
    assert "copy.1" not in names  # a copy of the program's argument


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([("a/moe/dispatch.py", "gather"), ("a/moe/experts.py", "f"), ("a/moe/layer.py", "moe")], "router + dispatch"),
        ([("a/moe/experts.py", "f"), ("a/moe/layer.py", "moe"), ("a/training/step.py", "step")], "experts"),
        ([("a/model/layers.py", "rms_norm"), ("a/model/mla.py", "attention")], "attention"),
        ([("a/model/transformer.py", "forward"), ("a/training/objective.py", "g")], "scan over layers (stacked residuals)"),
        ([("elsewhere/numpy.py", "f")], None),
    ],
)
def test_the_innermost_file_of_the_package_decides(frames, expected):
    assert component(frames) == expected


def test_nested_operations_are_counted_once_and_parallel_ones_share_the_time():
    events = [
        Event("one", 0, 100, "loop"),
        Event("one", 20, 60, "dot"),
        Event("two", 40, 60, "gather"),
        Event("two", 110, 120, "copy"),
    ]
    got = shares(events, {"loop": "rest", "dot": "experts", "gather": "router"})
    # 120 in all: dot alone 20-40, beside gather 40-60; the loop itself 0-20 and 60-100; nothing 100-110.
    assert got == pytest.approx(
        {"rest": 60 / 120, "experts": 30 / 120, "router": 10 / 120, IDLE: 10 / 120, UNNAMED: 10 / 120}, rel=1e-12
    )
    assert list(got) == sorted(got, key=got.get, reverse=True)


def test_no_events_give_no_shares():
    assert shares([], {}) == {}


@pytest.mark.slow  # compiles a gradient
def test_every_component_of_the_model_is_found_in_its_compiled_gradient():
    model = preset("tiny").model
    params, bias = abstract_variables(model)

    def loss(params, bias, tokens):
        context = make_context(jnp.ones_like(tokens), model, cross_document=True)
        return forward(params, bias, tokens, context, model).normed_BTD.sum()

    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    text = jax.jit(jax.grad(loss)).lower(params, bias, tokens).compile().as_text()
    found = set(operations(text).values())
    assert found >= {"attention", "experts", "shared expert", "dense MLP", "router + dispatch", "norms, residuals, embedding"}


def test_a_trace_holds_the_operations_of_the_compiled_program():
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda a: jnp.tanh(a @ a)).lower(x).compile()
    compiled(x)
    events = traced(lambda: compiled(x))
    text = compiled.as_text()
    assert events and all(event.operation in text for event in events)
