"""Adapters in a model, such as LoRA's, which Child-Tuning_D masks only if that is asked for, or else with a warning."""

import re
import warnings
from collections.abc import Iterable

from torch import nn

_LORA = re.compile(r"(^|\.)lora_")  # how PEFT, loralib and torchtune call the matrices


def warn_of_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Warns if adapters are among the parameters that are masked because nothing else was asked for.

    They are found by their names, or, of other kinds than LoRA, by the attribute in which PEFT's layers list them.

    Args:
        model: the module that a child network is to be chosen in.
        names: those of the maskable parameters.
    """
    listed = {
        f"{path}.{attribute}."
        for path, module in model.named_modules()
        if isinstance(of_layer := getattr(module, "adapter_layer_names", None), (tuple, list))
        for attribute in of_layer
    }
    names = list(names)
    adapters = [name for name in names if _LORA.search(name) or name.startswith(tuple(listed))]
    if adapters:
        warnings.warn(
            "ChildNetwork: the maskable weights should be the model's own (got adapters in "
            f"{len(adapters)} of {len(names)} tensors, the first '{adapters[0]}'), for Child-Tuning_D now masks within "
            "the adapters, and scores lora_A with 0 in a LoRA model that is not trained yet; train adapters with "
            "torch.optim.AdamW or in mode F, or merge them, by merge_and_unload() and requires_grad_(True), to mask "
            "the model's own weights, or pass maskable=, which takes adapters without this warning",
            stacklevel=4,  # of ChildNetwork's caller
        )
