"""What `auto` stands for on each platform."""

import pytest

from dsv3_jax.kernels import modes


@pytest.mark.parametrize(
    ("platform", "chip", "expected"),
    [
        ("cpu", "cpu", "plain"),
        ("tpu", "TPU v5", "pallas_tpu"),
        ("tpu", "TPU v5 lite", "pallas_tpu"),
        ("tpu", "TPU v6 lite", "pallas_tpu"),
        ("tpu", "TPU7x", "pallas_tpu"),
        ("tpu", "TPU v4", "plain"),
        ("gpu", "NVIDIA H100 80GB HBM3", "pallas_gpu"),
        ("gpu", "NVIDIA H200", "pallas_gpu"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "plain"),
    ],
)
def test_kernels_are_the_default_where_their_blocks_fit(monkeypatch, platform, chip, expected):
    monkeypatch.setattr(modes, "platform", lambda: platform)
    monkeypatch.setattr(modes, "chip", lambda: chip)
    assert modes.chosen("auto", "plain") == expected
    assert modes.chosen("auto", "plain", possible=False) == "plain"
    assert modes.chosen("other", "plain") == "other"


def test_for_another_platform_than_the_one_here_it_is_that_one_s_kernel():
    assert [modes.chosen("auto", "plain", on) for on in ("cpu", "tpu", "gpu")] == ["plain", "pallas_tpu", "pallas_gpu"]
