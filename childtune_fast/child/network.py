"""ChildNetwork: which weights of a model Child-Tuning_D trains, chosen once and kept for the whole run."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arguments import FilePath, Selector, check_model, check_type
from ..ops.packed_mask import PackedMask, packed_size
from . import delta, files
from .choice import Scope, checked_tensors, choose_at_random, choose_by_scores, packed_mask
from .maskable import head_parameters
from .names import renamed
from .places import Places, device_of_mask
from .report import Summary, plot_density, summarize
from .sets import WeightSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ChildNetwork(WeightSet):
    """The child network of Child-Tuning_D (Xu, Luo et al., EMNLP 2021, section 2.3): a mask for some parameters.

    It is made by `from_scores`, `lowest`, `random`, `from_masks`, `head_only`, `load` or `apply_delta`, and does not
    change afterwards. Parameters without a mask are trained in full.

    Attributes:
        packed: {parameter name: PackedMask}, one bit per weight, on the device where the parameter was. Masks of
            sharded parameters (DTensor) are whole, and on the CPU.
        places: where in the model the masked parameters are.
    """

    def __init__(self, packed: Mapping[str, PackedMask], model: nn.Module) -> None:
        """Holds the masks `packed`, by name, and where in `model` their parameters are, without keeping it alive."""
        params = dict(model.named_parameters())
        self.packed = {name: mask.to(device_of_mask(params[name])) for name, mask in packed.items()}
        self.places = Places(model, packed)

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
        """Returns the child network of exactly `round(reserve_p * n)` of n maskable weights: the highest scores.

        Of equal scores, the one of the earlier parameter in `model.named_parameters()` is kept, then the one of the
        lower flat index. Parameters that do not require a gradient are left out, and tied ones count once.

        It warns where more weights are kept than have a score above 0, and names the tensors that score 0 as a whole;
        and where adapters, such as LoRA's, are maskable because `maskable` is None.

        Args:
            model: torch.nn.Module whose weights are chosen.
            scores: {parameter name: tensor of the parameter's shape, float32, bfloat16 or float16}, such as
                `estimate_fisher` returns; every maskable parameter needs one, and the values of others are not used.
                They may be DTensors; then all ranks must call this, and get the child network of the whole scores.
            reserve_p: share of the maskable weights that is kept, in (0, 1].
            scope: "global" chooses among all maskable weights together; "tensor" keeps the share, rounded, in each
                tensor (default: "global").
            maskable: selects the maskable parameters: a predicate over names, or a regular expression that is searched
                in them; None takes the weights of the repeated transformer blocks, so that embeddings and head are
                trained in full, as in the paper (default: None).

        Raises:
            ValueError: scores are missing, NaN, of another shape, or for parameters that the model does not have; all
                are 0; an argument is out of its range; no maskable weights are found, or none would be kept.
            TypeError: `model`, `scores`, `reserve_p` or `maskable` is of another type, or a score of another dtype.
        """
        return cls(choose_by_scores(model, scores, reserve_p, scope, maskable, largest=True), model)

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
        """Returns the child network of exactly `round(reserve_p * n)` of n maskable weights: the lowest scores.

        This is the paper's ablation. Of equal scores, the one of the earlier parameter in `model.named_parameters()` is
        kept, then the one of the lower flat index.

        Args:
            model: torch.nn.Module whose weights are chosen.
            scores: {parameter name: tensor of the parameter's shape, float32, bfloat16 or float16}; every maskable
                parameter needs one. They may be DTensors; then all ranks must call this.
            reserve_p: share of the maskable weights that is kept, in (0, 1].
            scope: "global" chooses among all maskable weights together; "tensor" keeps the share, rounded, in each
                tensor (default: "global").
            maskable: a predicate or a regular expression over parameter names; None takes the weights of the repeated
                transformer blocks (default: None).

        Raises:
            ValueError: scores are missing, NaN, of another shape, or for parameters that the model does not have; all
                are 0; an argument is out of its range; no maskable weights are found, or none would be kept.
            TypeError: `model`, `scores`, `reserve_p` or `maskable` is of another type, or a score of another dtype.
        """
        return cls(choose_by_scores(model, scores, reserve_p, scope, maskable, largest=False), model)

    @classmethod
    def random(
        cls, model: nn.Module, *, reserve_p: float, seed: int, scope: Scope = "global", maskable: Selector = None
    ) -> "ChildNetwork":
        """Returns a child network of exactly `round(reserve_p * n)` of n maskable weights, chosen at random.

        This is the paper's ablation. The choice is the same on every machine and independent of torch's random state.
        It takes 4 bytes of temporary memory for each maskable weight, of a sharded model for each on this rank.

        Args:
            model: torch.nn.Module whose weights are chosen.
            reserve_p: share of the maskable weights that is kept, in (0, 1].
            seed: integer of 64 bits that determines the choice.
            scope: "global" chooses among all maskable weights together; "tensor" keeps the share, rounded, in each
                tensor (default: "global").
            maskable: a predicate or a regular expression over parameter names; None takes the weights of the repeated
                transformer blocks (default: None).

        Raises:
            ValueError: an argument is out of its range; no maskable weights are found, or none would be kept.
            TypeError: `model`, `reserve_p`, `seed` or `maskable` is of another type.
        """
        return cls(choose_at_random(model, reserve_p, seed, scope, maskable), model)

    @classmethod
    def from_masks(cls, model: nn.Module, masks: Mapping[str, Tensor]) -> "ChildNetwork":
        """Returns the child network of given masks, which may be for any parameters.

        Args:
            model: torch.nn.Module that has the masked parameters.
            masks: {parameter name: bool tensor of the parameter's shape}; True puts a weight into the child network.
                A mask may be a DTensor; then all ranks must call this.

        Raises:
            ValueError: a mask has a name or a shape that the model's parameters do not have, or holds partial sums.
            TypeError: `model` is no module, or a mask is no bool tensor.
        """
        check_model(model)
        params = dict(model.named_parameters())
        masks = checked_tensors("from_masks: masks", masks, params, (torch.bool,))
        return cls({name: packed_mask(mask) for name, mask in masks.items()}, model)

    @classmethod
    def head_only(cls, model: nn.Module, head: Selector = None) -> "ChildNetwork":
        """Returns the child network that trains the head in full and nothing else: a frozen feature extractor.

        Args:
            model: torch.nn.Module with a task head.
            head: selects the head's parameters: a predicate over names, or a regular expression that is searched in
                them; None takes the parameters that a transformers model has beside its base model or backbone, and
                elsewhere those with names that heads commonly have (default: None).

        Raises:
            ValueError: no trainable parameter is in the head, or all parameters are.
            TypeError: `model` is no module, or `head` is of another type.
        """
        of_head = head_parameters(model, head)
        params = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in of_head}
        empty = {n: torch.zeros(packed_size(p.numel()), dtype=torch.uint8, device="cpu") for n, p in params.items()}
        return cls({name: PackedMask(params[name].shape, bits) for name, bits in empty.items()}, model)

    def mask_of(self, param: Tensor, name: str | None = None) -> PackedMask | None:
        """Returns the PackedMask of a parameter, on the parameter's device; None if it is trained in full.

        The mask of a sharded parameter (DTensor) is whole, and on the CPU.

        Args:
            param: the parameter, recognised by identity if it is of the model that the child network was made for, or
                has taken the place of a masked one there.
            name: the parameter's name in its model, by which every other parameter is recognised (default: None).

        Raises:
            ValueError: the mask has another shape, as happens after parameters are flattened or resized; or `name` is
                None, and this is a copied or unpickled child network, which knows parameters by name only.
        """
        check_type("ChildNetwork.mask_of: name", name, (str, type(None)), "a string or None")
        known = self.places.names().get(param) or (None if name is None else self.names_for([name]).get(name))
        if known is None:
            self.check_known([name])
            return None
        mask = self.packed[known]
        if mask.shape != tuple(param.shape):
            raise ValueError(
                f"ChildNetwork: '{known}' must have the shape {mask.shape} of its mask (got {tuple(param.shape)}); "
                "make the child network after the model has its final shapes, and shard it with what keeps them, as "
                "fully_shard does"
            )
        return mask.to(device_of_mask(param))

    def names_for(self, names: Collection[str]) -> dict[str, str]:
        """Returns {name: its name here} of the masked ones among a model's parameters, whatever wraps either model."""
        here = renamed({name: name for name in self.packed}, names)
        return {name: here[name] for name in names if name in here}

    def check_known(self, strangers: Iterable[str | None], found: Iterable[str | None] = ()) -> None:
        """Raises ValueError if one of the strangers, by name or None, may be a masked one other than those `found`.

        That is so in a copy, which knows parameters by name only.
        """
        unknown = self.packed.keys() - self.places.current().keys() - set(found)
        if unknown and (doubtful := [name for name in strangers if not self.places.had(name)]):
            got = "without" if doubtful[0] is None else f"called '{doubtful[0]}', which its model did not have"
            raise ValueError(
                "ChildNetwork: a copied or unpickled child network knows parameters by name only (got one "
                f"{got}); pass model.named_parameters() to the optimizer"
            )

    def summary(self) -> Summary:
        """Returns the density of each tensor and of each kind of module; printed, it is a table."""
        return summarize(self.packed)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the density by layer and kind of module, and returns the matplotlib Axes.

        Args:
            ax: the Axes to draw on; None makes new ones (default: None).

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_density(self.summary(), ax)

    def save(self, path: FilePath) -> None:
        """Writes the masks to a safetensors file, the whole file or, on an error, nothing.

        Every rank has the whole masks: of several ranks, one is enough to write them.

        Args:
            path: the file to write; an existing one is replaced and keeps its permissions, and a link is followed.

        Raises:
            ValueError: a masked parameter has a name that safetensors keeps for itself.
            OSError: the file cannot be written.
        """
        files.save_masks(path, self.packed)

    @classmethod
    def load(cls, path: FilePath, model: nn.Module) -> "ChildNetwork":
        """Returns the child network that `save` wrote.

        Args:
            path: the file that `save` wrote.
            model: torch.nn.Module with parameters of the names and shapes that the masks have. Here and wherever else
                names of two models meet, the prefixes of torch.compile, DDP, FSDP and checkpointing make no difference.

        Raises:
            ValueError: the file is damaged, of another kind or wrong in itself, or for a model with other parameter
                names or shapes.
            OSError: the file cannot be read.
        """
        check_model(model)
        return cls(files.load_masks(path, dict(model.named_parameters())), model)

    def save_delta(self, path: FilePath, model: nn.Module, base: nn.Module | Mapping[str, Tensor]) -> None:
        """Writes what turns `base` into `model` to a safetensors file, the whole file or, on an error, nothing.

        The file holds the masks, the child network's values, and in full every other parameter and buffer that differs
        from the base's or that the base does not have. These may also be sparse or quantised. Those on the meta device
        must be so in the base too, for they have no values.

        Args:
            path: the file to write; an existing one is replaced and keeps its permissions, and a link is followed.
            model: torch.nn.Module that was fine-tuned with this child network.
            base: the module before fine-tuning, or its state dict. What was trained must not be in the model's memory,
                as it is in a state dict that was not copied; frozen parameters and buffers may be.

        Raises:
            ValueError: a weight outside the child network is not the base's, bit for bit; names, shapes or dtypes of
                masked parameters differ; the base has a trained parameter in the model's memory; a tensor is sharded,
                or another one of a kind that the file cannot hold.
            OSError: the file cannot be written.
        """
        check_model(model)
        check_type("base", base, (nn.Module, Mapping), "a torch.nn.Module or its state dict")
        delta.save(path, self.packed, model, base)

    @classmethod
    def apply_delta(cls, path: FilePath, base_model: nn.Module) -> "ChildNetwork":
        """Turns a base model into the fine-tuned one, bit for bit, and returns the child network.

        Args:
            path: the file that `save_delta` wrote.
            base_model: torch.nn.Module with the base's values wherever the file holds none; it is written in place.

        Raises:
            ValueError: the file is damaged, of another kind or wrong in itself, or the model is not the base, or
                sharded. Nothing is written then.
            OSError: the file cannot be read.
        """
        check_model(base_model, "base_model")
        return cls(delta.apply(path, base_model), base_model)
