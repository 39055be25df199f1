"""Kernels in Pallas for TPU and GPU [§3.2-3.4]: a folder each, with a plain reference; `modes` says how one is asked for."""
