"""What is maskable by default in architectures of transformers and timm: the tables of docs/maskable.md."""

import re

import pytest
import torch
from torch import nn

from benchmarks import maskable
from childtune_fast.child.maskable import head_parameters, maskable_parameters
from childtune_fast.child.parts import find_parts

pytestmark = pytest.mark.slow


def check_lists(section, make):
    """Compares the documented lists of blocks with those of another version's models; returns how many it compared.

    A model is left out if this version does not have it, cannot make it, or has no modules of the documented names.
    """
    rows = re.findall(r"^\| (\w+) \| (`.*?`) \| [\d.]+% \|", section, re.MULTILINE)
    compared = 0
    for name, cell in rows:
        documented = re.findall("`(.*?)`", cell)
        try:
            model = make(name)
            for block in documented:
                model.get_submodule(block)
        except Exception:
            continue
        found = maskable.row(name, model).blocks
        assert found == documented, name
        compared += 1
    return compared, len(rows)


def check_documented(package, version, make, make_table):
    documented, section = maskable.documented(package)
    if documented == version:
        assert make_table() == section
        return
    compared, rows = check_lists(section, make)
    if compared < rows / 2:
        pytest.skip(f"{package} {version} has {compared} of the {rows} documented models of {documented}")


def test_the_documented_architectures_of_transformers():
    transformers = pytest.importorskip("transformers")
    assert len(maskable.TRANSFORMERS) >= 60
    check_documented("transformers", transformers.__version__, maskable.transformers_model, maskable.transformers_table)


@pytest.mark.filterwarnings("ignore")  # what timm and torchvision say while they are imported
def test_the_documented_architectures_of_timm():
    timm = maskable.timm_or_none()
    if timm is None:
        pytest.skip("timm is not installed, or its torchvision is not of this torch's build")
    assert len(maskable.TIMM) >= 6
    check_documented("timm", timm.__version__, maskable.timm_model, maskable.timm_table)


def test_another_version_is_compared_by_the_lists_that_it_has():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

    def make(name):
        if name == "Gone":
            raise AttributeError(name)
        return nn.ModuleDict({"layers" if name == "Same" else "stages": nn.ModuleList([Block(), Block()])})

    rows = [f"| {name} | `layers` | 90.0% | `head` | |" for name in ("Gone", "Renamed", "Same")]
    section = "\n".join([*rows, "| Refused | must hold more | refused | | |"])
    assert check_lists(section, make) == (1, 3)
    with pytest.raises(AssertionError, match="Same"):
        check_lists(section.replace("`layers`", "`layers`, `layers.0.a`"), make)


# ---- Said once more by hand, for the table is the program's own ----------------------------------------------------

NEW_HEADS = {
    "SegformerForSemanticSegmentation": ("segformer.", ["decode_head.linear_projections.0.proj.weight"]),
    "DPTForDepthEstimation": ("dpt.", ["neck.fusion_stage.layers.0.projection.weight", "head.head.0.weight"]),
    "GLPNForDepthEstimation": ("glpn.", ["decoder.stages.0.convolution.weight", "head.head.0.weight"]),
    "UperNetForSemanticSegmentation": ("backbone.", ["decode_head.lateral_convs.0.conv.weight"]),
    "Data2VecVisionForSemanticSegmentation": ("data2vec_vision.", ["decode_head.lateral_convs.0.convolution.weight"]),
    "DeformableDetrForObjectDetection": (
        ("model.encoder.layers.", "model.decoder.layers."),
        ["model.decoder.bbox_embed.0.layers.0.weight", "model.decoder.class_embed.0.weight"],
    ),
}


@pytest.mark.parametrize("name", NEW_HEADS)
def test_new_heads_are_trained_in_full(name):
    pytest.importorskip("transformers")
    model = maskable.transformers_model(name)
    masked, heads = maskable_parameters(model), head_parameters(model)
    backbone, of_head = NEW_HEADS[name]
    assert masked
    assert all(key.startswith(backbone) for key in masked)
    assert not heads.keys() & masked.keys()
    assert set(of_head) <= heads.keys()


@pytest.mark.parametrize("refine", [False, True])
def test_the_heads_of_deformable_detr_as_it_is_made(refine):
    """Ties and copies included, as in use, and not on the meta device."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}
    resnet = {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1], "embedding_size": 4, "layer_type": "basic"}
    backbone = transformers.ResNetConfig(**resnet, out_features=["stage2", "stage3", "stage4"])
    options = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone}
    config = transformers.DeformableDetrConfig(**options, **sizes, **heads, with_box_refine=refine, two_stage=refine)
    with torch.random.fork_rng(), maskable.quiet():
        model = transformers.DeformableDetrForObjectDetection(config)
    params = dict(model.named_parameters())
    of_heads = {id(p) for part in (model.class_embed, model.bbox_embed) for p in part.parameters()}
    assert {id(params[name]) for name in head_parameters(model)} == of_heads
    masked = maskable_parameters(model)
    assert masked
    assert not {id(param) for param in masked.values()} & of_heads


@pytest.mark.parametrize(
    "name", ["BartForSequenceClassification", "T5ForConditionalGeneration", "WhisperForConditionalGeneration"]
)
def test_decoders_are_backbone(name):
    pytest.importorskip("transformers")
    masked = maskable_parameters(maskable.transformers_model(name))
    assert any("decoder." in key for key in masked)


def test_a_model_without_a_head_has_the_blocks_of_one_with_it():
    pytest.importorskip("transformers")
    for name in ("DPT", "Segformer", "RTDetr"):
        task = next(of for of in maskable.TRANSFORMERS if of.startswith(f"{name}For"))
        base = maskable.transformers_model(f"{name}Model")
        whole = maskable.transformers_model(task)
        prefix = f"{type(whole).base_model_prefix}." if name != "RTDetr" else "model."
        assert [prefix + block for block in find_parts(base).blocks] == find_parts(whole).blocks
