"""Heads are left out of what is maskable by default, wherever and whatever they are; blocks are not."""

import pytest
import torch
from models import Block, Tiny
from torch import nn

from childtune_fast import ChildNetwork
from childtune_fast.child.maskable import block_lists, head_parameters, maskable_parameters
from childtune_fast.child.parts import find_parts

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch.compile's own use


class Head(nn.Module):
    """A head with a list of blocks of its own."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.out = nn.Linear(width, 2)


def beside(**parts):
    """Returns an encoder with two blocks, and what is put beside it."""
    model = nn.Module()
    model.embedding = nn.Embedding(5, 4)
    model.encoder = nn.ModuleList(Block(4) for _ in range(2))
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def blocks_of(count=2):
    return nn.ModuleList(Block(4) for _ in range(count))


HEADS = ["head", "heads", "task_heads", "taskHeads", "head2", "decode_head", "classifier", "classifiers", "taggers"]
HEADS += ["seg_regressors", "scorer", "lm_predictions", "class_predictor", "score", "fc", "cls", "qa_outputs"]
HEADS += ["decoders", "task_decoders", "outputs", "predictors", "bbox_embed", "auxiliary_heads_2"]
BACKBONES = [
    "decoder",
    "decoder_layers",
    "predictor",
    "attention_heads_proj",
    "head_layers",
    "c_fc",
    "output",
    "headers",
    "conv_head",
]


@pytest.mark.parametrize("make", [blocks_of, Head], ids=["list", "module"])
@pytest.mark.parametrize("name", HEADS)
def test_what_has_the_name_of_a_head_is_one(name, make):
    model = beside(**{name: make()})
    assert block_lists(model) == ["encoder"]
    assert all(key.startswith("encoder.") for key in maskable_parameters(model))
    assert list(head_parameters(model)) == [key for key, _ in model.named_parameters() if key.startswith(f"{name}.")]


@pytest.mark.parametrize("name", BACKBONES)
def test_what_only_resembles_one_is_none(name):
    assert block_lists(beside(**{name: blocks_of()})) == ["encoder", name]
    assert find_parts(beside(**{name: Head()})) == (["encoder", f"{name}.layers"], [])


def test_a_list_of_heads_is_told_by_the_class_of_its_members():
    model = beside(tasks=nn.ModuleList(Head() for _ in range(2)))
    assert find_parts(model) == (["encoder"], ["tasks"])


def test_heads_in_a_dict():
    assert find_parts(beside(heads=nn.ModuleDict({"ner": Head(), "pos": Head()}))) == (["encoder"], ["heads"])


def test_inside_of_blocks_names_do_not_count():
    """As in code where a block has a list of attention heads."""
    model = beside()
    for block in model.encoder:
        block.heads = blocks_of()
    assert block_lists(model) == ["encoder"]
    assert any(".heads." in name for name in maskable_parameters(model))


def test_the_layers_of_a_decoder_are_blocks():
    model = beside(decoder=nn.ModuleDict({"decoders": blocks_of()}))
    assert block_lists(model) == ["encoder", "decoder.decoders"]


@pytest.mark.parametrize("name", ["decoders", "outputs", "predictors"])
def test_a_word_that_is_a_head_in_the_plural_needs_blocks_elsewhere(name):
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), name: blocks_of(), "out": nn.Linear(4, 2)})
    assert block_lists(model) == [name]


@pytest.mark.parametrize("name", ["heads", "classifiers"])
def test_only_heads_is_an_error_that_names_them(name):
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), name: blocks_of()})
    with pytest.raises(
        ValueError, match=rf"got 0.0%, from no such list, with \['{name}'\] taken for heads\); pass mask"
    ):
        maskable_parameters(model)
    assert len(maskable_parameters(model, f"^{name}")) == 12  # the remedy


def test_what_holds_all_parameters_is_the_model_whatever_its_name():
    model = nn.ModuleDict({"classifier": nn.ModuleDict({"net": Tiny()})})
    assert find_parts(model) == (["classifier.net.blocks"], ["classifier.net.classifier"])
    assert block_lists(nn.ModuleDict({"heads": blocks_of()})) == ["heads"]


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Parameter(torch.ones(4, 4))
        self.mlp = nn.Parameter(torch.ones(4, 8))


class OwnLinear(nn.Linear):
    pass


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def listed(make, wrap=lambda module: module):
    return nn.ModuleDict({"first": nn.Linear(4, 4), "list": nn.ModuleList(wrap(make()) for _ in range(2))})


def weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def matrices():
    return nn.ParameterDict({"up": nn.Parameter(torch.ones(4, 8)), "down": nn.Parameter(torch.ones(8, 4))})


@pytest.mark.parametrize("make", [OwnBlock, matrices, lambda: nn.LSTM(4, 4), lambda: nn.MultiheadAttention(4, 2)])
def test_blocks_that_hold_parameters_themselves(make):
    model = listed(make)
    assert block_lists(model) == ["list"]
    assert set(maskable_parameters(model)) == {n for n, _ in model.named_parameters() if n.startswith("list.")}


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: OwnLinear(4, 4), OwnNorm, weight_norm])
def test_layers_are_no_blocks(make):
    assert block_lists(listed(make)) == []
    assert block_lists(nn.ModuleDict({"first": nn.Linear(4, 4), "list": nn.ModuleList([make()])})) == []


def test_wrapped_layers_are_no_blocks():
    assert block_lists(listed(lambda: nn.Linear(4, 4), torch.compile)) == []
    assert block_lists(listed(lambda: Block(4), torch.compile)) == ["list"]


def test_sequentials_with_nothing_in_common_are_no_blocks():
    """A backbone and a head, as fastai puts them together."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Block(4), Block(4)))
    model = nn.ModuleDict({"net": nn.Sequential(backbone, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))})
    assert block_lists(model) == ["net.0.1"]


# ---- Models of transformers ----------------------------------------------------------------------------------------


class Base(nn.Module):
    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)
        self.layers = blocks_of()
        self.head = nn.Linear(4, 4)  # a pooling, as SigLIP's


class ForTask(nn.Module):
    """A model with a head, in the way of transformers."""

    base_model_prefix = "base"

    def __init__(self, **parts):
        super().__init__()
        self.base = Base()
        self.final = blocks_of()
        self.scale = nn.Parameter(torch.ones(2))
        for name, part in parts.items():
            setattr(self, name, part)


def check_for_task(model, prefix=""):
    assert block_lists(model) == [f"{prefix}base.layers"]
    names = [n for n, _ in model.named_parameters()]
    wanted = [n for n in names if n.startswith((f"{prefix}final.", f"{prefix}scale"))]
    assert list(head_parameters(model)) == wanted
    assert list(ChildNetwork.head_only(model).packed) == [n for n in names if n not in wanted]


def test_what_is_beside_the_base_model_is_a_head():
    check_for_task(ForTask())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.ModuleDict({"classifier": m})])
def test_in_wrappers(wrap):
    model = wrap(ForTask())
    check_for_task(model, next(name for name, _ in model.named_parameters()).removesuffix("scale"))


def test_in_another_model():
    """A model with a task in a module with more, which is judged by its names."""
    model = nn.ModuleDict({"tagger_net": ForTask(), "extra": Block(4), "heads": blocks_of()})
    assert find_parts(model) == (["tagger_net.base.layers"], ["tagger_net.scale", "tagger_net.final", "heads"])


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # which PEFT calls in a deprecated way
def test_in_peft():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(vocab_size=20, **sizes))
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    assert block_lists(model) == ["base_model.model.model.layers"]
    assert all("lora_" in name for name in maskable_parameters(model))
    assert list(head_parameters(model)) == ["base_model.model.score.modules_to_save.default.weight"]


def test_peft_in_a_list_of_layers():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        beside(parts=nn.ModuleList(nn.Linear(4, 4) for _ in range(2))),
        peft.LoraConfig(r=2, target_modules=["parts.0", "parts.1", "attention"]),
    )
    assert block_lists(model) == ["base_model.model.encoder"]


def test_a_base_without_blocks_is_none():
    """The attribute that carries the base model's name may be something else, and heads are told by their names."""
    model = ForTask(classifier=nn.Linear(4, 2))
    model.base = nn.Embedding(5, 4)
    assert find_parts(model) == (["final"], ["classifier"])


def test_a_base_with_nothing_beside_it_has_its_heads_inside():
    model = ForTask()
    del model.final, model.scale
    model.base.classifiers = blocks_of()
    assert find_parts(model) == (["base.layers"], ["base.head", "base.classifiers"])


def test_names_inside_of_a_base_model_only_keep_lists_out():
    """As a diffusion head, which is pretrained with the base model, and trained in full."""
    model = ForTask()
    model.base.diffusion_head = Head()
    model.base.score = nn.Parameter(torch.ones(2))
    assert block_lists(model) == ["base.layers"]
    assert not any(name.startswith("base.") for name in head_parameters(model))


def test_a_head_that_the_base_model_refers_to_is_a_head():
    """As in DETR's descendants, whose decoder refines boxes with the heads; so the weights have a name in there."""
    model = ForTask(bbox_embed=nn.ModuleList(Block(4) for _ in range(2)))
    model.base.bbox_embed = nn.ModuleList(Block(4) for _ in range(2))
    for own, other in zip(model.base.bbox_embed.modules(), model.bbox_embed.modules(), strict=True):
        for key in own._parameters:
            setattr(own, key, getattr(other, key))
    assert block_lists(model) == ["base.layers"]
    assert "base.bbox_embed.0.attention.weight" in head_parameters(model)


def test_a_second_name_for_a_part_of_the_base_model_changes_nothing():
    model = ForTask()
    model.layers = model.base.layers
    check_for_task(model)


def test_a_head_object_that_the_base_model_holds_too_is_a_head():
    model = ForTask(bbox_embed=blocks_of())
    model.base.bbox_embed = model.bbox_embed
    assert block_lists(model) == ["base.layers"]
    assert "base.bbox_embed.0.attention.weight" in head_parameters(model)


def test_two_models_in_one():
    model = nn.ModuleDict({"one": ForTask(), "two": ForTask()})
    del model["two"].final, model["two"].scale
    assert find_parts(model) == (["one.base.layers", "two.base.layers"], ["one.scale", "one.final", "two.base.head"])


def test_another_model_beside_the_base_model_is_no_head():
    """As the audio codec of a speech model, by the class of its configuration."""
    model = ForTask(codec=Base(), same=Base())
    model.config, model.same.config, model.codec.config = "own", "own", 1
    assert block_lists(model) == ["base.layers", "codec.layers"]
    assert "same.layers.0.attention.weight" in head_parameters(model)


class NetForDepth(nn.Module):
    base_model_prefix = ""

    def __init__(self):
        super().__init__()
        self.backbone = Base()
        self.neck = Head()


class Net(NetForDepth):
    base_model_prefix = "net"


def test_what_is_beside_the_backbone_of_a_model_for_a_task_is_a_head():
    assert find_parts(NetForDepth()) == (["backbone.layers"], ["neck"])
    assert find_parts(Net()) == (["backbone.layers"], ["neck"])  # a subclass
    plain = type("NetModel", (nn.Module,), {"base_model_prefix": "net"})()
    plain.backbone, plain.neck = Base(), Head()
    assert block_lists(plain) == ["backbone.layers", "neck.layers"]
