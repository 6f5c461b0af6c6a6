"""Child-Tuning_D in a model with adapters: one warning, unless they are asked for."""

import warnings

import pytest
import torch
from models import Tiny, child_of, family, random_scores
from torch import nn

from childtune_fast import ChildNetwork


class LoraLinear(nn.Module):
    """As loralib's: matrices that are parameters of the layer itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, inner.in_features))
        self.lora_B = nn.Parameter(torch.zeros(inner.out_features, 2))


class Tuned(nn.Module):
    """As PEFT's layers of other kinds: names that say nothing, and a list of them."""

    adapter_layer_names = ("scale",)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.scale = nn.ParameterDict({"default": torch.ones(inner.out_features)})


def adapted(layer):
    model = Tiny().requires_grad_(False)
    for block in model.blocks:
        block.attention = layer(block.attention)
    return model


def messages(make):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make()
    ours = [warning for warning in found if "ChildNetwork" in str(warning.message)]
    assert all(warning.category is UserWarning and warning.filename == __file__ for warning in ours)
    return [str(warning.message) for warning in ours]


CHOICES = {
    "from_scores": lambda model, **options: ChildNetwork.from_scores(model, random_scores(model), **options),
    "lowest": lambda model, **options: ChildNetwork.lowest(model, random_scores(model), **options),
    "random": lambda model, **options: ChildNetwork.random(model, seed=0, **options),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize(
    ("layer", "count", "first"), [(LoraLinear, 4, "attention.lora_A"), (Tuned, 2, "attention.scale.default")]
)
def test_adapters_are_warned_of_once_in_a_call(choose, layer, count, first):
    model = adapted(layer)
    (message,) = messages(lambda: choose(model, reserve_p=0.3))
    assert f"got adapters in {count} of {count} tensors, the first 'blocks.0.{first}'" in message
    assert "merge_and_unload() and requires_grad_(True)" in message
    assert messages(lambda: choose(model, reserve_p=0.3, maskable="lora_|scale")) == []


def test_a_model_without_adapters_is_not_warned_of():
    assert messages(lambda: child_of(Tiny())) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in transformers; PEFT reads it
def test_peft_and_its_merge():
    """The remedy works: a merged model is masked as any other."""
    peft = pytest.importorskip("peft")
    model = family("BERT", num_labels=3)[0]
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    tuned = peft.get_peft_model(model, config)
    (message,) = messages(lambda: CHOICES["random"](tuned, reserve_p=0.3))
    assert "got adapters in 8 of 8 tensors" in message
    merged = tuned.merge_and_unload().requires_grad_(True)
    assert messages(lambda: CHOICES["random"](merged, reserve_p=0.3)) == []
