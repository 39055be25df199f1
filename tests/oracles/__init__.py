"""Independent references for the tests: plain NumPy in float64, stored checkpoints with known outputs, known vectors.

Nothing in here imports `dsv3_jax` or JAX: an oracle that shares code with what it judges proves nothing.
"""
