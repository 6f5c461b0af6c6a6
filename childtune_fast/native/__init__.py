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
