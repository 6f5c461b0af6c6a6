"""ChildNetwork: which weights of a model Child-Tuning_D trains, chosen once and kept for the whole run."""

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..arguments import FilePath, Selector, check_model, check_type
from ..ops.packed_mask import PackedMask, fingerprint, packed_size
from . import delta, files
from .choice import Scope, check_scores, check_tensors, choose, random_scores
from .maskable import head_parameters, maskable_parameters
from .report import Summary, plot_density, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ChildNetwork:
    """The child network of Child-Tuning_D (Xu, Luo et al., EMNLP 2021, section 2.3): a mask for some parameters.

    Made by `from_scores`, `lowest`, `random`, `from_masks`, `head_only`, `load` or `apply_delta`, and not changed
    afterwards. Parameters that it has no mask for train in full.

    Attributes:
        packed: the masks by parameter name, one bit per weight.
    """

    def __init__(self, packed: Mapping[str, PackedMask], params: Mapping[str, Parameter]) -> None:
        """Takes masks by name, and the parameters of these names, which it recognises but does not keep alive."""
        self.packed = {name: mask.to(params[name].device) for name, mask in packed.items()}
        self._names = {id(params[name]): (weakref.ref(params[name]), name) for name in packed}

    # ---- How one is made -------------------------------------------------------------------------------------------

    @classmethod
    def from_scores(
        cls,
        model: nn.Module,
        scores: Mapping[str, Tensor],
        *,
        reserve_p: float,
        scope: Scope = "global",
        maskable: Selector = None,
    ) -> "ChildNetwork":
        """Keeps exactly `round(reserve_p * n)` of the n maskable weights: those with the highest scores.

        Ties go to the lower index, by the order of `model.named_parameters()`. Parameters that do not require a
        gradient are left out, and tied ones count once.

        Args:
            model: whose weights are chosen.
            scores: by parameter name, float32, bfloat16 or float16 tensors of the parameters' shapes, such as
                `estimate_fisher` returns. Scores of parameters that are not maskable are not used.
            reserve_p: share of the maskable weights that is kept, in (0, 1].
            scope: "global" chooses among all maskable weights together; "tensor" keeps that share of each tensor
                (default: "global").
            maskable: a predicate or a regex (`re.search`) over parameter names; None takes the weights of the repeated
                transformer blocks and leaves embeddings and head to be trained in full, as the paper did.

        Raises:
            ValueError: scores are missing, NaN, of another shape, or for parameters that the model does not have; an
                argument is out of its range; no maskable weights are found, or none would be kept.
            TypeError: scores are no tensors of these dtypes.
        """
        params = maskable_parameters(model, maskable)
        check_scores(scores, params, model)
        return cls(choose({name: scores[name] for name in params}, reserve_p, scope, largest=True), params)

    @classmethod
    def lowest(
        cls,
        model: nn.Module,
        scores: Mapping[str, Tensor],
        *,
        reserve_p: float,
        scope: Scope = "global",
        maskable: Selector = None,
    ) -> "ChildNetwork":
        """Keeps the lowest scores instead of the highest (the paper's ablation); else as `from_scores`."""
        params = maskable_parameters(model, maskable)
        check_scores(scores, params, model)
        return cls(choose({name: scores[name] for name in params}, reserve_p, scope, largest=False), params)

    @classmethod
    def random(
        cls, model: nn.Module, *, reserve_p: float, seed: int, scope: Scope = "global", maskable: Selector = None
    ) -> "ChildNetwork":
        """Keeps exactly `round(reserve_p * n)` maskable weights at random (the paper's ablation).

        The same on every machine, and independent of torch's random state. Takes 4 bytes of temporary memory for each
        maskable weight.

        Args:
            model: whose weights are chosen.
            reserve_p: share of the maskable weights that is kept, in (0, 1].
            seed: an integer of 64 bits.
            scope: as in `from_scores` (default: "global").
            maskable: as in `from_scores` (default: None).
        """
        params = maskable_parameters(model, maskable)
        return cls(choose(random_scores(params, seed), reserve_p, scope), params)

    @classmethod
    def from_masks(cls, model: nn.Module, masks: Mapping[str, Tensor]) -> "ChildNetwork":
        """Takes given masks, for any parameters.

        Args:
            model: that has these parameters.
            masks: by parameter name, bool tensors of the parameters' shapes; True is in the child network.

        Raises:
            ValueError: a name or shape that the model does not have.
            TypeError: a mask is no bool tensor.
        """
        check_model(model)
        params = dict(model.named_parameters())
        check_tensors("from_masks: masks", masks, params, (torch.bool,))
        return cls({name: PackedMask.pack(mask) for name, mask in masks.items()}, params)

    @classmethod
    def head_only(cls, model: nn.Module, head: Selector = None) -> "ChildNetwork":
        """Trains the head in full and nothing else: the frozen feature extractor.

        Args:
            model: any module.
            head: a predicate or a regex (`re.search`) over parameter names; None takes what a transformers model has
                beside its base model, else names that heads commonly have.

        Raises:
            ValueError: no head is found, or nothing else is left.
        """
        of_head = head_parameters(model, head)
        params = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in of_head}
        empty = {n: torch.zeros(packed_size(p.numel()), dtype=torch.uint8) for n, p in params.items()}
        return cls({name: PackedMask(params[name].shape, bits) for name, bits in empty.items()}, params)

    # ---- What it holds ---------------------------------------------------------------------------------------------

    def mask_of(self, param: Tensor, name: str | None = None) -> PackedMask | None:
        """Returns the mask of a parameter, on its device; None if it is to be trained in full.

        Args:
            param: recognised by identity if the child network was made for the model that it belongs to.
            name: of the parameter, by which any other is recognised.

        Raises:
            ValueError: the mask of that name has another shape, as where parameters were flattened or sharded; or there
                is no name, and this is a copy, which knows parameters by name only.
        """
        known = self._names.get(id(param))
        if known is not None and known[0]() is param:
            return self.packed[known[1]].to(param.device)
        if name is None and not self._names and self.packed:
            raise ValueError(
                "ChildNetwork: a copied or unpickled child network knows parameters by name only (got one without); "
                "pass model.named_parameters() to the optimizer"
            )
        mask = None if name is None else self.packed.get(name)
        if mask is not None and mask.shape != tuple(param.shape):
            raise ValueError(
                f"ChildNetwork: '{name}' must have the shape {mask.shape} of its mask (got {tuple(param.shape)}); "
                "build the optimizer from the parameters as the child network knows them, before they are sharded"
            )
        return None if mask is None else mask.to(param.device)

    def masks(self) -> dict[str, Tensor]:
        """Returns the masks as bool tensors of the parameters' shapes, by name; True is in the child network."""
        return {name: mask.unpack() for name, mask in self.packed.items()}

    @property
    def fingerprint(self) -> str:
        """A SHA-256, in hexadecimal, of all masks and their shapes, whatever their names."""
        return fingerprint(self.packed.values())

    def summary(self) -> Summary:
        """Returns the density per tensor and per kind of module, in rows; `print` shows a table."""
        return summarize(self.packed)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the density by layer and kind of module, and returns the matplotlib Axes; `ax` is drawn on, if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_density(self.summary(), ax)

    def __repr__(self) -> str:
        count, numel = (sum(getattr(mask, key) for mask in self.packed.values()) for key in ("count", "numel"))
        return f"ChildNetwork({count:,} of {numel:,} weights, in {len(self.packed)} tensors)"

    def __getstate__(self) -> dict[str, Any]:
        return {"packed": self.packed, "_names": {}}  # a copy recognises parameters by name

    # ---- Sets ------------------------------------------------------------------------------------------------------

    def overlap(self, other: "ChildNetwork") -> float:
        """Returns the weights in both child networks as a share of the smaller one's; 0 if that is empty.

        Raises:
            ValueError: they do not mask the same parameters.
        """
        both = sum(mask.count for mask in self.intersection(other).packed.values())
        smaller = min(sum(mask.count for mask in child.packed.values()) for child in (self, other))
        return both / smaller if smaller else 0.0

    def union(self, other: "ChildNetwork") -> "ChildNetwork":
        """Returns the child network of the weights in either; raises as `overlap` does."""
        return self._combined(other, torch.bitwise_or)

    def intersection(self, other: "ChildNetwork") -> "ChildNetwork":
        """Returns the child network of the weights in both; raises as `overlap` does."""
        return self._combined(other, torch.bitwise_and)

    def _combined(self, other: "ChildNetwork", operation: Callable[[Tensor, Tensor], Tensor]) -> "ChildNetwork":
        check_type("other", other, ChildNetwork, "a ChildNetwork")
        a, b = ({name: mask.shape for name, mask in child.packed.items()} for child in (self, other))
        if a != b:
            differing = next(name for name in [*a, *b] if a.get(name) != b.get(name))
            raise ValueError(
                "two child networks can be compared or combined if they mask the same parameters, of the same shapes "
                f"(got '{differing}' of shape {a.get(differing)} and {b.get(differing)}); make both with one maskable="
            )
        combined = ChildNetwork({}, {})
        for name, mask in self.packed.items():
            bits = operation(mask.bits, other.packed[name].bits.to(mask.bits.device))
            combined.packed[name] = PackedMask(mask.shape, bits)
        combined._names = dict(self._names)
        return combined

    # ---- Files -----------------------------------------------------------------------------------------------------

    def save(self, path: FilePath) -> None:
        """Writes the masks to a safetensors file, all of it or nothing."""
        files.save_masks(path, self.packed)

    @classmethod
    def load(cls, path: FilePath, model: nn.Module) -> "ChildNetwork":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is damaged, of another kind, or for a model with other parameter names or shapes.
            OSError: it cannot be read.
        """
        check_model(model)
        params = dict(model.named_parameters())
        return cls(files.load_masks(path, params), params)

    def save_delta(self, path: FilePath, model: nn.Module, base: nn.Module | Mapping[str, Tensor]) -> None:
        """Writes what turns `base` into `model`, to a safetensors file, all of it or nothing.

        That is the masks, the child network's values, and whatever other parameters and buffers differ from the base's
        or are not in it, in full.

        Args:
            path: of the file.
            model: fine-tuned with this child network.
            base: the model before, or its state dict.

        Raises:
            ValueError: a weight outside the child network is not the base's, bit for bit; or names, shapes or dtypes of
                masked parameters differ.
        """
        check_model(model)
        check_type("base", base, (nn.Module, Mapping), "a torch.nn.Module or its state dict")
        delta.save(path, self.packed, model, base)

    @classmethod
    def apply_delta(cls, path: FilePath, base_model: nn.Module) -> "ChildNetwork":
        """Turns a base model into the fine-tuned one that `save_delta` saw, bit for bit, and returns the child network.

        Args:
            path: of the file.
            base_model: has the base's values wherever the file holds none, and is written to.

        Raises:
            ValueError: the file is damaged or of another kind, or the model is not the base. Nothing is written then.
            OSError: the file cannot be read.
        """
        check_model(base_model, "base_model")
        return cls(delta.apply(path, base_model), dict(base_model.named_parameters()))
