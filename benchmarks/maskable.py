"""What is masked by default in many architectures of transformers and timm, of their usual sizes, on the meta device.

    python -m benchmarks.maskable           # the tables of docs/maskable.md
    python -m benchmarks.maskable --write   # puts them there

Nothing is allocated or downloaded. timm is needed for its table alone, with a torchvision of the same build as torch.
"""

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from childtune_fast.child.maskable import maskable_parameters
from childtune_fast.child.parts import find_parts, within

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "maskable.md"
RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": ("ResNet", {"out_features": ["stage2", "stage3", "stage4"]}),
}
SWIN = {"backbone_config": ("Swin", {"out_features": ["stage1", "stage2", "stage3", "stage4"]})}

# A model's class, and what differs from its configuration's defaults, which are the sizes of a published model.
# A pair stands for the configuration of a part: its name without "Config", and its arguments.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    # text: encoders
    "AlbertForSequenceClassification": {},
    "BertForSequenceClassification": {},
    "BertForPreTraining": {},
    "BigBirdForQuestionAnswering": {},
    "CanineForSequenceClassification": {},
    "DebertaV2ForSequenceClassification": {},
    "DistilBertForSequenceClassification": {},
    "ElectraForSequenceClassification": {},
    "FNetForSequenceClassification": {},
    "FunnelForSequenceClassification": {},
    "LongformerForTokenClassification": {},
    "MobileBertForSequenceClassification": {},
    "ModernBertForSequenceClassification": {},
    "MPNetForSequenceClassification": {},
    "PerceiverForSequenceClassification": {},
    "RobertaForTokenClassification": {},
    "RoFormerForMultipleChoice": {},
    "XLMRobertaForQuestionAnswering": {},
    "XLNetForSequenceClassification": {},
    # text: decoders
    "BloomForCausalLM": {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "FalconForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPT2ForSequenceClassification": {},
    "GPTNeoXForCausalLM": {},
    "LlamaForCausalLM": {},
    "LlamaForSequenceClassification": {},
    "MistralForCausalLM": {},
    "OPTForCausalLM": {},
    "Phi3ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    # text: mixtures of experts
    "DeepseekV3ForCausalLM": {},
    "GptOssForCausalLM": {},
    "MixtralForCausalLM": {},
    "OlmoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "SwitchTransformersForConditionalGeneration": {},
    # text: state space and recurrence
    "FalconH1ForCausalLM": {},
    "JambaForCausalLM": {},
    "Mamba2ForCausalLM": {},
    "MambaForCausalLM": {},
    "RecurrentGemmaForCausalLM": {},
    "RwkvForCausalLM": {},
    "xLSTMForCausalLM": {},
    # text: encoder and decoder
    "BartForSequenceClassification": {},
    "EncoderDecoderModel": {"encoder": ("Bert", {}), "decoder": ("Bert", {"is_decoder": True})},
    "LEDForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "MT5ForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "T5ForConditionalGeneration": {},
    "T5ForSequenceClassification": {},
    # images and video
    "BeitForImageClassification": {},
    "ConvNextForImageClassification": {},
    "CvtForImageClassification": {},
    "Dinov2ForImageClassification": {},
    "EfficientNetForImageClassification": {},
    "HieraForImageClassification": {},
    "LevitForImageClassification": {},
    "MobileNetV2ForImageClassification": {},
    "MobileViTForImageClassification": {},
    "PoolFormerForImageClassification": {},
    "PvtV2ForImageClassification": {},
    "ResNetForImageClassification": {},
    "SwinForImageClassification": {},
    "TimesformerForVideoClassification": {},
    "VideoMAEForVideoClassification": {},
    "ViTForImageClassification": {},
    "VJEPA2ForVideoClassification": {},
    # images: detection, segmentation, depth
    "Data2VecVisionForSemanticSegmentation": {},
    "DeformableDetrForObjectDetection": {**RESNET, "with_box_refine": True, "two_stage": True},
    "DepthAnythingForDepthEstimation": {},
    "DetrForObjectDetection": RESNET,
    "DPTForDepthEstimation": {},
    "GLPNForDepthEstimation": {},
    "Mask2FormerForUniversalSegmentation": {},
    "MobileViTForSemanticSegmentation": {},
    "RTDetrForObjectDetection": {},
    "SegformerForSemanticSegmentation": {},
    "UperNetForSemanticSegmentation": SWIN,
    "VitPoseForPoseEstimation": {},
    "YolosForObjectDetection": {},
    # speech
    "ASTForAudioClassification": {},
    "HubertForSequenceClassification": {},
    "SEWForCTC": {},
    "SpeechT5ForSpeechToText": {},
    "UniSpeechSatForXVector": {},
    "Wav2Vec2BertForCTC": {"vocab_size": 32},
    "Wav2Vec2ForCTC": {},
    "WhisperForConditionalGeneration": {},
    # images with text
    "BlipForQuestionAnswering": {},
    "Blip2ForConditionalGeneration": {},
    "CLIPForImageClassification": {},
    "CLIPSegForImageSegmentation": {},
    "LayoutLMv3ForTokenClassification": {},
    "LlavaForConditionalGeneration": {},
    "PaliGemmaForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {},
    "SiglipForImageClassification": {},
    "ViltForQuestionAnswering": {},
    "VisionEncoderDecoderModel": {"encoder": ("ViT", {}), "decoder": ("GPT2", {"add_cross_attention": True})},
    # time series
    "InformerForPrediction": {"prediction_length": 24},
    "PatchTSTForPrediction": {},
}
TIMM = (
    "cait_s24_224",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "mixer_b16_224",
    "mobilenetv3_large_100",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "vit_base_patch16_224",
)


class Row(NamedTuple):
    """What is masked in an architecture, by name."""

    name: str
    blocks: list[str]
    share: float | None  # of the trainable weights; None if the default is refused
    heads: list[str]
    others: list[str]
    refusal: str


def row(name: str, model: nn.Module) -> Row:
    """Returns what the default masks in a model, what it trains in full, and why it refuses the model."""
    params = {name: param.numel() for name, param in model.named_parameters() if param.requires_grad}
    parts = find_parts(model)
    try:
        masked = maskable_parameters(model).keys()
    except ValueError as error:
        gist = re.search(r"which (must .*?)\)", str(error))
        return Row(name, [], None, [], [], gist[1] + ")" if gist else str(error))
    share = sum(params[of] for of in masked) / sum(params.values())
    blocks = [block for block in parts.blocks if any(within(of, [block]) for of in masked)]  # others may be frozen
    heads = [of for of in params if within(of, parts.heads)]
    others = [of for of in params if of not in masked and of not in heads]
    return Row(name, blocks, share, outermost(heads, params), outermost(others, params), "")


def outermost(names: list[str], params: Iterable[str]) -> list[str]:
    """Returns the modules that hold parameters called `names` and no others of `params`, the outermost ones."""
    strangers = {prefix for name in set(params).difference(names) for prefix in prefixes(name)}
    found = (next(prefix for prefix in prefixes(name) if prefix not in strangers) for name in names)
    return list(dict.fromkeys(found))


def prefixes(name: str) -> list[str]:
    """Returns the names of the modules that hold a parameter, the outermost first, and its own."""
    return [name[:end] for end, letter in enumerate(name) if letter == "."] + [name]


def transformers_model(name: str) -> nn.Module:
    """Returns a model of transformers, without values, with the options of TRANSFORMERS."""
    import transformers

    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before transformers 5
        from transformers.modeling_utils import no_init_weights
    kind = getattr(transformers, name)
    with torch.device("meta"), no_init_weights(), quiet():
        model = kind(config_of(kind.config_class, TRANSFORMERS.get(name, {})))
        model.tie_weights()
    return model


def config_of(kind: Any, options: dict[str, Any]) -> Any:
    """Returns a configuration of transformers, with those of its parts."""
    import transformers

    parts = {key: of for key, of in options.items() if isinstance(of, tuple)}
    made = {key: config_of(getattr(transformers, f"{part}Config"), of) for key, (part, of) in parts.items()}
    if "encoder" in made:
        return kind.from_encoder_decoder_configs(made["encoder"], made["decoder"])
    return kind(**{**options, **made})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what models say of their options while they are made, which concerns their use."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def timm_or_none() -> Any:
    """Returns timm; None without it, or with a torchvision that was built for another torch, which raises."""
    try:
        import timm
    except (ImportError, RuntimeError):
        return None
    return timm


def timm_model(name: str) -> nn.Module:
    """Returns a model of timm, without values."""
    with torch.device("meta"):
        return timm_or_none().create_model(name)


def table(package: str, version: str, rows: Iterable[Row]) -> str:
    """Returns a section in Markdown: a heading with the version, and a table."""
    lines = ["| architecture | masked | share | heads, in full | others, in full |", "|---|---|--:|---|---|"]
    for of in rows:
        blocks, heads, others = (", ".join(f"`{name}`" for name in names) for names in (of.blocks, of.heads, of.others))
        share = "refused" if of.share is None else f"{of.share:.1%}"
        lines.append(f"| {of.name} | {blocks or of.refusal} | {share} | {heads} | {others} |")
    return "\n".join([f"## {package} {version}", "", *lines, ""])


def transformers_table() -> str:
    """Returns the table of transformers, which must be installed."""
    import transformers

    return table(
        "transformers", transformers.__version__, (row(name, transformers_model(name)) for name in TRANSFORMERS)
    )


def timm_table() -> str | None:
    """Returns the table of timm; None if it cannot be imported."""
    timm = timm_or_none()
    return timm and table("timm", timm.__version__, (row(name, timm_model(name)) for name in TIMM))


def documented(package: str) -> tuple[str, str]:
    """Returns the version of a package that docs/maskable.md names, and the section with its table."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.search(rf"^## {package} (\S+)\n(.*\n)*?(?=\n## |\Z)", text, re.MULTILINE)
    assert found is not None, f"{DOCUMENT} has no table of {package}"
    return found[1], found[0]


def write(package: str, text: str) -> None:
    """Puts a table into docs/maskable.md, in the place of the one that is there."""
    DOCUMENT.write_text(DOCUMENT.read_text(encoding="utf-8").replace(documented(package)[1], text), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into docs/{DOCUMENT.name}")
    arguments = parser.parse_args()
    for package, text in (("transformers", transformers_table()), ("timm", timm_table())):
        if text is None:
            print(f"{package} cannot be imported, and so its table is left out", file=sys.stderr)
        elif arguments.write:
            write(package, text)
        else:
            print(text)
