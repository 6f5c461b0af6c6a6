"""Tiny models of many transformer families, with random weights, and a smaller one that tests can rely on."""

import torch
from torch import nn

from childtune_fast import ChildNetwork

BERT_LIKE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
DECODER = {**BERT_LIKE, "num_key_value_heads": 1}
# Config and head in transformers, its arguments, and where the repeated blocks are.
FAMILIES = {
    "BERT": ("Bert", "SequenceClassification", BERT_LIKE, ["bert.encoder.layer"]),
    "RoBERTa": ("Roberta", "SequenceClassification", BERT_LIKE, ["roberta.encoder.layer"]),
    "ELECTRA": ("Electra", "SequenceClassification", {**BERT_LIKE, "embedding_size": 8}, ["electra.encoder.layer"]),
    "XLNet": (
        "XLNet",
        "SequenceClassification",
        {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
        ["transformer.layer"],
    ),
    "ALBERT": (
        "Albert",
        "SequenceClassification",
        {**BERT_LIKE, "embedding_size": 8},
        ["albert.encoder.albert_layer_groups"],
    ),
    "DeBERTa-v2": (
        "DebertaV2",
        "SequenceClassification",
        {**BERT_LIKE, "relative_attention": True, "conv_kernel_size": 3},
        ["deberta.encoder.layer"],
    ),
    "DistilBERT": (
        "DistilBert",
        "SequenceClassification",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16},
        ["distilbert.transformer.layer"],
    ),
    "GPT-2": (
        "GPT2",
        "LMHead",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "eos_token_id": 0},
        ["transformer.h"],
    ),
    "BLOOM": ("Bloom", "CausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}, ["transformer.h"]),
    "Falcon": (
        "Falcon",
        "CausalLM",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        ["transformer.h"],
    ),
    "OPT": (
        "OPT",
        "CausalLM",
        {**BERT_LIKE, "ffn_dim": 32, "word_embed_proj_dim": 16},
        ["model.decoder.layers"],
    ),
    "LLaMA": ("Llama", "CausalLM", DECODER, ["model.layers"]),
    "Qwen": ("Qwen2", "CausalLM", DECODER, ["model.layers"]),
    "Mixtral": ("Mixtral", "CausalLM", {**DECODER, "num_local_experts": 2}, ["model.layers"]),
    "T5": (
        "T5",
        "ConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        ["encoder.block", "decoder.block"],
    ),
    "BART": (
        "Bart",
        "SequenceClassification",
        {
            "vocab_size": 40,
            "d_model": 16,
            "max_position_embeddings": 16,
            **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 32))},
            **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
        },
        ["model.encoder.layers", "model.decoder.layers"],
    ),
    "ModernBERT": ("ModernBert", "SequenceClassification", BERT_LIKE, ["model.layers"]),
}


def family(name, head=None, **options):
    """Returns the model, with its usual head or another, and where its repeated blocks are."""
    import transformers

    kind, usual_head, arguments, blocks = FAMILIES[name]
    head = head or usual_head
    suffix = "LMHeadModel" if head == "LMHead" else f"For{head}"
    config = getattr(transformers, f"{kind}Config")(**{**arguments, **options})
    return getattr(transformers, kind + suffix)(config), blocks


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Tiny(nn.Module):
    """An embedding, blocks, a buffer and a head."""

    def __init__(self, width=16, blocks=2, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(10, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
            self.classifier = nn.Linear(width, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def random_scores(model, seed=0):
    """Squares, as Fisher scores are, one for each weight of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator).square() for name, p in model.named_parameters()}


def child_of(model, reserve_p=0.3, **options):
    return ChildNetwork.from_scores(model, random_scores(model), reserve_p=reserve_p, **options)
