"""Decoding programs run a few times each."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """Every test of the folder."""
