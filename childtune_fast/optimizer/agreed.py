"""Which masks an optimizer has after loading a checkpoint: its own, or the checkpoint's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..ops.packed_mask import Masks, PackedMask, fingerprint
from .masks import of_rank
from .restored import saved_mask

FINGERPRINT = "child_fingerprint"  # key in each param group: the fingerprint of the masks, None without child network


def agreed_masks(
    present: Masks | None, bound: bool, params: Mapping[int, Tensor], state_dict: dict[str, Any]
) -> tuple[Masks | None, bool]:
    """Returns the masks that an optimizer has after loading a checkpoint, and whether the checkpoint is dense.

    Args:
        present: {parameter: mask} of the optimizer's child network; None without one.
        bound: whether the optimizer was built with that child network, and so cannot take another one.
        params: {number in the checkpoint: parameter of the optimizer}.
        state_dict: the checkpoint, of a ChildAdamW or of another optimizer.

    Returns:
        {parameter: mask}, None if neither has a child network; and whether the checkpoint has none, so that its state
        has the parameters' shapes.

    Raises:
        ValueError: a mask of the checkpoint is damaged, missing or does not fit its parameter; or it has another child
            network than the optimizer was built with.
    """
    expected = state_dict["param_groups"][0].get(FINGERPRINT) if state_dict["param_groups"] else None
    saved = _saved_masks(params, state_dict)
    found = None if expected is None and not saved else fingerprint(saved.values())
    own = None if present is None else fingerprint(present.values())
    if expected == found:
        if (
            bound
            and expected is not None
            and not all(_equal(mask, saved.get(p)) for p, mask in (present or {}).items())
        ):
            raise ValueError(
                "load_state_dict: the optimizer's child network must be the checkpoint's (got fingerprints "
                f"{own} and {expected}); build the optimizer with the child network that was saved or, unless "
                "torch.distributed.checkpoint reads it, without child=, which takes the checkpoint's"
            )
        return (present if expected in (None, own) else saved), expected is None
    # Who stores single values of a state may have left out masks; the optimizer's own are as good.
    if present is not None and expected == own and all(_equal(mask, present.get(p)) for p, mask in saved.items()):
        return present, False
    raise ValueError(
        f"load_state_dict: the masks of the checkpoint's child network must have the fingerprint {expected} that was "
        f"saved with them (got {found}); the checkpoint is damaged, or only a part of it was passed; without its masks "
        "it loads into an optimizer that was built with child="
    )


def _equal(mask: PackedMask, other: PackedMask | None) -> bool:
    return other is not None and mask.digest == other.digest


def _saved_masks(params: Mapping[int, Tensor], state_dict: dict[str, Any]) -> Masks:
    """Returns {parameter: mask} of the masks in a checkpoint; raises ValueError if one does not fit its parameter."""
    masks = {}
    for i, param in params.items():
        state = state_dict["state"].get(i)
        bits = state.get("child_mask") if isinstance(state, dict) else None
        if bits is not None:
            masks[param] = of_rank(saved_mask(param, bits), param)
    return masks
