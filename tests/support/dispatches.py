"""Counts the operations that torch dispatches, and the memory of the tensors that they make."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dispatches(TorchDispatchMode):
    """While it is entered, notes every operation and how long the memory of its results is in use.

    Attributes:
        names: {name of an operation: how often it was dispatched}.
        count: number of operations.
        peak: most bytes in use at once by results that do not lie in the memory of `known`.
    """

    def __init__(self, known=()):
        super().__init__()
        self.names = Counter()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        self.names[str(operation)] += 1
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._note(result.untyped_storage())
        return results

    @property
    def count(self):
        return self.names.total()

    def _note(self, storage):
        key = storage._cdata
        if key not in self._known and key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key, None)
            self.peak = max(self.peak, sum(self._alive.values()))
