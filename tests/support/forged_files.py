"""Files with the right digest and any contents: made by safetensors alone, as releases up to 0.1.0 made all files."""

import json

import torch
from safetensors.torch import save_file
from tensor_kinds import DENSE, made
from torch import nn

from childtune_fast import ChildNetwork
from childtune_fast.child import files
from childtune_fast.ops.tensor_parts import copied, same_bits

KINDS = ("delta", "child network")


def write(path, kind, tensors, description):
    """Writes a file of the tensors and the description, a text or what JSON can hold."""
    text = description if isinstance(description, str) else json.dumps(description)
    save_file(tensors, path, files._metadata(kind, text, tensors))


class Model(nn.Module):
    """A masked parameter of three dtypes each, one that is trained in full, a frozen one, and odd buffers."""

    NAMES = ("a", "b", "c", "full", "frozen", "scalar", "coo", "csr", "channels", "whole")

    def __init__(self, tuned=False):
        super().__init__()
        on = 1.0 * tuned
        self.a = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.b = nn.Parameter(torch.arange(5.0).to(torch.bfloat16))
        self.c = nn.Parameter(torch.arange(1030.0, dtype=torch.float64))
        self.full = nn.Parameter(torch.arange(4.0) + on)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.register_buffer("scalar", torch.tensor(3 + tuned))
        self.register_buffer("coo", torch.eye(3).mul(2 + on).to_sparse())
        self.register_buffer("csr", made(torch.eye(3).mul(2 + on).to_sparse_csr))
        scales, zero_points = torch.tensor([0.5, 0.25 + on]), torch.tensor([0, 1])
        by_channel = made(lambda: torch.quantize_per_channel(DENSE, scales, zero_points, 0, torch.qint8))
        self.register_buffer("channels", by_channel)
        self.register_buffer("whole", made(lambda: torch.quantize_per_tensor(DENSE, 0.5 + on, 3, torch.qint8)))
        if tuned:
            with torch.no_grad():
                for name, mask in masks().items():
                    self.get_parameter(name)[mask] += 1


def masks():
    return {"a": torch.eye(3)[:2].bool(), "b": torch.arange(5) > 1, "c": torch.arange(1030) % 3 == 0}


def contents_of(path, kind):
    """Writes the file of one kind that turns Model() into Model(tuned=True); returns its tensors and description."""
    child = ChildNetwork.from_masks(Model(tuned=True), masks())
    if kind == "delta":
        child.save_delta(path, Model(tuned=True), Model())
    else:
        child.save(path)
    return files.read(path, kind)


def state_of(model):
    return {name: copied(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_state(model, state):
    now = dict([*model.named_parameters(), *model.named_buffers()])
    return now.keys() == state.keys() and all(same_bits(now[name], state[name]) for name in state)


def use(path, kind, model):
    """Reads a file as its kind is; returns the child network."""
    return ChildNetwork.apply_delta(path, model) if kind == "delta" else ChildNetwork.load(path, model)
