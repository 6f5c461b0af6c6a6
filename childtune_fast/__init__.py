"""childtune_fast: masked fine-tuning of pretrained transformers (Child-Tuning) at the speed of fused AdamW."""

from ._version import __version__
from .child import ChildNetwork
from .fisher import FisherAccumulator, estimate_fisher
from .ops.random_mask import bernoulli_mask
from .optimizer import ChildAdamW

__all__ = ["ChildAdamW", "ChildNetwork", "FisherAccumulator", "__version__", "bernoulli_mask", "estimate_fisher"]
