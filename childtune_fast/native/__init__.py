"""The compiled module and the kernels of GPUs: how they are built, found and loaded."""


class BackendError(RuntimeError):
    """The native backend cannot be loaded or built; the message names the cause and the remedy."""
