"""childtune_fast: masked fine-tuning of pretrained transformers (Child-Tuning) at the speed of fused AdamW."""

from ._version import __version__
from .child_network import ChildNetwork
from .mask import bernoulli_mask
from .optimizer import ChildAdamW

__all__ = ["ChildAdamW", "ChildNetwork", "__version__", "bernoulli_mask"]
