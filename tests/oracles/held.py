"""A dictionary of tensors where a checkpoint is expected."""


class Held:
    """Tensors of the host's memory."""

    where = "memory"

    def __init__(self, tensors):
        self.tensors = tensors
        self.entries = {name: (array.dtype, array.shape) for name, array in tensors.items()}

    def file_of(self, name):
        return "memory"

    def tensor(self, name):
        return self.tensors[name]
