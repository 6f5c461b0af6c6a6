"""childtune_fast: masked fine-tuning of pretrained transformers (Child-Tuning) at the speed of fused AdamW."""

from ._version import __version__
from .child_network import ChildNetwork
from .fisher import estimate_fisher
from .fisher_accumulator import FisherAccumulator
from .mask import bernoulli_mask
from .optimizer import ChildAdamW

__all__ = ["ChildAdamW", "ChildNetwork", "FisherAccumulator", "__version__", "bernoulli_mask", "estimate_fisher"]
