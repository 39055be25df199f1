"""The digest by which one model's results are told from another's."""

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop import digest
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.digest import model_digest
from dsv3_jax.interop.source import open_source
from oracles.cases import DATA
from oracles.held import Held


def some_tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (300, 70), "a.weight_scale_inv": (3, 1), "norm": (9,), "b.weight": (130, 100)}
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"a.weight": found["a.weight"].astype(ml_dtypes.float8_e4m3fn)}


def test_every_value_name_shape_and_dtype_counts():
    first, seen = some_tensors(), set()
    seen.add(model_digest(Held(first)))
    for name, array in first.items():
        for place in (0, array.size // 2, array.size - 1):
            moved = array.copy()
            moved.flat[place] += np.asarray(1, moved.dtype)
            seen.add(model_digest(Held(first | {name: moved})))
    seen.add(model_digest(Held(first | {"b.weight": first["b.weight"].reshape(100, 130)})))
    seen.add(model_digest(Held(first | {"norm": first["norm"].view(np.int32)})))
    seen.add(model_digest(Held({name.replace("norm", "gain"): array for name, array in first.items()})))
    assert len(seen) == 1 + 3 * 4 + 3
    assert model_digest(Held(dict(reversed(first.items())))) in seen, "the order of files does not count"
    turned = first | {"b.weight": np.asfortranarray(first["b.weight"])}
    assert model_digest(Held(turned)) == model_digest(Held(first)), "nor how a tensor lies in memory"


def test_of_a_large_model_the_middle_of_each_tensor_counts(monkeypatch):
    monkeypatch.setattr(digest, "WHOLE", 1000)
    monkeypatch.setattr(digest, "PIECE", 64)
    first = some_tensors()
    ours = model_digest(Held(first))
    for name, array in first.items():
        moved = array.copy()
        moved.flat[array.size // 2] += np.asarray(1, moved.dtype)
        assert model_digest(Held(first | {name: moved})) != ours, name
        everywhere = (array.astype(np.float32) * 1.25).astype(array.dtype)
        assert model_digest(Held(first | {name: everywhere})) != ours
    between = first["b.weight"].copy()
    between.flat[100] += 1
    assert model_digest(Held(first | {"b.weight": between})) == ours, "what is not read does not count"


@pytest.mark.parametrize("case", ["base", "mtp"])
def test_a_conversion_that_keeps_the_values_keeps_the_digest(case, tmp_path):
    source = open_source(DATA / case)
    ours = model_digest(source.tensors)
    assert ours == model_digest(open_source(DATA / case, compute_dtype="bfloat16").tensors)
    convert(source, tmp_path / "orbax", format="orbax")
    assert model_digest(open_source(tmp_path / "orbax").tensors) == ours
