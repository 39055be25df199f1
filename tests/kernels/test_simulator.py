"""The fixture by which tests on simulated memory see races: of every kernel, not only of the last."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.modes import mode_of
from oracles.simulated import collected


def copied(waits, x, y, semaphore):
    copy = pltpu.make_async_copy(x, y, semaphore)
    copy.start()
    if waits:
        copy.wait()
    y[...] = y[...] + 1.0
    if not waits:
        copy.wait()


def run(x, *, waits):
    return pl.pallas_call(
        partial(copied, waits),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=mode_of("pallas_tpu:simulate", ["pallas_tpu"]).interpret,
    )(x)


def test_a_race_is_seen_also_when_another_kernel_runs_after_it(monkeypatch):
    made, x = collected(monkeypatch), jnp.ones((8, 128))
    np.testing.assert_array_equal(jax.block_until_ready(run(x, waits=True)), x + 1)
    assert [detector.races_found for detector in made] == [False]
    jax.block_until_ready(run(x, waits=False))
    jax.block_until_ready(run(x, waits=True))
    assert [detector.races_found for detector in made] == [False, True, False]
