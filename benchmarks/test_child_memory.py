"""Measures what a child network saves: memory of the optimizer's state, and size of a fine-tuned model's file."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Parameter, ParameterList

from childtune_fast import ChildAdamW, ChildNetwork

from .contestants import HYPER, make_parameters, random_child
from .costs import held_bytes, mask_tensors, state_tensors
from .workloads import LARGE, make_workload


@dataclass
class Trained:
    """A model one step after its base, with the child network and the optimizer of that step."""

    base: ParameterList
    model: ParameterList
    child: ChildNetwork
    optimizer: ChildAdamW

    @property
    def weights(self) -> int:
        """The number of weights in the model."""
        return sum(param.numel() for param in self.model)


@pytest.fixture(scope="module")
def trained():
    work = make_workload(LARGE, torch.float32)
    base = ParameterList([param.clone() for param in work.params])
    params = make_parameters(work, work.grads)
    child = random_child(params, 0.3)
    optimizer = ChildAdamW(params, **HYPER, child=child)
    optimizer.step()
    return Trained(base, ParameterList(params), child, optimizer)


def test_child_state(benchmark, trained):
    benchmark.pedantic(trained.optimizer.step, rounds=1)
    dense = _dense(trained)
    states = {"child": trained.optimizer, "dense": dense}
    benchmark.extra_info.update(
        weights=trained.weights,
        state_bytes={name: held_bytes(state_tensors(optimizer)) for name, optimizer in states.items()},
        mask_bytes=held_bytes(mask_tensors(trained.optimizer.child_masks.values())),
    )


def test_delta_file(benchmark, trained, tmp_path):
    delta, safetensors, pickled = (tmp_path / name for name in ("delta.safetensors", "full.safetensors", "full.pt"))
    model, base = trained.model, trained.base
    try:
        benchmark.pedantic(trained.child.save_delta, args=(delta, model, base), rounds=1)
        save_file(model.state_dict(), safetensors)
        torch.save(model.state_dict(), pickled)
        sizes = {path.name: path.stat().st_size for path in (delta, safetensors, pickled)}
        ChildNetwork.apply_delta(delta, base)
    finally:
        for path in (delta, safetensors, pickled):
            path.unlink(missing_ok=True)  # pytest would keep the large files for days
    assert all(map(torch.equal, base, model))
    full = min(sizes["full.safetensors"], sizes["full.pt"])
    benchmark.extra_info.update(weights=trained.weights, file_bytes=sizes, ratio=sizes["delta.safetensors"] / full)


def _dense(trained):
    """Returns a torch.optim.AdamW after a step on a copy of the base."""
    params = [Parameter(param.detach().clone()) for param in trained.base]
    for param, of_child in zip(params, trained.model, strict=True):
        param.grad = of_child.grad
    optimizer = torch.optim.AdamW(params, **HYPER, fused=True)
    optimizer.step()
    return optimizer
