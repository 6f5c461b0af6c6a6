"""Models of transformers, in folders or on the Hub, loaded without running code that lies beside them."""

import copy
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


def class_of(config: PretrainedConfig, name: str | None = None) -> type[PreTrainedModel]:
    """Returns the class of transformers of a name, or of the one that a configuration has.

    Raises:
        ValueError: there is none of that name, or it is of other configurations.
    """
    name = str(name or (config.architectures or ["none"])[0])
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class):
        raise ValueError(f"the model must be of a class of transformers (got {name!r})")
    if not isinstance(config, kind.config_class):
        raise ValueError(f"a {name} must have a configuration of its own (got a {type(config).__name__})")
    return kind


def load_base(
    config: PretrainedConfig, dtype: torch.dtype, base: str, revision: str | None = None, token: str | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """Returns the base as a model of a fine-tuned one's class, and the names of its tensors that the base lacks.

    Raises:
        ValueError: the configuration names no class of transformers.
        OSError: there is no such base.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the head that the base lacks, which the delta holds
    try:
        loaded: Any = class_of(config).from_pretrained(
            base,
            config=copy.deepcopy(config),
            revision=revision or "main",
            token=token,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    model, found = loaded
    return model.to(dtype), {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])}


def load_tuned(name: str) -> PreTrainedModel:
    """Returns a saved model of the class that its configuration names."""
    return class_of(AutoConfig.from_pretrained(name, trust_remote_code=False)).from_pretrained(name)


def tokenizer_in(name: str) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer in a folder, or of a name on the Hub; None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
