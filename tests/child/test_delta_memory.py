"""Deltas of models whose tensors have lost their memory, or that refuse to be written: nothing is written."""

import copy

import pytest
import torch
from models import Tiny, child_of
from torch import nn


@pytest.fixture
def tuned():
    """(child network, tuned model, base), of which the model has a sparse buffer."""
    base = Tiny()
    base.register_buffer("sparse", torch.eye(3).to_sparse())
    child, model = child_of(base), copy.deepcopy(base)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name not in child.packed:
                param.add_(1)
    model.sparse = 2 * model.sparse
    return child, model, base


def masked(model):
    return next(param for name, param in model.named_parameters() if name in child_of(model).packed)


TENSORS = {
    "masked": masked,
    "stored in full": lambda model: model.classifier.bias,
    "buffer": lambda model: model.steps,
    "part of a sparse one": lambda model: model.sparse._values(),
}


def freed(tensor):
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("of", ["model", "base"])
@pytest.mark.parametrize("find", TENSORS.values(), ids=TENSORS)
def test_a_delta_of_a_tensor_without_memory(find, of, tuned, tmp_path):
    child, model, base = tuned
    freed(find({"model": model, "base": base}[of]))
    with pytest.raises(ValueError, match=f"save_delta: the {of} must have memory for its values"):
        child.save_delta(tmp_path / "delta", model, base)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("find", TENSORS.values(), ids=TENSORS)
def test_a_delta_onto_a_tensor_without_memory(find, tuned, tmp_path):
    child, model, base = tuned
    child.save_delta(tmp_path / "delta", model, base)
    lost = find(base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items() if not tensor.is_sparse}
    freed(lost)
    with pytest.raises(ValueError, match="apply_delta: the base model must have memory for its values"):
        child.apply_delta(tmp_path / "delta", base)
    for name, tensor in base.state_dict().items():
        if not tensor.is_sparse and tensor.untyped_storage().nbytes():
            assert torch.equal(tensor, before[name])


class Unwilling(torch.Tensor):
    """Refuses to be written to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            raise RuntimeError("not this one")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_cannot_refuse_its_values_when_others_are_written(tuned, tmp_path):
    child, model, base = tuned
    child.save_delta(tmp_path / "delta", model, base)
    base.classifier.bias = nn.Parameter(base.classifier.bias.detach().as_subclass(Unwilling))
    with pytest.raises(RuntimeError, match="not this one"):
        base.classifier.bias.data.copy_(torch.zeros(()))
    child.apply_delta(tmp_path / "delta", base)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))
