"""DeepSeek-V3 (arXiv 2412.19437) for research, in JAX: the model, its router, its training, as pure functions.

The rooms: `config` and `presets` say what a model is, `model` and `moe` compute it, `data` feeds it, `training` trains it.
"""

__version__ = "0.1.0"
