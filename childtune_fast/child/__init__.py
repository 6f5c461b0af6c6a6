"""The child network of Child-Tuning_D: which weights it trains, how they are chosen, and its files."""

from .network import ChildNetwork
from .task_vector import TaskVector

__all__ = ["ChildNetwork", "TaskVector"]
