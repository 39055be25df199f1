"""Train a DeepSeek-V3 on text and report what its router did.

    python -m experiments.train --preset=quick --workdir=runs/quick [--resume] [--set=steps=500 --set=controller=none]

Time and results: experiments/README.md.
"""

import sys

from absl import flags

from dsv3_jax.analysis.report import write_report
from dsv3_jax.training.loop import train
from experiments import _cli


def main() -> int:
    workdir = _cli.workdir_from_flags()
    result = train(_cli.config_from_flags(), workdir, resume=flags.FLAGS.resume)
    if result.interrupted:
        print(f"stopped after step {result.step}, checkpoint saved; go on with the same command and --resume", file=sys.stderr)
        return _cli.INTERRUPTED
    print(write_report(workdir))
    return 0


if __name__ == "__main__":
    _cli.define_config_flags()
    flags.adopt_module_key_flags(_cli)  # so that --help lists them
    _cli.run(main)
