"""Which model is it? A digest of a checkpoint's tensors, by which results and traces are told from those of other weights."""

import hashlib
import math

import numpy as np

from dsv3_jax.interop.folder import Tensors

WHOLE = 2**31  # bytes of a model that are all hashed
PIECE, PIECES = 4096, 4  # of a tensor of a larger one: bytes of a piece, and how many


def model_digest(tensors: Tensors) -> str:
    """SHA-256 of all tensors' released names, dtypes, shapes and values; the same for a folder and for its conversion to
    another format that keeps the values.

    Of a model above 2 GiB four pieces of each tensor are hashed, from its first bytes to its last: a training step moves all
    weights, and so is seen, but a change by hand elsewhere in a matrix is not. The released 671B are so hashed by 1 GB of them.
    """
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.entries.values())
    found = {}
    for name, (dtype, shape) in tensors.entries.items():  # in the order of the disk
        values = np.ascontiguousarray(tensors.tensor(name)).reshape(-1).view(np.uint8)
        each = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
        if size <= WHOLE or values.size <= PIECE * PIECES:
            each.update(values.data)
        else:
            for start in np.linspace(0, values.size - PIECE, PIECES).astype(int):
                each.update(values[start : start + PIECE].data)
        found[name] = each.hexdigest()
    return hashlib.sha256("\n".join(f"{name} {found[name]}" for name in sorted(found)).encode()).hexdigest()
