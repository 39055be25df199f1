"""The module shown in docs/plugins.md trains as it stands and is really used; what cannot be loaded is refused in one line."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.moe.balance import controller_of
from dsv3_jax.moe.router import route
from dsv3_jax.plugins import resolve
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from dsv3_jax.training.step import make_train_step, train_step
from oracles import numpy_moe
from oracles.checks_step import DOMAINS, HYPER, PLAIN, cut, rows, state_of, step_config
from oracles.compiling import quick_jit
from oracles.numpy_layers import sigmoid
from oracles.random_checkpoint import random_tensors

DOCUMENT = Path(__file__).parents[1] / "docs" / "plugins.md"


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    """The document's module, importable as `someones.ideas`."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    (tmp_path / "someones").mkdir()
    (tmp_path / "someones" / "__init__.py").write_text("")
    mistakes = "\nNOT_A_FUNCTION = 3\n\n\ndef no_controller():\n    return 'sign'\n"
    (tmp_path / "someones" / "ideas.py").write_text(code + mistakes)
    monkeypatch.syspath_prepend(tmp_path)
    yield "someones.ideas"
    for name in ("someones.ideas", "someones"):
        sys.modules.pop(name, None)


def test_the_documented_module_trains_and_each_of_its_functions_is_used(ideas):
    settings = {"controller": f"{ideas}:proportional", "scoring_func": f"{ideas}:tempered_sigmoid",
                "selector": f"{ideas}:best_mean_groups", "aux_loss_alpha": "null"}  # fmt: skip
    config = override(step_config(PLAIN), settings)
    assert config.model.topk_method == f"{ideas}:best_mean_groups"  # `selector` is the field's word for it
    state = state_of(random_tensors(PLAIN, seed=1), config)
    run = quick_jit(lambda s, b: train_step(s, b, HYPER, config=config, controller=controller_of(config), n_domains=DOMAINS))
    new, metrics = run(state, cut(rows(), 2))
    load = np.asarray(metrics["load"][0], np.float64)
    assert load.sum() == 19 * 3 and float(metrics["balance_loss"]) == 0.0 and np.isfinite(float(metrics["loss"]))
    proportional = np.asarray(state.bias[0]) + 2**-8 * (load.mean() - load) / load.mean()
    np.testing.assert_allclose(new.bias[0], proportional, rtol=0, atol=1e-7)

    x = jnp.asarray(np.random.default_rng(0).normal(0, 2, (40, 8)), jnp.float32)
    bias = np.linspace(-0.2, 0.2, 8)
    routing = route(x, jnp.eye(8), jnp.asarray(bias, jnp.float32), config.model)
    scores = sigmoid(0.5 * np.asarray(x, np.float64))
    np.testing.assert_allclose(routing.scores, scores, rtol=0, atol=3e-7)
    means = (scores + bias).reshape(40, 4, 2).mean(axis=-1)
    kept = np.argsort(-means, axis=-1)[:, :2]
    assert all(set(np.asarray(routing.indices[n]) // 2) <= set(kept[n]) for n in range(40))
    by_two_largest = numpy_moe.route(np.asarray(x, np.float64), bias, num_experts_per_tok=3, n_group=4, topk_group=2)
    assert (np.asarray(routing.indices) != by_two_largest["indices"]).any()
    gates = np.take_along_axis(scores, np.asarray(routing.indices), -1)
    np.testing.assert_allclose(routing.gates, 2.5 * gates / gates.sum(-1, keepdims=True), rtol=2e-6)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_package:f", "controller: cannot load 'no_such_package:f': No module named 'no_such_package'"),
        ("{ideas}:absent", "controller: cannot load '.*:absent': module '.*' has no attribute 'absent'"),
        ("{ideas}:NOT_A_FUNCTION", "controller: '.*:NOT_A_FUNCTION' is int, expected a function"),
        ("{ideas}:no_controller", "controller: '.*:no_controller' returned str, expected a Controller"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_that_names_the_setting(ideas, name, message):
    config = override(step_config(PLAIN), {"controller": name.format(ideas=ideas)})
    with pytest.raises(ValueError, match=message) as raised:
        controller_of(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["scoring_func", "topk_method"])
def test_a_router_function_that_is_missing_is_refused_when_the_model_is_traced(ideas, field):
    config = override(step_config(PLAIN), {field: f"{ideas}:absent"})
    with pytest.raises(ValueError, match=f"{field}: cannot load '{ideas}:absent'"):
        jax.eval_shape(lambda x: route(x, jnp.eye(8), jnp.zeros(8), config.model), jnp.zeros((2, 8)))


def test_built_in_names_come_first_and_unknown_ones_list_them():
    assert resolve("kind", "abs", {"abs": abs}) is abs
    with pytest.raises(ValueError, match="kind: expected one of abs, sum or package.module:function, got 'max'"):
        resolve("kind", "max", {"abs": abs, "sum": sum})


@pytest.mark.parametrize("field, function", [("scoring_func", "sums"), ("topk_method", "rounds")])
def test_a_function_of_another_shape_or_dtype_is_refused_before_training(field, function, tmp_path, monkeypatch):
    source = (
        "import jax.numpy as jnp\n"
        "def sums(logits):\n    return logits.sum(-1)\n"
        "def rounds(biased, config):\n    return biased.astype(jnp.int32)\n"
    )
    (tmp_path / "offshape.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    config = override(preset("tiny"), {field: f"offshape:{function}"})
    with pytest.raises(ValueError, match=f"{field}: 'offshape:{function}' returned .*, expected float32"):
        make_train_step(config, 1)
