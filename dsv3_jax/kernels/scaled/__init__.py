"""FP8 products whose operands have a scale for each tile, promoted every 128 [§3.3.2]."""
