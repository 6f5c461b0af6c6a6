"""TaskVector: what fine-tuning changed, scaled, added and applied; and what two child networks do not share."""

import copy

import pytest
import torch
from models import Tiny, child_of
from torch import nn

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.child import TaskVector


def trained(base, seed, steps=3):
    """A model that D has trained, and its child network."""
    model = copy.deepcopy(base)
    child = ChildNetwork.random(model, reserve_p=0.3, seed=seed)
    optimizer = ChildAdamW(model.parameters(), lr=1e-2, child=child)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=random)
        optimizer.step()
    return model, child


def differences(model, base):
    return {n: p.double() - q.double() for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True)}


def check_close(model, base, expected):
    """A model is the base and these differences, up to the rounding of both."""
    for name, found in differences(model, base).items():
        assert torch.allclose(found, expected[name], rtol=0, atol=1e-6), name


def test_it_holds_what_changed():
    base = Tiny()
    model, child = trained(base, 1)
    vector = TaskVector.between(model, base)
    total = child.summary().total
    free = sum(p.numel() for p in base.parameters()) - total.numel
    assert vector.count == pytest.approx(total.count + free, abs=3)  # a weight may be moved by nothing
    for name, mask in child.masks().items():
        assert not (vector.changes[name].mask.unpack() & ~mask).any()
        assert torch.equal(vector.changes[name].dense(), differences(model, base)[name].float())
    squares = sum(d.square().sum().item() for d in differences(model, base).values())
    assert vector.norm() == pytest.approx(squares**0.5, rel=1e-6)
    assert repr(vector) == f"TaskVector({vector.count:,} weights in {len(vector.changes)} tensors)"


def test_it_turns_the_base_into_the_model():
    base = Tiny()
    model, _ = trained(base, 1)
    again = copy.deepcopy(base)
    TaskVector.between(model, base).apply(again)
    check_close(again, base, differences(model, base))


def test_arithmetic():
    base = Tiny()
    (a, _), (b, _) = trained(base, 1), trained(base, 2)
    va, vb = TaskVector.between(a, base), TaskVector.between(b, base)
    da, db = differences(a, base), differences(b, base)
    cases = {
        0.5: (0.5 * va, {n: 0.5 * d for n, d in da.items()}),
        "sum": (va + vb, {n: da[n] + db[n] for n in da}),
        "mean": (sum([va, vb]) / 2, {n: (da[n] + db[n]) / 2 for n in da}),
        "difference": (va - vb, {n: da[n] - db[n] for n in da}),
        "forgotten": (-va * 0.3, {n: -0.3 * d for n, d in da.items()}),
    }
    for vector, expected in cases.values():
        model = copy.deepcopy(base)
        vector.apply(model)
        check_close(model, base, expected)
    assert (va - va).count == 0
    assert (va + vb).count > max(va.count, vb.count)


def test_angles():
    base = Tiny()
    (a, _), (b, _) = trained(base, 1), trained(base, 2)
    va, vb = TaskVector.between(a, base), TaskVector.between(b, base)
    flat = [torch.cat([d.flatten() for d in differences(model, base).values()]) for model in (a, b)]
    assert va.cosine(vb) == pytest.approx(torch.cosine_similarity(*flat, dim=0).item(), abs=1e-6)
    assert va.cosine(2 * va) == pytest.approx(1)
    assert va.cosine(-va) == pytest.approx(-1)
    with pytest.raises(ValueError, match="neither vector may be 0"):
        va.cosine(va - va)


def test_of_delta_files(tmp_path):
    base, vectors = Tiny(), []
    before = copy.deepcopy(base.state_dict())
    for seed in (1, 2):
        model, child = trained(base, seed)
        child.save_delta(tmp_path / f"{seed}.safetensors", model, base)
        vectors.append(TaskVector.from_delta(tmp_path / f"{seed}.safetensors", base))
        expected = TaskVector.between(model, base)
        assert vectors[-1].changes.keys() == expected.changes.keys()
        for name, change in expected.changes.items():
            assert torch.equal(vectors[-1].changes[name].dense(), change.dense())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    sum(vectors).apply(base)
    with pytest.raises(ValueError, match="is for another base"):
        TaskVector.from_delta(tmp_path / "1.safetensors", base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype):
    base = Tiny().to(dtype)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.25)
    half = copy.deepcopy(base)
    (TaskVector.between(model, base) * 0.5).apply(half)
    for now, old, new in zip(half.parameters(), base.parameters(), model.parameters(), strict=True):
        by = (0.5 * (new.double() - old.double()).float()).to(torch.promote_types(dtype, torch.float32))
        assert torch.equal(now, (old.to(by.dtype) + by).to(dtype))


def test_a_new_head_is_left_out():
    base = Tiny()
    model = copy.deepcopy(base)
    model.classifier = nn.Linear(16, 5)
    with torch.no_grad():
        model.embedding.weight.add_(1)
    vector = TaskVector.between(model, base)
    assert vector.left_out == ("classifier.weight", "classifier.bias")
    assert list(vector.changes) == ["embedding.weight"]
    assert repr(vector).endswith("2 left out)")
    assert (2 * vector + vector).left_out == vector.left_out


def test_deltas_of_models_with_other_heads(tmp_path):
    base = Tiny()
    model, child = trained(base, 1)
    model.classifier = nn.Linear(16, 5)
    child.save_delta(tmp_path / "d.safetensors", model, base)
    for without, head in ((None, nn.Linear(16, 3)), (None, nn.Identity()), ("classifier", nn.Linear(16, 5))):
        other = copy.deepcopy(base)
        other.classifier = head
        vector = TaskVector.from_delta(tmp_path / "d.safetensors", other, without=without)
        assert sorted(vector.left_out) == ["classifier.bias", "classifier.weight"]
        assert not any(name.startswith("classifier") for name in vector.changes)
        vector.apply(other)
        for name, param in other.named_parameters():
            if not name.startswith("classifier"):
                assert torch.allclose(param, model.get_parameter(name), rtol=0, atol=1e-6), name
    other.blocks[0].attention.weight.data[child.masks()["blocks.0.attention.weight"].logical_not()] += 1
    with pytest.raises(ValueError, match=r"is for another base: 'blocks.0.attention.weight'"):
        TaskVector.from_delta(tmp_path / "d.safetensors", other)


def test_a_base_in_the_models_memory():
    model = Tiny()
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"must have memory of its own for what was trained \(got 'embedding.weight'"):
        TaskVector.between(model, before)
    with pytest.raises(ValueError, match="must have memory of its own"):
        TaskVector.between(model, model)


def test_values_that_are_not_finite():
    base = Tiny()
    with torch.no_grad():
        base.classifier.bias.copy_(torch.tensor([float("inf"), float("nan"), 1.0]))
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.classifier.bias[2] = 3
    vector = TaskVector.between(model, base)
    assert vector.count == 1
    assert vector.norm() == 2
    with torch.no_grad():
        model.classifier.bias[0] = 0
    with pytest.raises(ValueError, match=r"differences must be finite in float32 \(got others in 'classifier.bias'\)"):
        TaskVector.between(model, base)
    assert TaskVector.between(model, base, without="classifier").left_out == ("classifier.weight", "classifier.bias")


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.head.load_state_dict(self.body.state_dict())
        if tie:
            self.head.weight = self.body.weight


def test_tied_weights():
    base, model = Tied(tie=True), Tied(tie=False)
    with torch.no_grad():
        model.body.weight.copy_(base.body.weight + 1)
        model.head.weight.copy_(base.body.weight + 2)
    vector = TaskVector.between(model, base)
    assert (list(vector.changes), vector.left_out) == (["body.weight", "head.weight"], ())
    with pytest.raises(ValueError, match=r"each parameter must have one change \(got 'body.weight' and 'head.weight'"):
        vector.apply(base)
    TaskVector.between(model, base, without="head").apply(base)
    assert torch.allclose(base.head.weight, model.body.weight)


def test_models_that_have_no_values():
    base = Tiny()
    vector = TaskVector.between(trained(base, 1)[0], base)
    with pytest.raises(ValueError, match=r"must have a whole 'embedding.weight' .*, with values \(got meta"):
        vector.apply(copy.deepcopy(base).to("meta"))
    with pytest.raises(ValueError, match=r"must be whole dense tensors with values \(got 'embedding.weight', meta"):
        TaskVector.between(copy.deepcopy(base).to("meta"), base)


def test_a_vector_of_nothing():
    base = Tiny()
    vector = TaskVector.between(trained(base, 1)[0], base)
    assert (0 * vector).count == (1e-60 * vector).count == 0
    assert sum([]) == 0


def test_wrappers_and_state_dicts():
    base = Tiny()
    model, _ = trained(base, 1)
    expected = TaskVector.between(model, base).changes
    wrapped = nn.DataParallel(copy.deepcopy(model))
    found = TaskVector.between(wrapped, base.state_dict())
    assert len(found.changes) == len(expected)
    found.apply(base)
    check_close(base, Tiny(), differences(model, Tiny()))


def test_errors():
    base = Tiny()
    vector = TaskVector.between(trained(base, 1)[0], base)
    with pytest.raises(ValueError, match=r"the base must have parameters of the model's names .*\(got none of 2\)"):
        TaskVector.between(nn.Linear(2, 2), base)
    with pytest.raises(TypeError, match=r"base must be a torch.nn.Module or its state dict \(got int\)"):
        TaskVector.between(base, 3)
    before = copy.deepcopy(base.state_dict())
    base.blocks[1].mlp[2] = nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match=r"must have a whole 'blocks.1.mlp.2.weight' of shape \(16, 32\), .*\(got shape"
    ):
        vector.apply(base)
    assert torch.equal(base.embedding.weight, before["embedding.weight"])
    with pytest.raises(ValueError, match=r"both must be of one base \(got '.*' of shapes \(10, 16\) and \(10, 8\)"):
        vector + TaskVector.between(Tiny(width=8, seed=1), Tiny(width=8))
    with pytest.raises(ValueError, match=r"a factor must be finite \(got nan\)"):
        vector * float("nan")
    for wrong in (lambda: vector * "2", lambda: vector + 1, lambda: vector - 0, lambda: vector * True):
        with pytest.raises(TypeError):
            wrong()


def test_what_two_child_networks_do_not_share():
    model = Tiny()
    a, b = child_of(model), ChildNetwork.random(model, reserve_p=0.3, seed=1)
    only_a = a.difference(b)
    for name, mask in only_a.masks().items():
        assert torch.equal(mask, a.masks()[name] & ~b.masks()[name])
    assert only_a.union(a.intersection(b)).fingerprint == a.fingerprint
    assert a.difference(a).summary().total.count == 0
