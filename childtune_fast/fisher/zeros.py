"""Scores that are all 0: what estimate_fisher refuses to return."""

from torch import Tensor

from ..arguments import is_sharded
from .together import Together


def refuse_zeros(scores: dict[str, Tensor], ranks: Together, per_example: bool) -> dict[str, Tensor]:
    """Returns the scores; raises if all are 0, for nothing can be chosen by them.

    The first tensor with another score ends the search, so that a GPU is waited for once, as a rule.

    Args:
        scores: {parameter name: its scores}, whole or DTensors.
        ranks: the ranks that hold parts of the model; all must come here, and raise together.
        per_example: whether each example's gradient was squared.

    Raises:
        ValueError: all scores are 0, those on other ranks, too.
    """
    if ranks.worst(int(any(map(_has_others, scores.values())))):
        return scores
    cause = "look for no_grad, or a detached tensor, between them and the loss"
    if per_example:
        cause = (
            "a loss that compares the examples of a batch, as contrastive ones do, is constant for one example alone: "
            f"pass per_example=False; else {cause}"
        )
    raise ValueError(
        f"estimate_fisher: the scored weights must change the loss (got scores of 0 alone, in {len(scores)} tensors, "
        f"the first '{next(iter(scores))}'); {cause}, and for gradients below 1e-23, as a tiny grad_clip makes them, "
        "whose squares are 0 in float32"
    )


def _has_others(scores: Tensor) -> bool:
    if not is_sharded(scores):
        return bool(scores.any())
    from ..ops.shards import local_tensor

    return bool(local_tensor(scores).any())
