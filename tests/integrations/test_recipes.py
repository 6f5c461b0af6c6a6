"""The recipes of docs/checkpoints.md: a run that resumes by them equals one that was not interrupted, bit for bit."""

import itertools
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import raw
from models import Block
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from childtune_fast import ChildAdamW, ChildNetwork

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
SCORES_SEED = 0
pytestmark = pytest.mark.filterwarnings("ignore:.*assuming the intent is to:UserWarning")


def recipes(heading):
    """The blocks of code under a heading of the page; what comes before the first heading is under ''."""
    sections = re.split(r"^## (.*)$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = dict(zip(["", *sections[1::2]], sections[::2], strict=True))
    return re.findall(r"^```python\n(.*?)^```", found[heading], flags=re.DOTALL | re.MULTILINE)


class Net(nn.Module):
    """Returns an output with a loss, as transformers' models do, and has buffers."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(Block(8) for _ in range(2))
            self.norm = nn.BatchNorm1d(8)

    def forward(self, x, labels):
        for layer in self.layers:
            x = self.norm(layer.mlp[2](layer.mlp[:2](layer.attention(x))))
        return SimpleNamespace(loss=nn.functional.cross_entropy(x, labels))


def batches(count):
    generator = torch.Generator().manual_seed(7)
    return [
        {"x": torch.randn(4, 8, generator=generator), "labels": torch.randint(0, 8, (4,), generator=generator)}
        for _ in range(count)
    ]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the recipes use; the child network's file is written, by the first recipe, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    model = Net()
    generator = torch.Generator().manual_seed(SCORES_SEED)
    scores = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    names = {
        **{"torch": torch, "os": os, "dcp": dcp, "get_state_dict": get_state_dict, "set_state_dict": set_state_dict},
        **{"ChildAdamW": ChildAdamW, "ChildNetwork": ChildNetwork, "model": model, "scores": scores},
    }
    (save_child,) = recipes("")
    exec(save_child, names)
    return names


def train(model, optimizer, data):
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def uninterrupted(count):
    model = Net()
    optimizer = ChildAdamW(model.parameters(), lr=2e-5, child=ChildNetwork.load("child.safetensors", model))
    train(model, optimizer, batches(count))
    return model


def assert_same_model(a, b):
    assert all(itertools.starmap(torch.equal, zip(map(raw, a.parameters()), map(raw, b.parameters()), strict=True)))
    assert all(itertools.starmap(torch.equal, zip(a.buffers(), b.buffers(), strict=True)))


@pytest.mark.parametrize("heading", ["A loop of your own", "torch.distributed.checkpoint"])
def test_in_a_loop(names, heading):
    save, resume = recipes(heading)
    names["optimizer"] = ChildAdamW(names["model"].parameters(), lr=2e-5, child=names["child"])
    train(names["model"], names["optimizer"], batches(6)[:3])
    exec(save, names)
    names["model"] = Net(seed=1)
    exec(resume, names)
    train(names["model"], names["optimizer"], batches(6)[3:])
    assert_same_model(names["model"], uninterrupted(6))


def test_in_accelerate(names):
    accelerate = pytest.importorskip("accelerate")
    (prepare,) = recipes("accelerate")
    start, resume = prepare.replace('accelerator.load_state("checkpoint")', ""), prepare
    for code, data in ((start, batches(6)[:3]), (resume, batches(6)[3:])):
        assert ("load_state" in code) == (code is resume)
        names.update(accelerator=accelerate.Accelerator(cpu=True), batches=[], model=Net(seed=int(code is resume)))
        exec(code, names)
        train(names["model"], names["optimizer"], data)
        names["accelerator"].save_state("checkpoint")
    assert_same_model(names["model"], uninterrupted(6))


# ---- Lightning -----------------------------------------------------------------------------------------------------

quiet = pytest.mark.filterwarnings("ignore")  # what Lightning and its dependencies warn of is theirs


def loader(data):
    return torch.utils.data.DataLoader(data, batch_size=None)


def trainer_of(lightning, epochs, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


@quiet
def test_in_lightning(names):
    lightning = pytest.importorskip("lightning")
    names["lightning"] = lightning
    (module,) = recipes("Lightning")
    exec(module, names)
    fit = "trainer.fit(module, batches, ckpt_path="
    assert fit in DOCS.read_text(encoding="utf-8")
    data, first = batches(3), names["Classifier"](Net())
    trainer = trainer_of(lightning, 1)
    trainer.fit(first, loader(data))
    trainer.save_checkpoint("last.ckpt")
    resumed = names["Classifier"](Net(seed=1))
    trainer_of(lightning, 2).fit(resumed, loader(data), ckpt_path="last.ckpt")
    whole = Net()
    optimizer = ChildAdamW(whole.parameters(), lr=2e-5, child=ChildNetwork.load("child.safetensors", whole))
    train(whole, optimizer, [*data, *data])
    assert_same_model(resumed.model, whole)


@quiet
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("options", [{"reserve_p": 1.0}, {"seed": 0}, {"child": "child.safetensors"}], ids=str)
def test_lightning_clips_in_every_precision(names, precision, options):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    norms = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Net()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            if "child" in options:
                return ChildAdamW(self.parameters(), child=ChildNetwork.load(options["child"], self.model))
            return ChildAdamW(self.parameters(), **options)

        def on_before_zero_grad(self, optimizer):
            norms.append(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    module = Module()
    before = [p.detach().clone() for p in module.parameters()]
    # Lightning itself takes bf16 for fp16 on a CPU, unless it is given the plug-in.
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    how = {} if precision == "32-true" else {"plugins": [MixedPrecision(precision, "cpu", scaler)]}
    trainer_of(lightning, 2, gradient_clip_val=0.01, **how).fit(module, loader(batches(3)))
    assert any(0.009 < norm < 0.0101 for norm in norms), norms
    assert any(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    optimizer = module.trainer.optimizers[0]
    assert {float(optimizer.state[p]["step"]) for p in module.parameters()} == {6.0}
