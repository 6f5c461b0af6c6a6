"""Parameters of two models are found in each other, whatever path leads to one model within the other."""

import copy

import pytest
import torch
from torch import nn

from childtune_fast import ChildNetwork, spectra
from childtune_fast.spectra.names import matched

INNER = ["embed.weight", "block.0.weight", "block.1.weight"]


@pytest.mark.parametrize("path", ["", "bert.", "0.auto_model.", "encoder.backbone.", "module._orig_mod.bert."])
def test_a_path_to_one_model_makes_no_difference(path):
    outer = [*(path + name for name in INNER), "head.weight"]
    found = dict(zip(INNER, outer, strict=False))
    assert matched(INNER, outer) == found
    assert matched(outer, INNER) == {there: here for here, there in found.items()}


def test_of_several_paths_the_one_that_explains_most_names_is_taken():
    outer = ["teacher.block.0.weight", *(f"student.{name}" for name in INNER)]
    assert matched(INNER, outer) == {name: f"student.{name}" for name in INNER}


def test_equal_names_go_before_longer_ones():
    outer = [*(f"copy.{name}" for name in INNER), *INNER]
    assert matched(INNER, outer) == {name: name for name in INNER}


def test_models_without_a_name_in_common_share_nothing():
    assert matched(INNER, ["layer.weight"]) == {}


@pytest.fixture
def tuned():
    """A model of which a part was pretrained, its child network, and that part as it was."""
    generator = torch.Generator().manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"backbone": pretrained}), "head": nn.Linear(24, 24)})
    base = {name: value.clone() for name, value in pretrained.state_dict().items()}
    masks = {f"encoder.backbone.{i}.weight": torch.rand(24, 24, generator=generator) < 0.25 for i in range(2)}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).add_(mask.float())
    return model, ChildNetwork.from_masks(model, masks), base


def test_a_part_of_a_model_is_compared_by_the_child_network_of_the_whole(tuned):
    model, child, base = tuned
    for whole in (model, model["encoder"], model["encoder"]["backbone"]):
        found = spectra.analyze(whole, base=base, child=child)
        found.check()
        rows = [row for row in found if row.child_density is not None]
        assert [row.longname[-1] for row in rows] == ["0", "1"]
        assert [row.moved for row in rows] == [int(mask.sum()) for mask in child.masks().values()]


def test_a_weight_that_moved_outside_is_found_in_a_part(tuned):
    model, child, base = tuned
    with torch.no_grad():
        name, mask = next(iter(child.masks().items()))
        model.get_parameter(name)[~mask] += 1
    found = spectra.analyze(model["encoder"]["backbone"], base=base, child=child)
    assert found.outside == {"0.weight": int((~mask).sum()), "1.weight": 0}
    with pytest.raises(ValueError, match=r"outside of the child network no weight may differ.*'0\.weight'"):
        found.check()


def two_encoders():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for name in ("query", "doc")})


def test_a_part_that_fits_several_parts_is_refused():
    """Masks of one encoder must not be taken for those of the other, whose weights did not move."""
    model = two_encoders()
    child = ChildNetwork.random(model["query"], reserve_p=0.3, seed=0, maskable="weight")
    message = r"^names of one model must fit one part of the other \(got 'query.' and 'doc.', which fit as well"
    for options in ({"child": child}, {"base": copy.deepcopy(model["query"])}):
        with pytest.raises(ValueError, match=message):
            spectra.analyze(model, progress=False, **options)


def test_models_without_a_common_name_are_refused():
    with pytest.raises(ValueError, match=r"^analyze: base must have parameters of the model's names"):
        spectra.analyze(nn.ModuleDict({"a": nn.Linear(16, 16)}), base=nn.ModuleDict({"b": nn.Linear(16, 16)}))


def test_a_part_of_a_model_may_itself_be_called_module():
    model = nn.Module()
    model.module, model.weight = nn.Linear(16, 16), nn.Parameter(torch.eye(16))
    base = copy.deepcopy(model)
    with torch.no_grad():
        model.module.weight.add_(1)
    assert [row.moved for row in spectra.analyze(model, base=base, progress=False)] == [0, 256]


def test_a_base_without_some_layers_is_told():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "head": nn.Linear(16, 16)})
    assert str(spectra.analyze(model, base=nn.ModuleDict({"a": model["a"]}), progress=False)).endswith(
        "; 1 not in the base"
    )
