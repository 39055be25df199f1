"""Released checkpoints, in and out, without PyTorch: `load` a folder, `save` one."""
