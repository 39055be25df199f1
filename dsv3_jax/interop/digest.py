"""Which model is it? A digest of a checkpoint's tensors, by which results and traces are told from those of other weights."""

import hashlib
import math

import numpy as np

from dsv3_jax.interop.folder import Tensors

WHOLE = 2**31  # bytes of a model that are all hashed
PIECE = 2**14  # bytes, from the middle, of a tensor of a larger one: one read each


def model_digest(tensors: Tensors) -> str:
    """SHA-256 of all tensors' released names, dtypes, shapes and values; the same for a folder and for its conversion to
    another format that keeps the values.

    Of a model above 2 GiB 16 KiB from the middle of each tensor are hashed: a training step moves all weights, and so is seen,
    but a change by hand elsewhere in a matrix is not. Of the released 671B less than 1 GB is read.
    """
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.entries.values())
    found = {}
    for name, (dtype, shape) in tensors.entries.items():  # in the order of the disk
        values = np.ascontiguousarray(tensors.tensor(name)).reshape(-1).view(np.uint8)
        each = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
        if size > WHOLE and values.size > PIECE:
            middle = (values.size - PIECE) // 2
            values = values[middle : middle + PIECE]
        each.update(values.data)
        found[name] = each.hexdigest()
    return hashlib.sha256("\n".join(f"{name} {found[name]}" for name in sorted(found)).encode()).hexdigest()
