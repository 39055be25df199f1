"""Quantisation to tiles and blocks [§3.3.2]: amax, scale and cast in one pass."""
