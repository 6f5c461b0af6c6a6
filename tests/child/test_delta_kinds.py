"""Delta files of models with buffers and frozen parameters that are sparse, quantised, on the meta device or odd."""

import json
import math

import pytest
import torch
from models import Tiny, child_of
from safetensors import safe_open
from tensor_kinds import KINDS, META, made
from torch import nn

from childtune_fast import ChildNetwork
from childtune_fast.child import files
from childtune_fast.ops.tensor_parts import copied, same_bits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def model_with(held, how="buffer"):
    """Tiny with one more tensor; such models cannot all be copied."""
    model = Tiny()
    if how == "buffer":
        model.register_buffer("held", held)
    else:
        model.held = nn.Parameter(held, requires_grad=False)
    return model


def changed(make, change):
    tensor = made(make)
    made(lambda: change(tensor))
    return tensor


def same_form(make, change):
    before, after = made(make), changed(make, change)
    return (before.shape, before.dtype) == (after.shape, after.dtype)


CHANGES = [(make, change) for make, changes in KINDS.values() for change in changes if same_form(make, change)]
every_kind = pytest.mark.parametrize("make", [make for make, _ in [*KINDS.values(), META]], ids=[*KINDS, "meta"])
both_ways = pytest.mark.parametrize("how", ["buffer", "frozen parameter"])


def description_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["description"]), set(file.keys())


@both_ways
@every_kind
def test_what_the_base_has_is_left_out(path, make, how):
    tuned = model_with(made(make), how)
    with torch.no_grad():
        tuned.classifier.bias += 1
    child_of(tuned).save_delta(path, tuned, model_with(made(make), how))
    description, stored = description_of(path)
    assert "held" in description["base"]
    assert not any(key.endswith("/held") for key in stored)
    base = model_with(made(make), how)
    ChildNetwork.apply_delta(path, base)
    assert same_bits(base.held, made(make))
    assert same_bits(base.classifier.bias, tuned.classifier.bias)


@both_ways
@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_what_changed_comes_back_in_the_same_tensor(path, make, change, how):
    tuned, base = model_with(changed(make, change), how), model_with(made(make), how)
    child_of(tuned).save_delta(path, tuned, base.state_dict())
    held = base.held
    ChildNetwork.apply_delta(path, base)
    assert base.held is held
    assert same_bits(held.detach(), tuned.held.detach())
    assert held.layout != torch.sparse_coo or held.is_coalesced() == tuned.held.is_coalesced()


@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_another_base_is_refused_and_not_written_to(path, make, change):
    tuned = model_with(made(make))
    with torch.no_grad():
        tuned.classifier.bias += 1
    child_of(tuned).save_delta(path, tuned, model_with(made(make)))
    wrong = model_with(changed(make, change))
    before = copied(wrong.held), wrong.classifier.bias.detach().clone()
    with pytest.raises(ValueError, match="is for another base: 'held' has other values"):
        ChildNetwork.apply_delta(path, wrong)
    assert same_bits(wrong.held, before[0])
    assert same_bits(wrong.classifier.bias.detach(), before[1])


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("kind", "word"), [("CSR", "sparse_csr"), ("COO", "sparse_coo")])
def test_a_base_of_another_kind_is_refused(path, kind, word, stored):
    make, changes = KINDS[kind]
    tuned = model_with(changed(make, changes[0]) if stored else made(make))
    child_of(tuned).save_delta(path, tuned, model_with(made(make)))
    for other, got in [
        (made(make).to_dense(), "dense"),
        (torch.empty_like(made(make).to_dense(), device="meta"), "meta"),
    ]:
        with pytest.raises(
            ValueError, match=rf"has 'held' in {word} \(got a model with {got}\); convert the model to the kind"
        ):
            ChildNetwork.apply_delta(path, model_with(other))


DENSE_TENSOR = torch.ones(2, 3)
CANNOT_BE_STORED = {
    "meta, unlike the base": (
        lambda: torch.empty(2, 3, device="meta"),
        lambda: DENSE_TENSOR,
        "meta, torch.float32, that",
    ),
    "meta, of another shape": (lambda: torch.empty(3, device="meta"), META[0], "meta, torch.float32, that differs"),
    "meta, not in the base": (lambda: torch.empty(3, device="meta"), None, "meta, torch.float32, that the base lacks"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), None, "nested, torch.float32"),
    "mkldnn": (lambda: DENSE_TENSOR.to_mkldnn(), None, "mkldnn, torch.float32"),
    "complex128": (lambda: DENSE_TENSOR.to(torch.complex128), None, "dense, torch.complex128"),
}


@pytest.mark.parametrize(("make", "of_base", "got"), CANNOT_BE_STORED.values(), ids=CANNOT_BE_STORED)
def test_what_cannot_be_stored_is_named(path, make, of_base, got):
    tuned = model_with(made(make))
    base = model_with(made(of_base)) if of_base else Tiny()
    with pytest.raises(ValueError, match=rf"must be dense, sparse or quantised.*\(got 'held', {got}.*; convert it"):
        child_of(tuned).save_delta(path, tuned, base)
    assert not path.exists()


def test_masked_parameters_must_be_dense_and_have_values(path):
    model = Tiny()
    child = child_of(model)
    name = "blocks.0.attention.weight"
    for sides in ((Tiny().to("meta"), model), (model, Tiny().to("meta"))):
        what = "model" if sides[1] is model else "base"
        with pytest.raises(
            ValueError, match=rf"of the {what} must be dense tensors with values \(got '{name}', meta\)"
        ):
            child.save_delta(path, *sides)
    child.save_delta(path, model, Tiny())
    with pytest.raises(ValueError, match=r"has 'embedding.weight' in dense \(got a model with meta\)"):
        ChildNetwork.apply_delta(path, Tiny().to("meta"))


def test_a_base_made_in_inference_mode_is_written_to(path):
    with torch.inference_mode():
        base = Tiny()
    tuned = Tiny()
    child = child_of(tuned)
    with torch.no_grad():
        tuned.classifier.bias += 1
        tuned.blocks[0].attention.weight[child.masks()["blocks.0.attention.weight"]] += 1
    child.save_delta(path, tuned, base)
    ChildNetwork.apply_delta(path, base)
    assert all(same_bits(tensor, base.state_dict()[name]) for name, tensor in tuned.state_dict().items())


# ---- A base in the model's memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base_of", [lambda model: model, nn.Module.state_dict], ids=["itself", "a state dict"])
def test_a_base_that_training_changed_too_is_refused(path, base_of):
    model = Tiny()
    child, base = child_of(model), base_of(model)
    with torch.no_grad():
        model.classifier.weight += 1
    with pytest.raises(
        ValueError, match=r"memory of its own .*\(got 'embedding.weight' in the model's, .*copy.deepcopy"
    ):
        child.save_delta(path, model, base)
    assert not path.exists()


@pytest.mark.parametrize("shared", ["blocks.0.attention.weight", "classifier.bias"])
def test_one_trained_tensor_in_the_models_memory_is_enough(path, shared):
    model = Tiny()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base[shared] = model.get_parameter(shared).detach()
    with pytest.raises(ValueError, match=f"got '{shared}' in the model's"):
        child_of(model).save_delta(path, model, base)


def test_what_is_not_trained_may_be_in_the_models_memory(path):
    """Frozen parameters, those of which the child network has no weight, and buffers."""
    base, model = Tiny(), Tiny()
    model.embedding, model.steps = base.embedding.requires_grad_(False), base.steps
    model.blocks[0].attention.weight = base.blocks[0].attention.weight
    masks = child_of(model).masks()
    masks["blocks.0.attention.weight"].zero_()
    child = ChildNetwork.from_masks(model, masks)
    with torch.no_grad():
        model.classifier.weight += 1
        model.blocks[1].mlp[0].weight[masks["blocks.1.mlp.0.weight"]] += 1
    child.save_delta(path, model, base)
    fresh = Tiny()
    ChildNetwork.apply_delta(path, fresh)
    assert all(same_bits(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_masked_parameters_may_be_of_dtypes_that_torch_cannot_select_from(path):
    def weight(plus):
        return (torch.arange(16, dtype=torch.uint8).view(4, 4) + plus).view(torch.float8_e4m3fn)

    base, model = nn.ParameterDict(), nn.ParameterDict()
    mask = torch.eye(4).bool()
    base["weight"] = nn.Parameter(weight(0), requires_grad=False)
    model["weight"] = nn.Parameter(weight(mask), requires_grad=False)
    ChildNetwork.from_masks(model, {"weight": mask}).save_delta(path, model, base)
    ChildNetwork.apply_delta(path, base)
    assert same_bits(base["weight"], model["weight"])


# ---- Files of earlier versions -------------------------------------------------------------------------------------


def test_digests_of_dense_tensors_stay_what_they_were():
    """A delta of an earlier version holds these."""
    assert (
        files.digest(torch.tensor([[1.0, math.nan]]))
        == "03c63d85e3e9d42b3cc2da076da4302e93af876ba0f4237b59e2f8579b8d1e76"
    )
    assert (
        files.digest(torch.tensor(3, dtype=torch.int64))
        == "663640990f8e4e28b061c7f47c6cce1f8411f08fce8875671024a7303389f706"
    )
    assert (
        files.digest(torch.tensor([1 + 2j]).conj())
        == "5f3e08c33c597832f476e00f55ab2f527a8bdc14dcd00f40184581d528ca9a79"
    )


def test_a_file_of_dense_tensors_has_no_kinds(path):
    model = Tiny()
    child_of(model).save_delta(path, model, Tiny())
    assert description_of(path)[0].keys() == {"shapes", "base"}


def test_parameters_that_a_hook_renames_in_the_state_dict_are_stored(tmp_path):
    model, base = Tiny(), Tiny()
    child = child_of(model)
    for each in (model, base):
        each._register_state_dict_hook(lambda _, state, prefix, meta: state.update(head=state.pop("classifier.weight")))
    with torch.no_grad():
        model.classifier.weight += 1
    child.save_delta(tmp_path / "delta", model, base)
    ChildNetwork.apply_delta(tmp_path / "delta", base)
    assert torch.equal(base.classifier.weight, model.classifier.weight)
