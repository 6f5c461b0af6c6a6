"""Small models whose per-example gradients need one rule or another, and batches for them, in float64."""

import torch
from torch import nn
from torch.nn import functional as F

EXAMPLES = 5


def words(count=EXAMPLES, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randint(1, 20, (count, length), generator=generator),
        "y": torch.randint(3, (count,), generator=generator),
    }


def images(count=EXAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, 3, 9, 9, generator=generator, dtype=torch.float64),
        "y": torch.randint(3, (count,), generator=generator),
    }


def classified(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


class Text(nn.Module):
    """Embeds words, changes them in one way or another, and classifies their mean."""

    def __init__(self, change, *modules, embedding=None):
        super().__init__()
        self.embedding = embedding or nn.Embedding(20, 8)
        self.inner = nn.ModuleList(modules)
        self.vector = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(2, 8, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.change = change
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.change(self, self.embedding(x)).mean(1))


def _attention(model, x):
    return model.inner[0](x, x, x, need_weights=False)[0]


def _twice(model, x):
    return model.inner[0](torch.tanh(model.inner[0](x)))


def _position(model, x):
    return x + model.inner[0](torch.arange(x.shape[1])[None])


def _heads(model, x):
    return torch.einsum("btd,hde->bthe", x, model.matrix).flatten(2)


def _row_by_row(model, x):
    return torch.cat([model.token.expand(len(x), -1, -1), x], 1) * model.vector - model.vector


def _functional(model, x):
    return F.linear(x, model.embedding.weight[:8], model.vector)


def _batched(model, x):
    return torch.baddbmm(model.vector[None, None], x, model.matrix[:1].mT.reshape(1, 8, 4).repeat(len(x), 1, 2))


TEXTS = {
    "linear": lambda: Text(lambda m, x: m.inner[0](x), nn.Linear(8, 8)),
    "linear without bias": lambda: Text(lambda m, x: m.inner[0](x), nn.Linear(8, 8, bias=False)),
    "used twice": lambda: Text(_twice, nn.Linear(8, 8)),
    "layer norm": lambda: Text(lambda m, x: m.inner[0](x), nn.LayerNorm(8)),
    "rms norm": lambda: Text(lambda m, x: m.inner[0](x), nn.RMSNorm(8)),
    "norm of two dimensions": lambda: Text(lambda m, x: m.inner[0](x), nn.LayerNorm([7, 8])),
    "conv1d": lambda: Text(lambda m, x: m.inner[0](x.mT).mT, nn.Conv1d(8, 8, 3, padding=1, groups=2)),
    "attention": lambda: Text(_attention, nn.MultiheadAttention(8, 2, batch_first=True)),
    "sequence first": lambda: Text(lambda m, x: m.inner[0](x.mT.permute(2, 0, 1)).transpose(0, 1), nn.Linear(8, 8)),
    "encoder": lambda: Text(
        lambda m, x: m.inner[0](x), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ),
    "lstm": lambda: Text(lambda m, x: m.inner[0](x)[0], nn.LSTM(8, 8, batch_first=True)),
    "gru": lambda: Text(lambda m, x: m.inner[0](x)[0], nn.GRU(8, 8, batch_first=True)),
    "position table": lambda: Text(_position, nn.Embedding(7, 8)),
    "einsum": lambda: Text(_heads),
    "expand, multiply, subtract": lambda: Text(_row_by_row),
    "a table as a matrix": lambda: Text(_functional),
    "baddbmm": lambda: Text(_batched),
    "bilinear": lambda: Text(lambda m, x: m.inner[0](x, torch.tanh(x)), nn.Bilinear(8, 8, 8)),
    "prelu": lambda: Text(lambda m, x: m.inner[0](x), nn.PReLU()),
    "weight norm": lambda: Text(
        lambda m, x: m.inner[0](x), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    ),
    "padding_idx": lambda: Text(lambda m, x: x, embedding=nn.Embedding(20, 8, padding_idx=3)),
    "a sparse table": lambda: Text(lambda m, x: x, embedding=nn.Embedding(20, 8, sparse=True)),
}  # fmt: skip

IMAGES = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=False),
        nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.LazyLinear(3),
    ),
    "norms": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True),
        nn.Tanh(), nn.Flatten(), nn.LazyLinear(3),
    ),
}  # fmt: skip


def made(make, batch):
    """Returns a model in float64 and evaluation mode, its lazy layers made by a batch."""
    torch.manual_seed(0)
    model = make().double().eval()
    model(batch["x"])
    return model.double()
