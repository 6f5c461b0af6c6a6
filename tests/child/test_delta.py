"""Delta files: the base and a delta make the tuned model to the bit; wrong bases are refused."""

import copy
import json
import math
import re

import pytest
import torch
from helpers import raw, same_bits
from models import Block, Tiny, child_of
from safetensors import safe_open
from torch import nn
from torch.optim.swa_utils import AveragedModel

from childtune_fast import ChildNetwork


def tune(model, child, seed=1):
    """Gives new values to the child network and to every parameter that it has no mask for, some of them special."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([math.nan, -0.0, math.inf, 1e-45, 0.0])
    with torch.no_grad():
        for name, param in model.named_parameters():
            new = torch.randn(param.shape, generator=generator)
            new.view(-1)[: len(special)] = special[: new.numel()]
            mask = child.packed[name].unpack() if name in child.packed else torch.ones(param.shape, dtype=torch.bool)
            param.copy_(torch.where(mask, new.to(param.dtype), param))
        model.steps += 7
    return model


def same_model(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def stored(path):
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.fixture
def delta(path):
    """Returns the base, the tuned model, the child network; the delta is at `path`."""
    base = Tiny()
    child = child_of(base)
    tuned = tune(copy.deepcopy(base), child)
    child.save_delta(path, tuned, base)
    return base, tuned, child


def test_a_delta_turns_the_base_into_the_tuned_model_to_the_bit(path, delta):
    base, tuned, child = delta
    fresh = copy.deepcopy(base)
    applied = ChildNetwork.apply_delta(path, fresh)
    assert same_model(fresh, tuned)
    assert not same_model(base, tuned)
    assert applied.fingerprint == child.fingerprint
    assert applied.mask_of(fresh.blocks[0].attention.weight) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_stored_in_the_parameters_dtype(path, dtype):
    base = Tiny().to(dtype)
    child = child_of(base)
    tuned = tune(copy.deepcopy(base), child)
    child.save_delta(path, tuned, base.state_dict())
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("values/blocks.0.attention.weight").dtype == dtype
    ChildNetwork.apply_delta(path, base)
    assert same_model(base, tuned)


def test_what_the_base_has_is_left_out(path):
    base = Tiny()
    child = child_of(base)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.classifier.bias += 1
    child.save_delta(path, tuned, base)
    assert {name for name in stored(path) if name.startswith("full/")} == {"full/classifier.bias"}
    assert {name for name in stored(path) if name.startswith("bits/")} == {f"bits/{name}" for name in child.packed}


def test_what_the_base_lacks_is_stored_in_full(path):
    base = Tiny()
    child = child_of(base)
    pretrained = {name: t for name, t in Tiny().state_dict().items() if not name.startswith("classifier")}
    child.save_delta(path, base, pretrained)
    other_head = Tiny()
    nn.init.ones_(other_head.classifier.weight)
    ChildNetwork.apply_delta(path, other_head)
    assert same_model(other_head, base)


def test_strided_and_shared_memory(path):
    base = Tiny()
    flat = torch.cat([base.classifier.weight.detach().t().reshape(-1), base.classifier.bias.detach()])
    tuned = copy.deepcopy(base)
    tuned.classifier.weight = nn.Parameter(flat[:48].view(16, 3).t() + 1)
    both = (flat + 1).split([48, 3])
    tuned.classifier.bias = nn.Parameter(both[1])
    tuned.blocks[0].attention.weight.data = base.blocks[0].attention.weight.data.t().contiguous().t()
    child = child_of(tuned)
    child.save_delta(path, tuned, base)
    strided = copy.deepcopy(base)
    strided.blocks[0].attention.weight.data = strided.blocks[0].attention.weight.data.t().contiguous().t()
    ChildNetwork.apply_delta(path, strided)
    assert same_model(strided, tuned)


def test_tied_parameters_are_stored_once(path):
    def tied():
        model = Tiny()
        model.output = nn.Linear(16, 10, bias=False)
        model.output.weight = model.embedding.weight
        return model

    base = tied()
    child = child_of(base)
    tuned = tune(copy.deepcopy(base), child)
    child.save_delta(path, tuned, base)
    assert "full/output.weight" not in stored(path)
    ChildNetwork.apply_delta(path, base)
    assert same_model(base, tuned)
    assert base.output.weight is base.embedding.weight


WHY = r"; likely causes are an average of the weights, such as EMA or SWA, .*, decay='all', another base, or another "


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        (0x7FC00000, 0x7FC00001, "1 by a NaN"),  # another payload
        (0x3F800000, 0x7FC00000, "1 by a NaN"),
        (0, -0x80000000, "1 by up to 0"),  # the sign of zero
        (0x3F800000, 0x3F800001, "1 by up to 1.19e-07"),
        (0x3F800000, 0x7F800000, "1 by up to inf"),
    ],
)
def test_a_weight_outside_that_moved_is_refused_with_the_likely_causes(path, before, after, how):
    base = Tiny()
    child = child_of(base)
    name = "blocks.1.mlp.0.weight"
    i = int((~child.masks()[name]).view(-1).nonzero()[5])
    tuned = copy.deepcopy(base)
    for model, bits in ((base, before), (tuned, after)):
        model.blocks[1].mlp[0].weight.data.view(-1).view(torch.int32)[i] = bits
    with pytest.raises(ValueError, match=rf"\(got 1 tensors with others: {re.escape(how)} in '{name}'\){WHY}"):
        child.save_delta(path, tuned, base)
    assert not path.exists()


def test_weights_outside_that_moved_are_counted_and_measured(path):
    base = Tiny()
    child = child_of(base)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for param in tuned.parameters():
            param *= 0.9
        tuned.blocks[0].attention.weight[~child.masks()["blocks.0.attention.weight"]] = math.nan
    outside = {name: mask.numel - mask.count for name, mask in child.packed.items()}
    names = list(outside)
    by = (base.get_parameter(names[1]) * 0.9 - base.get_parameter(names[1]))[~child.masks()[names[1]]].abs().max()
    message = (
        rf"12 tensors with others: {outside[names[0]]} by a NaN in '{names[0]}', "
        rf"{outside[names[1]]} by up to {by:.3g} in '{names[1]}', .*, and in 7 more\){WHY}"
    )
    with pytest.raises(ValueError, match=message):
        child.save_delta(path, tuned, base)


def test_an_average_of_the_weights_is_refused_as_one(path):
    """It moves some weights that never trained, by a rounding."""
    base = Tiny()
    child = child_of(base)
    average = AveragedModel(base, avg_fn=lambda average, new, _: 0.999 * average + (1 - 0.999) * new)
    for _ in range(10):
        average.update_parameters(base)
    with pytest.raises(ValueError, match=rf"\d by up to \d\.?\d*e-0[789] in 'blocks\.0\.attention\.weight'.*{WHY}"):
        child.save_delta(path, average, base)
    average = AveragedModel(tune(copy.deepcopy(base), child))  # whose count is no part of the model
    child.save_delta(path, average, base)
    ChildNetwork.apply_delta(path, base)
    assert same_model(base, average.module)


def test_a_base_unlike_the_model_is_refused(path):
    model = Tiny()
    child = child_of(model)
    for base, message in [
        (Tiny(blocks=1), r"the base must have 'blocks.1.attention.weight' of shape \(16, 16\).*\(got none\)"),
        (Tiny(width=8), r"the base must have .* \(got \(8, 8\)\)"),
        (Tiny().bfloat16(), "one dtype .got torch.float32 and torch.bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            child.save_delta(path, model, base)
    with pytest.raises(ValueError, match="the model must have"):
        child.save_delta(path, Tiny(blocks=1), model)


def change_outside(model):
    name, mask = "blocks.0.mlp.2.weight", child_of(Tiny()).masks()["blocks.0.mlp.2.weight"]
    model.get_parameter(name).data[~mask] += 1
    return name


def change_embedding(model):
    model.embedding.weight.data[0, 0] += 1
    return "embedding.weight"


def change_dtype(model):
    model.blocks[1].bfloat16()
    return "blocks.1.attention.weight"


def add_parameter(model):
    model.extra = nn.Linear(2, 2)
    return "extra.weight"


def drop_block(model):
    model.blocks = model.blocks[:1]
    return "blocks.1.attention.bias"


@pytest.mark.parametrize("change", [change_outside, change_embedding, change_dtype, add_parameter, drop_block])
def test_a_wrong_base_is_refused_and_not_written_to(path, change):
    base = Tiny()
    child = child_of(base)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.classifier.weight += 1
        tuned.blocks[0].attention.weight[child.masks()["blocks.0.attention.weight"]] += 1
    child.save_delta(path, tuned, base)
    wrong = copy.deepcopy(base)
    name = change(wrong)
    before = {key: raw(tensor) for key, tensor in wrong.state_dict().items()}
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*'{name}'"):
        ChildNetwork.apply_delta(path, wrong)
    assert all(torch.equal(raw(tensor), before[key]) for key, tensor in wrong.state_dict().items())


def test_empty_parameters_and_scalars(path):
    def make():
        model = nn.ParameterDict({"empty": nn.Parameter(torch.zeros(0, 3)), "scalar": nn.Parameter(torch.tensor(1.0))})
        model["free"] = nn.Parameter(torch.zeros(0))
        return model

    base, tuned = make(), make()
    masks = {"empty": torch.zeros(0, 3, dtype=torch.bool), "scalar": torch.tensor(True)}
    tuned["scalar"].data.fill_(2.0)
    ChildNetwork.from_masks(tuned, masks).save_delta(path, tuned, base)
    ChildNetwork.apply_delta(path, base)
    assert same_model(base, tuned)


def test_values_that_the_delta_replaces_may_differ(path, delta):
    base, tuned, child = delta
    other = copy.deepcopy(base)
    for name, mask in child.masks().items():
        other.get_parameter(name).data[mask] = 5.0
    ChildNetwork.apply_delta(path, other)
    assert same_model(other, tuned)


def test_autograd_notices_that_weights_were_replaced(path, delta):
    base, _, _ = delta
    x = torch.ones(1, 16, requires_grad=True)
    loss = base.blocks[0].attention(x).sum()
    ChildNetwork.apply_delta(path, base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_size_at_three_tenths(path):
    base = nn.ModuleDict({"blocks": nn.ModuleList(Block(256) for _ in range(4))})
    child = child_of(base)
    child.save_delta(path, base, copy.deepcopy(base))
    checkpoint = sum(param.numel() for param in base.parameters()) * 4
    assert path.stat().st_size <= 0.34 * checkpoint


def test_the_description_is_readable_json(path, delta):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["childtune_fast"] == "delta"
    assert json.loads(metadata["description"])["shapes"]["classifier.bias"] == [3]
