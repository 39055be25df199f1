"""The benchmark of a trace of a model larger than memory."""

import json

import jax
import numpy as np
import pytest
from absl import flags

from dsv3_jax.inference.score import Streamed
from dsv3_jax.interop.source import open_source
from dsv3_jax.presets import preset
from experiments import bench_stream


def parsed(*words):
    values = flags.FlagValues()
    bench_stream.define_flags(values)
    values(["bench_stream", *words])
    return values


def test_a_hollow_folder_is_a_released_one_that_takes_little_of_the_disk(tmp_path):
    config = preset("mid").model
    size = bench_stream.write_hollow(tmp_path, config)
    files = list(tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) == size
    assert sum(path.stat().st_blocks * 512 for path in files) < 0.5 * size
    source = open_source(tmp_path)  # every tensor, of the right shape and kind
    assert source.config.num_hidden_layers == config.num_hidden_layers
    supply = Streamed(source.tensors, source.config, "float32")
    (params, _), *_ = supply.layers()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(params["mlp"]["down_proj"].astype(np.float32)))
    assert np.abs(supply.embedding(np.arange(5)[None])).min() > 0
    largest = bench_stream.largest_layer(config)
    assert largest < max(path.stat().st_size for path in files if path.name.startswith("layer")) < 1.1 * largest


@pytest.mark.slow
def test_the_line_says_how_long_and_how_much(capfd):
    assert bench_stream.main(parsed("--preset=tiny", "--tokens=5", "--layers=2")) == 0
    line = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert line["layers"] == 2 and line["tokens"] == 5 and line["peak_gb"] > 0.1 and line["seconds"] > 0


def test_layers_that_the_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="--layers: expected at most the model's 4, got 9|--layers: expected at most"):
        bench_stream.main(parsed("--preset=tiny", "--layers=9"))
