"""Parameter specifications are plain data."""

from dsv3_jax.model.spec import Spec, gain, stacked


def test_stacking_adds_a_layers_axis_in_front_and_keeps_the_initialiser():
    tree = {"a": Spec((2, 3), ("embed", "mlp")), "inner": {"norm": gain(4, "embed")}}
    assert stacked(tree, 5) == {
        "a": Spec((5, 2, 3), ("layers", "embed", "mlp")),
        "inner": {"norm": Spec((5, 4), ("layers", "embed"), "ones")},
    }
