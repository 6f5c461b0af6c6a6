"""The smallest model that a child network leaves room in: two layers, whose weights are masked and biases are not."""

import pickle

import torch
from helpers import same_bits
from torch import nn

from childtune_fast import ChildAdamW, ChildNetwork


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def child_of(model):
    return ChildNetwork.random(model, reserve_p=0.3, seed=0, maskable="weight")


def of_d(model, **options):
    return ChildAdamW(model.parameters(), **{"lr": 1e-2, "child": child_of(model), **options})


def with_child(backend="auto"):
    model = net()
    return model, of_d(model, backend=backend)


def adopted(backend="auto"):
    """The child network is a checkpoint's."""
    model = net()
    optimizer = ChildAdamW(model.parameters(), lr=1e-2, backend=backend)
    optimizer.load_state_dict(of_d(net()).state_dict())
    return model, optimizer


def unpickled(backend="auto"):
    return pickle.loads(pickle.dumps(with_child(backend)))


MADE = [with_child, adopted, unpickled]  # model and optimizer, and how it came by its child network


def go(model, optimizer, steps):
    """Takes the given steps, each with gradients of its own, whatever the optimizer; frozen parameters get none."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad if param.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()


def assign_groups(model, optimizer):
    """As Lightning's BaseFinetuning does when it resumes."""
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.param_groups = [{**options, "params": list(model.parameters())}]


def masks_of_net():
    return child_of(net()).masks()


def assert_outside_kept(model, before, masks=None):
    """Asserts that the weights outside the child network have the bits of `before`, and that others have moved."""
    for name, mask in (masks or masks_of_net()).items():
        now, then = model.get_parameter(name).detach(), before[name]
        assert same_bits(now[~mask], then[~mask]), f"weights of {name} outside the child network have moved"
        assert (now[mask] != then[mask]).all(), f"weights of {name} in the child network have not moved"


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach()), f"{name} differs"
