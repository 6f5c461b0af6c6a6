"""What fine-tuning did: how many weights moved and how far, and that nothing moved outside of the child network."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from childtune_fast import ChildAdamW, ChildNetwork, estimate_fisher, spectra


def analyzed(model, **options):
    return spectra.analyze(model, progress=False, **options)


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(
        BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=16, num_labels=9)
    )


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(64, (8, 16), generator=generator)
        yield {"input_ids": tokens, "labels": tokens[:, 0] % 9}


def train(model, optimizer, count=4):
    for batch in batches(count):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def d_run():
    """A base, a model that was trained from it by D, and the child network."""
    base = bert().eval()
    model = copy.deepcopy(base)
    scores = estimate_fisher(model, batches(), progress=False)
    child = ChildNetwork.from_scores(model, scores, reserve_p=0.3, scope="tensor")
    return base, train(model, ChildAdamW(model.parameters(), lr=1e-3, child=child)), child


def test_d_moves_the_child_network_and_nothing_else(d_run):
    base, tuned, child = d_run
    after = analyzed(tuned, base=base, child=child)
    after.check()
    masked = {name.removesuffix(".weight"): mask for name, mask in child.packed.items()}
    rows = {row.longname: row for row in after}
    assert len(rows.keys() & masked.keys()) == 12
    for name, row in rows.items():
        if name in masked:
            assert row.moved == masked[name].count  # every weight of it had a gradient
            assert row.child_density == row.moved / row.numel
            assert 0 < row.child_density < 1
        else:
            assert row.child_density is None
    assert set(after.outside) == set(child.packed)  # biases too, which are no layers
    assert rows["classifier"].moved == 9 * 32


def test_update_norms_are_those_of_the_difference(d_run):
    base, tuned, _ = d_run
    for row in analyzed(tuned, base=base):
        before, now = (m.get_submodule(row.longname).weight.detach().double() for m in (base, tuned))
        values = torch.linalg.svdvals(now - before)
        assert row.moved == int((now != before).sum())
        assert row.delta_norm == pytest.approx(float((now - before).norm()), rel=1e-9)
        assert row.delta_rel == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-9)
        assert row.delta_stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-9)
        assert row.flag == ""  # no label of quality


def test_a_weight_that_moved_outside_is_told(d_run):
    base, tuned, child = d_run
    name = next(iter(child.packed))
    outside = (~child.packed[name].unpack()).nonzero()[:2]
    changed = copy.deepcopy(tuned)
    with torch.no_grad():
        for place in outside:
            changed.get_parameter(name)[tuple(place)] += 1e-3
    after = analyzed(changed, base=base, child=child)
    assert {n: count for n, count in after.outside.items() if count} == {name: 2}
    with pytest.raises(ValueError, match=rf"^Spectra.check: outside of .* \(got '{name}': 2\); likely causes"):
        after.check()


def test_a_bias_that_moved_outside_is_told(d_run):
    base, tuned, child = d_run
    name = next(name for name, mask in child.packed.items() if len(mask.shape) == 1)
    place = (~child.packed[name].unpack()).nonzero()[0]
    changed = copy.deepcopy(tuned)
    with torch.no_grad():
        changed.get_parameter(name)[place] = -0.5
    with pytest.raises(ValueError, match=f"'{name}': 1"):
        analyzed(changed, base=base, child=child).check()


def test_many_moved_parameters_are_named_in_part(d_run):
    base, tuned, child = d_run
    changed = copy.deepcopy(tuned)
    with torch.no_grad():
        for param in changed.parameters():
            param.add_(1e-3)
    with pytest.raises(ValueError, match=rf" and {len(child.packed) - 5} more\)"):
        analyzed(changed, base=base, child=child).check()


def test_a_check_needs_base_and_child(d_run):
    base, tuned, child = d_run
    for options in ({}, {"base": base}, {"child": child}):
        with pytest.raises(ValueError, match=r"^Spectra.check: analyze must have been given base= and child="):
            analyzed(tuned, **options).check()


def test_f_moves_what_its_masks_say():
    base = bert().eval()
    model = copy.deepcopy(base)
    train(model, ChildAdamW(model.parameters(), lr=1e-3, weight_decay=0.0, reserve_p=0.3, seed=3), 1)
    rows = [row for row in analyzed(model, base=base) if row.layer_type == "dense"]
    share = sum(row.moved for row in rows) / sum(row.numel for row in rows)
    assert share == pytest.approx(0.3, abs=0.02)


def test_an_unchanged_layer_has_no_update():
    layer = nn.Linear(32, 32)
    (row,) = analyzed(layer, base=copy.deepcopy(layer))
    assert (row.moved, row.delta_norm, row.delta_rel) == (0, 0.0, 0.0)
    assert math.isnan(row.delta_stable_rank)


def test_moved_is_counted_by_bits():
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight[0, :2] = torch.tensor([0.0, math.nan])
    base = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight[0, 0] = -0.0
    (row,) = analyzed(layer, base=base)
    assert row.moved == 1  # the NaN is the same
    assert row.status == "not finite"
    assert math.isnan(row.delta_norm)


def test_a_zero_base_has_no_relative_norm():
    layer = nn.Linear(32, 32)
    base = copy.deepcopy(layer)
    nn.init.zeros_(base.weight)
    (row,) = analyzed(layer, base=base)
    assert math.isnan(row.delta_rel)
    assert row.moved == 32 * 32


@pytest.mark.parametrize("form", ["module", "state dict", "encoder alone", "half precision", "file"])
def test_the_base_may_be_in_any_form(d_run, form, tmp_path):
    base, tuned, _ = d_run
    expected = {row.longname: row for row in analyzed(tuned, base=base)}
    if form == "file":
        base.save_pretrained(tmp_path)
    forms = {
        "module": base,
        "state dict": {name: tensor.clone() for name, tensor in base.state_dict().items()},
        "encoder alone": base.bert,
        "half precision": copy.deepcopy(base).double(),
        "file": tmp_path,
    }
    found = {row.longname: row for row in analyzed(tuned, base=forms[form])}
    if form == "encoder alone":  # whose names lack "bert."
        assert found["classifier"].moved is None
        del found["classifier"], expected["classifier"]
    assert found == expected


def test_a_base_with_a_prefix_of_its_own_is_matched(d_run):
    base, tuned, _ = d_run
    expected = {row.longname: row.moved for row in analyzed(tuned.bert, base=base.bert)}
    assert {row.longname: row.moved for row in analyzed(tuned.bert, base=base)} == expected
    assert all(moved for moved in expected.values())


def test_a_layer_that_was_resized_has_no_update(d_run):
    base, tuned, _ = d_run
    wider = copy.deepcopy(tuned)
    wider.bert.embeddings.word_embeddings = nn.Embedding(72, 32)
    rows = {row.longname: row for row in analyzed(wider, base=base)}
    assert rows["bert.embeddings.word_embeddings"].moved is None
    assert rows["bert.encoder.layer.0.output.dense"].moved


def test_split_and_pooled_layers_have_updates_and_densities_of_their_own():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(16, 24, 3), nn.MultiheadAttention(32, 2))
    model = copy.deepcopy(base)
    masks = {"0.weight": torch.zeros(24, 16, 3, 3, dtype=torch.bool), "1.in_proj_weight": torch.zeros(96, 32).bool()}
    masks["0.weight"][:12] = True
    masks["1.in_proj_weight"][32:40] = True  # of the keys
    child = ChildNetwork.from_masks(model, masks)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).add_(mask * 0.5)
    after = analyzed(model, base=base, child=child)
    after.check()
    rows = {row.longname: row for row in after}
    assert {name: (row.moved, row.child_density) for name, row in rows.items()} == {
        "0": (24 * 16 * 9 // 2, 0.5),
        "1.in_proj.q": (0, 0.0),
        "1.in_proj.k": (8 * 32, 0.25),
        "1.in_proj.v": (0, 0.0),
        "1.out_proj": (0, None),
    }
    assert rows["0"].delta_norm == pytest.approx(0.5 * math.sqrt(24 * 16 * 9 / 2), rel=1e-6)


def test_a_child_network_of_another_model_is_refused(d_run):
    child = d_run[2]
    with pytest.raises(ValueError, match=r"^analyze: child must be of the same model: .* \(got no such parameter\)"):
        analyzed(nn.Sequential(nn.Linear(32, 32)), child=child)
    model, other = nn.Linear(32, 32), nn.Linear(32, 40)
    wide = ChildNetwork.from_masks(other, {"weight": torch.ones(40, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'weight', \(40, 32\) \(got shape \(32, 32\)\)"):
        analyzed(model, child=wide)
    narrow = ChildNetwork.from_masks(model, {"weight": torch.ones(32, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"^analyze: base must have 'weight', .* in shape \(32, 32\)"):
        analyzed(model, base=other, child=narrow)


def test_an_update_of_low_rank_and_a_null_need_no_singular_values(monkeypatch):
    """A merged adapter adds a matrix of low rank to each layer; singular values of each would take minutes."""
    torch.manual_seed(0)
    base, model = nn.Linear(64, 64).double(), nn.Linear(64, 64).double()
    low = torch.randn(64, 2, dtype=torch.float64) @ torch.randn(2, 64, dtype=torch.float64)
    model.weight = nn.Parameter(base.weight.detach() + low)
    values = torch.linalg.svdvals(low)
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    (row,) = analyzed(model, base=base, null=1)
    assert row.delta_norm == pytest.approx(float(low.norm()), rel=1e-9)
    assert row.delta_stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-9)
