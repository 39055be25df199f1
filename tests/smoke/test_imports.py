"""Every module imports without a warning: the whole of what `make smoke312` needs to meet a newer JAX's deprecations."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_jax
import experiments


def _names(package):
    return sorted(m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + "."))


@pytest.mark.parametrize("name", ["dsv3_jax", *_names(dsv3_jax)])
def test_every_module_of_the_package_imports_and_says_what_it_is(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "install the extra" not in str(error):
            raise
        pytest.skip(str(error))
    assert module.__doc__, f"{name} lacks the docstring that names what it is"


# A process each, because two programs may define a flag of the same name.
@pytest.mark.parametrize("name", [n for n in _names(experiments) if not n.split(".")[-1].startswith("_")])
def test_every_experiment_starts_and_explains_itself(name):
    root = Path(experiments.__path__[0]).parent
    done = subprocess.run([sys.executable, "-m", name, "--help"], cwd=root, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    assert "--" in done.stdout and "Try --helpfull" in done.stdout, done.stdout
