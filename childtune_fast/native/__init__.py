"""The compiled module and the kernels of GPUs: how they are built, found and loaded."""


class BackendError(RuntimeError):
    """The native backend cannot be loaded or built; the message names the cause and the remedy."""


class CudaError(BackendError):
    """The CUDA driver is missing, or has refused something; the message quotes it.

    Attributes:
        code: the driver's number of the error, a CUresult; 0 if it was not the driver that refused.
        begun: whether the GPU had been told to do a part of what was asked.
    """

    def __init__(self, message: str, code: int = 0, begun: bool = False) -> None:
        """Makes an error from its message, and from what the attributes say."""
        super().__init__(message)
        self.code, self.begun = code, begun


class UnverifiedMemory(Exception):
    """What a step would write may overlap, as far as addresses tell; nothing has been written.

    Attributes:
        digest: that of the memory. A step that is given it writes without looking again.
    """

    def __init__(self, digest: int) -> None:
        """Makes an error from the digest."""
        super().__init__(f"parameters and state of a step may overlap in memory (digest {digest})")
        self.digest = digest
