"""The router's choice, eqs. 12-16 [§2.1.2]: scores, group limit, top-k and gates in one pass."""
