"""docs/recipes/factories.md: each recipe gives the optimizer that one would make by hand."""

import pytest
from models import Tiny
from pages import run

from childtune_fast import ChildAdamW

PAGE = "recipes/factories.md"


def check(optimizer, model):
    assert type(optimizer) is ChildAdamW
    decays = {param: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, param in model.named_parameters():
        assert decays[param] == (0.0 if name.endswith("bias") else 0.01), name
    assert {(group["lr"], group["reserve_p"]) for group in optimizer.param_groups} == {(2e-5, 0.3)}


def test_timm():
    pytest.importorskip("timm.optim")
    model = Tiny()
    check(run(PAGE, "timm", model=model)["optimizer"], model)


@pytest.mark.filterwarnings("ignore")  # of what it imports
def test_pytorch_optimizer():
    pytest.importorskip("pytorch_optimizer")
    model = Tiny()
    check(run(PAGE, "pytorch_optimizer", model=model)["optimizer"], model)
