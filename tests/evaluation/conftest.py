"""A tiny model that knows one answer, opened once; its programs run a few times each."""

import pytest

from dsv3_jax.evaluation.subject import open_subject
from oracles.talkative import write_talkative


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """Every test of the folder."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_talkative(tmp_path_factory.mktemp("talkative"))


@pytest.fixture(scope="session")
def subject(folder):
    return open_subject(folder)
