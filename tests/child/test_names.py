"""Child networks, scores, masks and deltas of one model inside and outside of wrappers that change its names."""

import copy

import pytest
import torch
from helpers import same_bits
from models import Tiny, child_of, random_scores
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from childtune_fast import ChildNetwork
from childtune_fast.child.names import plain_name, renamed

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning"
)  # torch.compile's own use

NAME = "blocks.0.attention.weight"


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.b", "a.b"),
        ("_orig_mod.a.b", "a.b"),
        ("module.a.b", "a.b"),
        ("module._orig_mod.a.b", "a.b"),
        ("_orig_mod.module.module.a.b", "a.b"),
        ("a._orig_mod.b", "a.b"),
        ("module._fsdp_wrapped_module.a._checkpoint_wrapped_module._orig_mod.b", "a.b"),
        ("a.module.b", "a.module.b"),
        ("module", "module"),
        ("modules.a", "modules.a"),
        ("", ""),
    ],
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("names", "others", "result"),
    [
        (["a", "b"], ["module.b", "module.a"], ["module.a", "module.b"]),
        (["module.a"], ["a"], ["a"]),
        (["_orig_mod.a"], ["module.a"], ["module.a"]),
        (["module.a"], ["module.a", "a"], ["module.a"]),  # exact names win
        (["_orig_mod.a"], ["module.a", "a"], ["a"]),  # only wrappers say "_orig_mod"
        (["module.a", "a"], ["_orig_mod.a"], ["module.a", "_orig_mod.a"]),
        (["module.a", "a"], ["a"], ["module.a", "a"]),
        (["a"], ["module.a", "module.module.a"], ["a"]),  # which of both is not known
        (["module.module.a", "module.a"], ["a"], ["module.module.a", "module.a"]),
        (["_orig_mod.a", "a"], ["a"], ["_orig_mod.a", "a"]),
        (
            ["weight", "module.weight"],
            ["_orig_mod.module.weight", "_orig_mod.weight"],
            ["_orig_mod.weight", "_orig_mod.module.weight"],
        ),
        (["a", 0], ["module.a", "0"], ["module.a", 0]),
        (["a"], [], ["a"]),
    ],
)
def test_names_of_another_model(names, others, result):
    assert list(renamed(dict.fromkeys(names), others)) == result


class Wrapper(nn.Module):
    """What FSDP and activation checkpointing look like from outside."""

    def __init__(self, model, attribute):
        super().__init__()
        self.add_module(attribute, model)


def compiled_blocks(model):
    for i in range(2):
        model.blocks[i] = torch.compile(model.blocks[i])
    return model


def checkpointed_blocks(model):
    """torch's own wrapper takes its prefix out of state dicts, but not out of the names of parameters."""
    for i in range(2):
        model.blocks[i] = checkpoint_wrapper(model.blocks[i])
    return model


def fsdp_in_the_middle(model):
    model.blocks[1].mlp = Wrapper(model.blocks[1].mlp, "_fsdp_wrapped_module")
    return Wrapper(model, "_fsdp_wrapped_module")


WRAPPINGS = {
    "compiled": torch.compile,
    "compiled blocks": compiled_blocks,
    "parallel": nn.DataParallel,
    "compiled in parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "parallel compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "checkpointed": checkpointed_blocks,
    "FSDP": fsdp_in_the_middle,
    "all of them": lambda model: torch.compile(nn.DataParallel(checkpointed_blocks(compiled_blocks(model)))),
}
every_pair = pytest.mark.parametrize(
    ("wrap", "unlike"),
    [(wrap, plain) for wrap in WRAPPINGS.values() for plain in (lambda model: model, nn.DataParallel)],
    ids=[f"{name}, {other}" for name in WRAPPINGS for other in ("plain", "parallel")],
)
BOTH_WAYS = pytest.mark.parametrize("back", [False, True])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.fixture
def pair(wrap, unlike, back):
    """The same model in two wrappings."""
    makers = (unlike, wrap) if back else (wrap, unlike)
    return [make(Tiny()) for make in makers]


def name_in(model, plain=NAME):
    return next(name for name, _ in model.named_parameters() if plain_name(name) == plain)


@BOTH_WAYS
@every_pair
def test_a_file_of_a_child_network(path, pair):
    one, other = pair
    child = child_of(one)
    child.save(path)
    loaded = ChildNetwork.load(path, other)
    assert loaded.packed.keys() <= dict(other.named_parameters()).keys()
    assert len(loaded.packed) == len(child.packed) == 12
    assert torch.equal(loaded.masks()[name_in(other)], child.masks()[name_in(one)])


@BOTH_WAYS
@every_pair
def test_scores_and_masks(pair):
    one, other = pair
    scores = random_scores(one)
    for make in (ChildNetwork.from_scores, ChildNetwork.lowest):
        a, b = (make(model, scores, reserve_p=0.3) for model in pair)
        assert a.fingerprint == b.fingerprint
        assert torch.equal(b.masks()[name_in(other)], a.masks()[name_in(one)])
    from_masks = ChildNetwork.from_masks(other, a.masks())
    assert torch.equal(from_masks.masks()[name_in(other)], a.masks()[name_in(one)])
    assert from_masks.packed.keys() == b.packed.keys()


@BOTH_WAYS
@every_pair
def test_sets(pair):
    a, b = (ChildNetwork.random(model, reserve_p=0.5, seed=seed) for seed, model in enumerate(pair))
    same = ChildNetwork.random(pair[0], reserve_p=0.5, seed=1)
    assert b.fingerprint == same.fingerprint
    assert a.overlap(b) == a.overlap(same)
    assert a.union(b).packed.keys() == a.packed.keys()
    assert a.union(b).fingerprint == a.union(same).fingerprint == b.union(a).fingerprint
    assert a.intersection(b).fingerprint == a.intersection(same).fingerprint


@pytest.mark.parametrize("base_as", ["module", "state dict"])
@BOTH_WAYS
@every_pair
def test_deltas(path, pair, base_as):
    """The child network, the tuned model, its base and the model that becomes the tuned one have their own names."""
    one, other = pair
    child = child_of(one)
    with torch.no_grad():
        for name, mask in renamed(child.masks(), dict(other.named_parameters())).items():
            other.get_parameter(name)[mask] += 1
        other.get_parameter(name_in(other, "classifier.bias")).add_(1)
        other.get_buffer(name_in_buffers(other)).add_(7)
    child.save_delta(path, other, one if base_as == "module" else one.state_dict())
    plain = Tiny()
    applied = ChildNetwork.apply_delta(path, plain)
    assert applied.fingerprint == child.fingerprint
    assert applied.packed.keys() == child_of(Tiny()).packed.keys()
    tuned = {plain_name(name): tensor for name, tensor in other.state_dict().items()}
    assert all(same_bits(tensor, tuned[name]) for name, tensor in plain.state_dict().items())
    assert plain.steps == 7
    ChildNetwork.apply_delta(path, one)
    now = {plain_name(name): tensor for name, tensor in one.state_dict().items()}
    assert all(same_bits(tensor, tuned[name]) for name, tensor in now.items())


def name_in_buffers(model):
    return next(name for name, _ in model.named_buffers() if plain_name(name) == "steps")


# ---- What is no wrapper --------------------------------------------------------------------------------------------


class HasModule(nn.Module):
    """A part that is called as wrappers call the module inside of them, beside one of the same parameter's name."""

    def __init__(self, seed=0):
        super().__init__()
        inner = Tiny(seed=seed)
        self.module = inner.blocks[0].attention
        self.weight = nn.Parameter(inner.blocks[1].attention.weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile])
def test_a_part_that_is_called_module(path, wrap):
    model, masks = HasModule(), {"module.weight": torch.eye(16).bool(), "weight": ~torch.eye(16).bool()}
    child = ChildNetwork.from_masks(wrap(model), masks)
    child.save(path)
    loaded = ChildNetwork.load(path, HasModule()).masks()
    assert {name: mask.tolist() for name, mask in loaded.items()} == {name: m.tolist() for name, m in masks.items()}
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.module.weight[masks["module.weight"]] += 1
    child.save_delta(path, tuned, wrap(model))
    ChildNetwork.apply_delta(path, wrap(model))
    assert same_bits(model.module.weight, tuned.module.weight)
    assert same_bits(model.weight, tuned.weight)


def test_a_plain_name_of_two_parameters_is_not_used(path):
    model = HasModule()
    child = ChildNetwork.from_masks(model, {"weight": torch.eye(16).bool()})
    child.save(path)
    with pytest.raises(ValueError, match=r"'weight' of shape \(16, 16\) \(got none of that name\); it is of another"):
        ChildNetwork.load(path, Wrapper(HasModule(), "module"))
    with pytest.raises(ValueError, match="from_masks: masks must be for parameters of the model"):
        ChildNetwork.from_masks(Wrapper(HasModule(), "module"), child.masks())


def test_another_model_in_a_wrapper_is_still_another(path):
    child_of(nn.DataParallel(Tiny())).save(path)
    with pytest.raises(
        ValueError, match=r"'module.blocks.1.attention.bias' .*as those of torch.compile, DDP, FSDP and"
    ):
        ChildNetwork.load(path, Tiny(blocks=1))
