"""A small corpus on disk, shared by the tests of the data room."""

from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig
from oracles.texts import WORDS, invented


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """30 documents in each of three domains, one file each, in folders of the domain's name."""
    root: Path = tmp_path_factory.mktemp("corpus")
    for domain in WORDS:
        (root / domain).mkdir()
        for seed in range(30):
            (root / domain / f"{seed:02}.txt").write_text(invented(domain, seed), encoding="utf-8")
    return DataConfig(
        corpus=str(root / "*" / "*.txt"),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        seq_len=32,
        holdout_fraction=0.2,
        eval_sequences=9,
    )
