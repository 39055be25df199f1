"""Into which format and precision should a checkpoint go? Released files, Orbax and training runs, in and out.

    python -m experiments.convert --source=DIR --target=DIR --format=hf|orbax [--dtype=keep|float32|bfloat16|fp8]

`--dtype=keep` changes no byte of any tensor, and by way of orbax to hf again no byte of any file. `fp8` is the released format
(`--scales=ue8m0` for scales that are powers of two); what is FP8 already stays as it is. A conversion that was stopped goes on
with the same command; until it is complete, the target has no config.json. Seconds a GB, and memory for two tensors.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack

from absl import flags
from tqdm import tqdm

from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.source import open_source
from experiments import _cli


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("source", None, "folder of a model: released, converted, or a training run's", flag_values=values)
    flags.DEFINE_string("target", None, "folder to write", flag_values=values)
    flags.DEFINE_string("format", "hf", "hf or orbax", flag_values=values)
    flags.DEFINE_string("dtype", "keep", "keep, float32, bfloat16 or fp8", flag_values=values)
    flags.DEFINE_string("scales", "float32", "of FP8 that is made here: float32 or ue8m0", flag_values=values)
    flags.DEFINE_float("shard_gb", 5.0, "size of a file, in 10^9 bytes", flag_values=values)
    flags.DEFINE_bool("mtp", True, "the MTP modules too", flag_values=values)
    flags.DEFINE_bool("average", False, "a run's averaged weights", flag_values=values)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    for name in ("source", "target"):
        if not getattr(values, name):
            raise ValueError(f"--{name}: expected a folder, got none")
    if not 0 < values.shard_gb < math.inf:
        raise ValueError(f"--shard_gb: expected a positive number, got {values.shard_gb}")
    if values.scales not in ("float32", "ue8m0"):
        raise ValueError(f"--scales: expected float32 or ue8m0, got {values.scales!r}")
    source = open_source(values.source, mtp=values.mtp, average=values.average)
    with ExitStack() as stack:

        def progress(total: int) -> Callable[[int], None]:
            bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="written", dynamic_ncols=True))
            return lambda done: bar.update(done) and None

        convert(
            source, values.target, format=values.format, dtype=values.dtype, power_of_two=values.scales == "ue8m0",
            shard_bytes=int(values.shard_gb * 1e9), progress=progress,
        )  # fmt: skip
    print(f"converted: {values.target}")
    return 0


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
