"""ChildNetwork: exact choice, what is required of scores, lookup of masks, set operations, summary and plot."""

import copy
import gc
import math
import pickle

import pytest
import torch
from models import Tiny, child_of, random_scores
from torch import nn

from childtune_fast import ChildNetwork

WEIGHTS = 2 * (16 * 17 + 16 * 32 + 32 + 32 * 16 + 16)  # in the blocks of Tiny


def count(child):
    return sum(mask.count for mask in child.packed.values())


# ---- The choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve_p", [0.001, 0.1, 0.3, 1 / 3, 0.9999, 1, 1.0])
def test_exactly_the_share_of_the_maskable_weights(reserve_p):
    model = Tiny()
    for child in (child_of(model, reserve_p), ChildNetwork.random(model, reserve_p=reserve_p, seed=3)):
        assert count(child) == round(reserve_p * WEIGHTS)
        assert list(child.packed) == [name for name, _ in model.named_parameters() if name.startswith("blocks.")]


def test_the_highest_and_the_lowest_scores():
    model = Tiny()
    scores = random_scores(model)
    highest, lowest = (make(model, scores, reserve_p=0.5) for make in (ChildNetwork.from_scores, ChildNetwork.lowest))
    kept, others = zip(*((scores[n][mask], scores[n][~mask]) for n, mask in highest.masks().items()), strict=True)
    assert torch.cat(kept).min() > torch.cat(others).max()
    assert all(torch.equal(mask, ~lowest.masks()[name]) for name, mask in highest.masks().items())


def test_by_tensor_each_has_its_share():
    model = Tiny()
    child = child_of(model, scope="tensor")
    assert all(mask.count == round(0.3 * mask.numel) for mask in child.packed.values())
    assert count(ChildNetwork.random(model, reserve_p=0.3, seed=0, scope="tensor")) == count(child)


def test_random_is_a_function_of_its_seed_alone():
    model = Tiny()
    before = torch.get_rng_state()
    one = ChildNetwork.random(model, reserve_p=0.3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint == ChildNetwork.random(Tiny(seed=5), reserve_p=0.3, seed=1).fingerprint
    assert one.fingerprint != ChildNetwork.random(model, reserve_p=0.3, seed=2).fingerprint
    assert one.masks()["blocks.0.attention.bias"].int().tolist() == [1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0]


def test_given_masks_may_be_of_any_parameters():
    model = Tiny()
    masks = {"embedding.weight": torch.rand(10, 16) < 0.5, "classifier.bias": torch.tensor([True, False, True])}
    child = ChildNetwork.from_masks(model, masks)
    assert child.masks().keys() == masks.keys()
    assert all(torch.equal(child.masks()[name], mask) for name, mask in masks.items())


def test_head_only_has_no_weight_of_the_backbone():
    model = Tiny()
    model.embedding.requires_grad_(False)
    child = ChildNetwork.head_only(model)
    assert count(child) == 0
    assert list(child.packed) == [name for name, _ in model.named_parameters() if name.startswith("blocks.")]
    assert child.mask_of(model.classifier.weight) is None
    assert child.mask_of(model.blocks[0].attention.weight).count == 0


# ---- What is required ----------------------------------------------------------------------------------------------

WRONG_OPTIONS = {
    "reserve_p 0": ({"reserve_p": 0}, ValueError, r"must lie in \(0, 1\] \(got 0\)"),
    "reserve_p NaN": ({"reserve_p": math.nan}, ValueError, r"\(got nan\)"),
    "reserve_p above 1": ({"reserve_p": 1.01}, ValueError, r"\(got 1.01\)"),
    "reserve_p text": ({"reserve_p": "0.3"}, TypeError, r"\(got str\)"),
    "reserve_p bool": ({"reserve_p": True}, TypeError, r"\(got bool\)"),
    "reserve_p tiny": ({"reserve_p": 1e-6}, ValueError, "keeps none of the maskable weights; raise it"),
    "scope": ({"reserve_p": 0.3, "scope": "layer"}, ValueError, r"'global' or 'tensor' \(got 'layer'\)"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_options(options, error, message):
    model = Tiny()
    with pytest.raises(error, match=message):
        ChildNetwork.from_scores(model, random_scores(model), **options)
    with pytest.raises(error, match=message):
        ChildNetwork.random(model, seed=0, **options)


@pytest.mark.parametrize("seed", [None, 0.5, True, 1 << 64])
def test_wrong_seeds(seed):
    with pytest.raises((TypeError, ValueError), match="seed must"):
        ChildNetwork.random(Tiny(), reserve_p=0.3, seed=seed)


NAME = "blocks.1.attention.weight"
WRONG_SCORES = {
    "another shape": (torch.zeros(16, 15), ValueError, rf"\(got \(16, 15\) for '{NAME}' of shape \(16, 16\)\)"),
    "float64": (torch.zeros(16, 16).double(), TypeError, rf"got torch.float64 for '{NAME}'\); convert them"),
    "integers": (torch.zeros(16, 16, dtype=torch.int32), TypeError, "got torch.int32"),
    "no tensor": ([0.0], TypeError, "got list"),
    "NaN": (torch.full((16, 16), math.nan), ValueError, rf"must not be NaN \(got one or more for '{NAME}'\)"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_SCORES.values(), ids=WRONG_SCORES)
def test_wrong_scores(wrong, error, message):
    model = Tiny()
    with pytest.raises(error, match=message):
        ChildNetwork.from_scores(model, {**random_scores(model), NAME: wrong}, reserve_p=0.3)


def test_missing_and_unknown_scores():
    model = Tiny()
    scores = random_scores(model)
    with pytest.raises(ValueError, match=r"got 'layers.0', which model.named_parameters\(\) does not have"):
        ChildNetwork.from_scores(model, {**scores, "layers.0": torch.zeros(3)}, reserve_p=0.3)
    del scores[NAME], scores["embedding.weight"]
    with pytest.raises(ValueError, match=rf"got none for 1 of 12, the first '{NAME}'"):
        ChildNetwork.from_scores(model, scores, reserve_p=0.3)


@pytest.mark.parametrize(
    ("masks", "error"),
    [
        ({"weight": torch.ones(3, dtype=torch.bool)}, ValueError),
        ({"classifier.bias": torch.ones(4, dtype=torch.bool)}, ValueError),
        ({"classifier.bias": torch.ones(3)}, TypeError),
    ],
)
def test_wrong_masks(masks, error):
    with pytest.raises(error, match="from_masks: masks must"):
        ChildNetwork.from_masks(Tiny(), masks)


# ---- Lookup --------------------------------------------------------------------------------------------------------


def test_a_mask_is_found_by_identity_whatever_the_name():
    model = Tiny()
    child = child_of(model)
    for name, param in model.named_parameters():
        assert child.mask_of(param) is child.packed.get(name)
        assert child.mask_of(param, "another name") is child.packed.get(name)


def test_a_stranger_is_found_by_name():
    child, other = child_of(Tiny()), Tiny()
    weight = other.blocks[0].attention.weight
    assert child.mask_of(weight) is None
    assert child.mask_of(weight, "blocks.0.attention.weight") is child.packed["blocks.0.attention.weight"]
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp\.0\.weight' must have the shape"):
        child.mask_of(weight, "blocks.0.mlp.0.weight")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda child: pickle.loads(pickle.dumps(child))])
def test_copies_know_parameters_by_name_and_hold_none(copied):
    model = Tiny()
    child = child_of(model)
    copy_of_it = copied(child)
    assert copy_of_it.fingerprint == child.fingerprint
    with pytest.raises(ValueError, match="knows parameters by name only"):
        copy_of_it.mask_of(model.blocks[0].attention.weight)
    assert copy_of_it.mask_of(model.blocks[0].attention.weight, "blocks.0.attention.weight") is not None


def test_a_child_network_does_not_keep_the_model_alive():
    model = Tiny()
    child = child_of(model)
    del model
    gc.collect()
    assert not any(child.places.current().values())
    assert not child.places.names()
    assert child.places.parameters() == []


@pytest.mark.cuda
def test_masks_live_where_the_parameter_does():
    model = Tiny().cuda()
    child = child_of(model)
    mask = child.mask_of(model.blocks[0].attention.weight)
    assert mask.bits.is_cuda
    assert child.fingerprint == child_of(Tiny()).fingerprint
    assert child.mask_of(model.cpu().blocks[0].attention.weight).bits.is_cpu


# ---- Sets ----------------------------------------------------------------------------------------------------------


def test_set_operations():
    model = Tiny()
    a, b = (ChildNetwork.random(model, reserve_p=p, seed=seed) for p, seed in ((0.3, 1), (0.5, 2)))
    pairs = [(mask, b.masks()[name]) for name, mask in a.masks().items()]
    both = sum(int((x & y).sum()) for x, y in pairs)
    assert count(a.intersection(b)) == both
    assert all(torch.equal(mask, x | y) for mask, (x, y) in zip(a.union(b).masks().values(), pairs, strict=True))
    assert a.overlap(b) == b.overlap(a) == both / round(0.3 * WEIGHTS)
    assert a.overlap(a) == 1.0
    nothing = ChildNetwork.from_masks(model, {name: torch.zeros_like(mask) for name, mask in a.masks().items()})
    assert a.overlap(nothing) == 0.0


def test_child_networks_of_other_parameters_do_not_combine():
    model = Tiny()
    with pytest.raises(ValueError, match=r"got 'blocks.0.attention.weight' of shape \(16, 16\) and None"):
        child_of(model).union(child_of(model, maskable=r"^blocks\.1"))
    with pytest.raises(ValueError, match=r"of shape None and \(16, 16\)"):
        child_of(model, maskable=r"^blocks\.1").overlap(child_of(model))


def test_a_union_still_knows_the_parameters():
    model = Tiny()
    a, b = (ChildNetwork.random(model, reserve_p=0.3, seed=seed) for seed in (1, 2))
    assert a.union(b).mask_of(model.blocks[0].attention.weight) is not None


# ---- Report --------------------------------------------------------------------------------------------------------


def test_summary():
    model = Tiny()
    summary = child_of(model).summary()
    assert [row.name for row in summary.tensors] == [n for n, _ in model.named_parameters() if n.startswith("blocks")]
    assert [row.name for row in summary.kinds] == ["attention", "mlp.0", "mlp.2"]
    assert [row.numel for row in summary.kinds] == [2 * 16 * 17, 2 * 17 * 32, 2 * 33 * 16]
    assert sum(row.count for row in summary.kinds) == round(0.3 * WEIGHTS)
    assert summary.tensors[0].layer == "blocks.0"
    assert [row.name for row in summary.layers] == ["blocks.0", "blocks.1"]
    assert [row.count for row in summary.layers] == [
        sum(row.count for row in summary.tensors if row.layer == layer) for layer in ("blocks.0", "blocks.1")
    ]
    assert summary.total.count == round(0.3 * WEIGHTS)
    assert summary.total.density == round(0.3 * WEIGHTS) / WEIGHTS
    assert summary.tensors[0].density == summary.tensors[0].count / 256
    lines = str(summary).splitlines()
    assert len(lines) == 5
    assert lines[-1].split() == [
        "all",
        str(round(0.3 * WEIGHTS)),
        f"{WEIGHTS:,}",
        f"{round(0.3 * WEIGHTS) / WEIGHTS:.2%}",
    ]


def test_summary_of_parameters_outside_of_blocks():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    masks = {name: torch.ones_like(param, dtype=torch.bool) for name, param in model.named_parameters()}
    child = ChildNetwork.from_masks(model, masks)
    assert [(row.kind, row.layer) for row in child.summary().tensors] == [("0", ""), ("0", ""), ("1", "")]


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    child = child_of(Tiny())
    ax = child.plot()
    try:
        density = ax.images[0].get_array()
        assert density.shape == (3, 2)
        row = [row for row in child.summary().tensors if row.layer == "blocks.1" and row.kind == "attention"]
        assert density[0, 1] == pytest.approx(sum(r.count for r in row) / sum(r.numel for r in row))
        assert [label.get_text() for label in ax.get_yticklabels()] == ["attention", "mlp.0", "mlp.2"]
        assert child.plot(ax) is ax
    finally:
        pyplot.close(ax.figure)
