"""ChildAdamW: its arguments, groups, state and checkpoints. What a step computes is in `ops`."""

from .adamw import ChildAdamW

__all__ = ["ChildAdamW"]
