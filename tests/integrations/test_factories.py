"""docs/recipes/factories.md: each recipe gives the optimizer that one would make by hand."""

import re
from pathlib import Path

import pytest
from models import Tiny

from childtune_fast import ChildAdamW

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "factories.md"


def run(heading, **names):
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    exec(re.search(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)[1], names)
    return names["optimizer"]


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
    check(run("timm", model=model), model)


@pytest.mark.filterwarnings("ignore")  # of what it imports
def test_pytorch_optimizer():
    pytest.importorskip("pytorch_optimizer")
    model = Tiny()
    check(run("pytorch_optimizer", model=model), model)
