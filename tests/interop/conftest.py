"""One small training run, whose checkpoint is a source like any other."""

from pathlib import Path
from typing import NamedTuple

import pytest

from dsv3_jax.training import loop
from oracles.micro import micro_config


class Trained(NamedTuple):
    workdir: Path
    result: loop.Result


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    config = micro_config(root, steps=2)
    return Trained(root / "run", loop.train(config, root / "run", header=False, progress=False))


@pytest.fixture(scope="session")
def trained(run) -> Path:
    return run.workdir
