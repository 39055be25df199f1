"""One program a question, `python -m experiments.NAME`; nothing in `dsv3_jax` imports from here."""
