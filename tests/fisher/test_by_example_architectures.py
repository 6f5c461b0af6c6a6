"""Gradients of examples of tiny transformers from one backward pass of a batch, against single passes, in float64."""

import warnings

import pytest
import torch
from by_example_helpers import check_scores

from childtune_fast import estimate_fisher

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
CODER = {
    f"{part}_{name}": number
    for part in ("encoder", "decoder")
    for name, number in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}


def tokens(size=8, length=9):
    return torch.randint(5, 60, (size, length))


def padded(size=8, length=9):
    mask = torch.ones(size, length, dtype=torch.long)
    for example in range(size):
        mask[example, length - example % 4 :] = 0
    return {"input_ids": tokens(size, length), "attention_mask": mask}


def classes(size=8, **shape):
    return {**padded(size, **shape), "labels": torch.arange(size) % 2}


def language(size=8):
    found = padded(size)
    return {**found, "labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)}


def translation(size=8):
    labels = tokens(size, 5)
    labels[::3, 3:] = -100
    return {**padded(size), "labels": labels}


def images(size=8):
    return {"pixel_values": torch.randn(size, 3, 16, 16), "labels": torch.arange(size) % 2}


def choices(size=8):
    return {"input_ids": torch.randint(5, 60, (size, 3, 9)), "labels": torch.arange(size) % 3}


MODELS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", SIZES, classes),
    "BERT, eager": ("BertForSequenceClassification", "BertConfig", {**SIZES, "attn_implementation": "eager"}, classes),
    "BERT, tied embeddings": ("BertForMaskedLM", "BertConfig", SIZES, language),
    "BERT, choices": ("BertForMultipleChoice", "BertConfig", SIZES, choices),
    "ALBERT, shared layers": (
        "AlbertForSequenceClassification", "AlbertConfig", {**SIZES, "embedding_size": 8}, classes,
    ),
    "DeBERTa, relative positions": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        classes,
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0},
        language,
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 1}, language),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
         "decoder_start_token_id": 0},
        translation,
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", {**CODER, "vocab_size": 60, "d_model": 16}, translation),
    "ViT": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 16, "patch_size": 8}, images),
    "Swin, windows": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4},
        images,
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        images,
    ),
}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    kind, config, options, batch = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).double().eval()
    for param in model.parameters():  # of a new model, some gradients are 0
        param.data.add_(torch.randn_like(param), alpha=0.02)
    return model, batch


def of_transformers(model, batch):
    return model(**{name: value.double() if value.is_floating_point() else value for name, value in batch.items()}).loss


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_single_passes(name):
    model, batch = model_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says of new models
        check_scores(model, [batch(8), batch(5)], of_transformers, bound=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_is_refused(reentrant):
    """What a checkpoint computes again may be read once. Transformers switches it on in training mode alone."""
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 1e-12)
    config = transformers.BertConfig(**SIZES, **off)
    model = transformers.BertForSequenceClassification(config).double()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_scores(model, [classes()], of_transformers, refused="heckpoint", train_mode=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank_dropout", [0.0, 1e-12])
def test_lora(rank_dropout):
    peft = pytest.importorskip("peft")
    model, batch = model_of("BERT")
    config = peft.LoraConfig(
        target_modules=["query", "value"], r=2, init_lora_weights=False, lora_dropout=rank_dropout, task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, config).eval()
    check_scores(model, [batch(8), batch(5)], of_transformers, bound=1e-5, train_mode=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_half_precision(dtype):
    """Against float32: batches and single passes round differently, by about a hundredth."""
    model, _ = model_of("BERT")
    model, batches = model.float(), [classes()]

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return model(**batch).loss

    if dtype != "autocast":
        model = model.to(dtype)
    check_scores(model, batches, loss, bound=0.05)


def test_precision_of_float32():
    """docs/numerics.md: less than 1e-5 of a tensor's highest score."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    batch = {**padded(16, 24), "labels": torch.arange(16) % 2}
    scores = estimate_fisher(model, [batch], per_example=True, progress=False)
    singles = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(16)]
    expected = estimate_fisher(model.double(), singles, progress=False)
    for name, score in expected.items():
        if not name.endswith("key.bias"):  # whose gradient is 0 but for rounding, before a softmax
            assert float((scores[name] - score).abs().max()) <= 1e-5 * float(score.max()), name
