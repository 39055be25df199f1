"""Train a DeepSeek-V3 on text and report what its router did.

    python -m experiments.train --preset=quick --workdir=runs/quick [--resume] [--set=steps=500 --set=controller=none]

With `--init=RUN` it begins with the weights and the router bias of another run, whose model has the same sizes; the rest may
differ: length of the sequences, `rope_scaling`, data, schedules.

On several hosts, in each of them, with a --workdir that all see:

    python -m experiments.train ... --coordinator=host0:8476 --num_processes=2 --process_id=0    # 1 on the other
    python -m experiments.train ... --distributed                                                # Slurm, TPU pods

Time and results: experiments/README.md.
"""

import sys

import jax
from absl import flags

from dsv3_jax.analysis.report import write_report
from dsv3_jax.training.loop import train
from experiments import _cli


def main() -> int:
    workdir, config = _cli.workdir_from_flags(), _cli.config_from_flags()
    _cli.join_job(workdir)
    first = jax.process_index() == 0
    result = train(config, workdir, resume=flags.FLAGS.resume, init=flags.FLAGS.init)
    _cli.finish_job()
    if result.interrupted:
        if first:
            how = "go on with the same command and --resume"
            print(f"stopped after step {result.step}, checkpoint saved; {how}", file=sys.stderr)
        return _cli.INTERRUPTED
    if first:
        print(write_report(workdir))
    return 0


def define_flags() -> None:
    flags.DEFINE_string("init", None, "folder of a run whose parameters and router bias this one begins with")


if __name__ == "__main__":
    _cli.define_config_flags()
    _cli.define_process_flags()
    define_flags()
    flags.adopt_module_key_flags(_cli)  # so that --help lists them
    _cli.run(main)
