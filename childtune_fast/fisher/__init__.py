"""The diagonal Fisher information: how much each weight matters to a task, as the mean of its squared gradient."""

from .accumulator import FisherAccumulator
from .estimate import estimate_fisher

__all__ = ["FisherAccumulator", "estimate_fisher"]
