"""What is maskable by default, in every family of transformers; selectors; heads; the errors that list candidates."""

import re

import pytest
import torch
from models import FAMILIES, Block, Tiny, family
from torch import nn

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.child.maskable import block_lists, head_parameters, maskable_parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_the_repeated_blocks_of_every_family_and_nothing_else(name):
    model, blocks = family(name)
    assert block_lists(model) == blocks
    inside = {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{block}." for block in blocks))}
    assert maskable_parameters(model).keys() == inside
    outside = model.state_dict().keys() - inside
    assert any("emb" in n or "wte" in n or "shared" in n for n in outside)
    assert any(n.endswith("bias") or "norm" in n for n in inside)  # norms and biases inside blocks are maskable


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name][1] == "SequenceClassification"])
def test_the_head_of_every_classifier(name):
    model, _ = family(name)
    found = head_parameters(model)
    assert found
    base = {id(param) for param in model.base_model.parameters()}
    assert not any(id(param) in base for param in found.values())
    assert any(param.shape[0] == model.config.num_labels for param in found.values())


def test_tied_parameters_count_once():
    model, _ = family("GPT-2")
    assert model.lm_head.weight is model.transformer.wte.weight
    params = maskable_parameters(model, lambda name: True)
    assert len({id(param) for param in params.values()}) == len(params)


def test_frozen_parameters_are_left_out():
    model = Tiny()
    model.blocks[0].attention.weight.requires_grad_(False)
    assert "blocks.0.attention.weight" not in maskable_parameters(model)
    assert "blocks.0.attention.bias" in maskable_parameters(model)
    assert "blocks.0.attention.weight" not in maskable_parameters(model, "attention")


@pytest.mark.parametrize("selector", ["attention", re.compile("att.*tion"), lambda name: "attention" in name])
def test_selectors(selector):
    assert list(maskable_parameters(Tiny(), selector)) == [
        f"blocks.{i}.attention.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    ]


def test_a_selector_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"maskable must be a predicate .* \(got list\)"):
        maskable_parameters(Tiny(), ["blocks"])


def test_a_selector_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ValueError, match=r"got 'layer', which matches none of the 15\).* 'blocks' \(\d\d\.\d%\)"):
        maskable_parameters(Tiny(), "layer")


OTHER = nn.TransformerEncoderLayer(4, 2, 8)
STRUCTURES = {
    "one block": (lambda: Tiny(blocks=1), ["blocks"]),
    "a Sequential of blocks": (lambda: nn.Sequential(nn.Sequential(Block(4), Block(4)), nn.Linear(4, 2)), ["0"]),
    "backbone and head in a Sequential": (lambda: nn.Sequential(Tiny(), nn.Sequential(nn.Linear(4, 2))), ["0.blocks"]),
    "two whole models": (lambda: nn.ModuleDict({"m": nn.ModuleList([Tiny(), Tiny()])}), ["m.0.blocks", "m.1.blocks"]),
    "a Sequential of leaves": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), []),
    "blocks of two classes": (lambda: nn.ModuleDict({"l": nn.ModuleList([Block(4), OTHER, Block(4)])}), ["l"]),
}


@pytest.mark.parametrize(("make", "blocks"), STRUCTURES.values(), ids=STRUCTURES)
def test_structures(make, blocks):
    assert block_lists(make()) == blocks


def test_no_blocks_is_an_error_that_lists_candidates():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match=r"\(got 0.0%, from no such list\).* '0' \(55.6%\), '2' \(44.4%\)"):
        maskable_parameters(model)


def test_blocks_under_a_tenth_are_an_error():
    model = Tiny()
    model.embedding = nn.Embedding(10_000, 16)
    with pytest.raises(ValueError, match=r"at least 10% .* \(got 1\.\d%, from \['blocks'\]\).*'embedding' \(98"):
        maskable_parameters(model)
    assert len(maskable_parameters(model, r"^blocks\.")) == 12  # asked for by name, a small share is fine


def test_the_head_by_common_names_is_outside_the_blocks():
    model = Tiny()
    model.blocks[0].fc = nn.Linear(16, 16)
    assert list(head_parameters(model)) == ["classifier.weight", "classifier.bias"]
    assert list(head_parameters(model, "bias")) == [n for n, _ in model.named_parameters() if "bias" in n]


@pytest.mark.parametrize("head", [None, "nothing", lambda name: True])
def test_no_head_or_nothing_else_is_an_error(head):
    model = Tiny()
    if head is None:
        del model.classifier
    with pytest.raises(ValueError, match=r"a head must be found beside other parameters \(got \d+ of the 1"):
        head_parameters(model, head)


def test_heads_that_are_lists_of_perceptrons_are_no_blocks():
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
            self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(3))
            self.outputs = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(3))

    assert block_lists(Tasks()) == ["blocks"]


def frozen(*parts):
    model = Tiny()
    for part in parts:
        getattr(model, part).requires_grad_(False)
    return model


@pytest.mark.parametrize("parts", [("blocks",), ("embedding", "blocks")])
def test_frozen_blocks_are_an_error_with_remedies_that_work(parts):
    model = frozen(*parts)
    blocks = sum(param.numel() for param in model.blocks.parameters())
    with pytest.raises(
        ValueError, match=rf"blocks \['blocks'\], which must not be frozen \(got {blocks:,} of their "
    ) as got:
        maskable_parameters(model)
    assert re.search(r"; unfreeze them .*, or pass maskable=.*, or train the head .*head_only$", str(got.value))
    child = ChildNetwork.head_only(model)
    assert list(child.packed) == [name for name in ("embedding.weight",) if "embedding" not in parts]
    optimizer = ChildAdamW(model.parameters(), lr=0.1, child=child)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    (model.embedding.weight.sum() + model.classifier.weight.sum()).backward()
    optimizer.step()
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == ["classifier.weight"]
    assert len(maskable_parameters(model, "classifier")) == 2
    model.requires_grad_(True)
    assert len(maskable_parameters(model)) == 12


def test_frozen_blocks_without_a_remedy_that_would_be_refused():
    with pytest.raises(ValueError, match=r"unfreeze them with requires_grad_\(True\)$"):
        maskable_parameters(Tiny().requires_grad_(False))
    with pytest.raises(ValueError, match="from no such list"):
        maskable_parameters(nn.Linear(4, 4).requires_grad_(False))
    with pytest.raises(ValueError, match=r"among the trainable weights$"):
        maskable_parameters(frozen("blocks", "classifier"))


def test_one_trained_block_among_frozen_ones():
    model = frozen("embedding")
    model.blocks[0].requires_grad_(False)
    assert all(name.startswith("blocks.1.") for name in maskable_parameters(model))
    model.embedding = nn.Embedding(1500, 16)  # 2 blocks would hold a tenth, one does not
    with pytest.raises(ValueError, match="must not be frozen"):
        maskable_parameters(model)
    model.embedding = nn.Embedding(10_000, 16)  # 2 blocks would not
    with pytest.raises(ValueError, match="must hold at least 10%"):
        maskable_parameters(model)
    model.embedding.requires_grad_(False)
    model.blocks.requires_grad_(False)  # beside the head that is trained, they would
    with pytest.raises(ValueError, match="must not be frozen"):
        maskable_parameters(model)
