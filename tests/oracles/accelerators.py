"""The kernels that the accelerator of this machine runs, beside those that every machine interprets: none on a CPU."""

import jax

HERE = {"tpu": ["pallas_tpu"], "gpu": ["pallas_gpu"]}.get(jax.default_backend(), [])
