"""Under torch.set_default_device, what is meant for the CPU is made there all the same; "meta" stands for a GPU."""

import ast
import copy

import pytest
import torch
from helpers import assert_same_run, both_backends, make_params, set_grads, train

from childtune_fast import ChildAdamW, ChildNetwork, estimate_fisher
from childtune_fast.native import build


def model():
    made = torch.nn.Module()
    for i, param in enumerate(make_params(((40, 30), (2, 3)))):
        made.register_parameter(f"p{i}", param)
    return made


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def optimizer_of_f(made, backend):
    views = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), device="cpu")
    interleaved = [torch.nn.Parameter(views[:, 0]), torch.nn.Parameter(views[:, 1])]  # a check looks closer at those
    return ChildAdamW([*made.parameters(), *interleaved], seed=7, max_grad_norm=1.0, backend=backend)


def optimizer_of_d(made, backend):
    options = {"loss_fn": lambda of, batch: (of.p0.square() * batch).sum(), "progress": False}
    scores = estimate_fisher(made, [torch.full((40, 30), 0.5, device="cpu")], names="p0", **options)
    child = ChildNetwork.from_scores(made, scores, reserve_p=0.3, maskable="p0")
    head = ChildNetwork.head_only(made, head="p1")
    assert head.packed["p0"].count == 0
    return ChildAdamW(made.parameters(), child=child, backend=backend)


@both_backends
@pytest.mark.parametrize("make", [optimizer_of_f, optimizer_of_d])
def test_another_default_device_changes_nothing(make, backend, monkeypatch):
    monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
    runs = [make(model(), backend)]
    train(runs[0], range(3))
    made = model()
    torch.set_default_device("meta")
    try:
        runs.append(make(made, backend))
        for step in range(3):
            with torch.device("cpu"):
                set_grads(params_of(runs[1]), step)
            runs[1].step()
            runs[1].load_state_dict(copy.deepcopy(runs[1].state_dict()))
    finally:
        torch.set_default_device(None)
    assert_same_run(*runs)


MAKERS = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
}
MAKERS |= {"randn", "randperm", "scalar_tensor", "sparse_coo_tensor", "sparse_compressed_tensor", "tensor", "zeros"}


def test_whatever_the_package_makes_has_a_device():
    left_out = []
    for path in build.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            if made and made.attr in MAKERS and getattr(made.value, "id", "") == "torch":
                given = {keyword.arg for keyword in node.keywords}
                left_out += [] if "device" in given else [f"{path.name}:{node.lineno}"]
    assert left_out == []
