"""Every rule for the gradient of a shared value, in float64, against single passes."""

import by_example_helpers as helpers
import pytest
import torch
from by_example_helpers import HIDDEN, WIDTH, Model, plain, random, single_gradients, split_gradients
from torch import nn
from torch.nn import functional as F

from childtune_fast.fisher import rules, split
from childtune_fast.fisher.graph import NotCovered


def attention(s, x):
    q, k, v = s.q(x).chunk(3, -1)
    return s.h(F.scaled_dot_product_attention(q, k, v).mean(1))


def of_tokens(layer):
    return Model(lambda s, x: s.h(s.a(s.e(x)).tanh().mean(1)), e=layer)


def of_channels(layer, channels=HIDDEN):
    return Model(lambda s, x: s.h(s.c(x.transpose(1, 2)).tanh().mean(2)[:, :channels]), c=layer)


MODELS = {
    "addmm": lambda: Model(lambda s, x: s.h(s.a(x[:, 0]).tanh())),
    "addmm with a factor": lambda: Model(
        lambda s, x: s.h(torch.addmm(s.b, x.mean(1), s.w, beta=0.5, alpha=2.0).tanh()),
        w=random(WIDTH, HIDDEN), b=random(HIDDEN),
    ),
    "mm": lambda: plain(a=nn.Linear(WIDTH, HIDDEN, bias=False)),
    "a matrix that is not transposed": lambda: Model(lambda s, x: s.h((x @ s.w).mean(1)), w=random(WIDTH, HIDDEN)),
    "a product from the left": lambda: Model(lambda s, x: s.h((s.w @ x.mT).tanh().mean(2)), w=random(HIDDEN, WIDTH)),
    "bmm": lambda: Model(lambda s, x: s.h(torch.bmm(x.transpose(0, 1), s.w).tanh().mean(0)), w=random(5, WIDTH, 8)),
    "baddbmm": lambda: Model(
        lambda s, x: s.h(torch.baddbmm(s.b, x.transpose(0, 1), s.w, beta=0.5, alpha=2.0).tanh().mean(0)),
        w=random(5, WIDTH, HIDDEN), b=random(5, 1, HIDDEN),
    ),
    "einsum": lambda: Model(
        lambda s, x: s.h(torch.einsum("btnh,hno->bto", torch.einsum("btd,ndh->btnh", x, s.w).tanh(), s.v).mean(1)),
        w=random(2, WIDTH, HIDDEN), v=random(HIDDEN, 2, HIDDEN),
    ),
    "bilinear": lambda: Model(lambda s, x: s.h(s.b(x[:, 0], x[:, 1]).tanh()), b=nn.Bilinear(WIDTH, WIDTH, HIDDEN)),
    "a vector": lambda: Model(lambda s, x: s.h(s.a((x @ s.w).softmax(1)[:, None] @ x).tanh()[:, 0]), w=random(WIDTH)),
    "sums and products": lambda: Model(
        lambda s, x: s.h(s.a(x * s.w + s.v - torch.sub(x, s.u, alpha=3) + torch.add(x, s.t, alpha=2)).tanh().mean(1)),
        w=random(WIDTH), v=random(5, 1), u=random(WIDTH), t=random(1, 1, WIDTH),
    ),
    "the shared value first": lambda: Model(
        lambda s, x: s.h(s.a(s.w * x + (s.v + x) - (s.u - x) + (1 - s.w)).tanh().mean(1)),
        w=random(WIDTH), v=random(WIDTH), u=random(5, WIDTH),
    ),
    "a number": lambda: plain(a=Model(lambda s, x: s.a(x) * s.w.exp() + s.w, w=random())),
    "a first token that is expanded": lambda: Model(
        lambda s, x: s.h(s.a(torch.cat([s.w.expand(len(x), -1, -1), x], 1) + s.p[:, :6]).tanh().mean(1)),
        w=random(1, 1, WIDTH), p=random(1, 9, WIDTH),
    ),
    "a table that is repeated": lambda: Model(
        lambda s, x: s.h(s.a(torch.cat([s.w.repeat(len(x), 1, 1), x], 1)).tanh().mean(1)), w=random(1, 2, WIDTH)
    ),
    "layer norm": lambda: plain(a=nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN))),
    "layer norm over two dimensions": lambda: plain(
        a=nn.Sequential(nn.LayerNorm([5, WIDTH]), nn.Linear(WIDTH, HIDDEN))
    ),
    "RMS norm": lambda: plain(a=nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, HIDDEN))),
    "group norm": lambda: of_channels(nn.Sequential(nn.GroupNorm(2, WIDTH), nn.Conv1d(WIDTH, HIDDEN, 1))),
    "instance norm": lambda: of_channels(
        nn.Sequential(nn.InstanceNorm1d(WIDTH, affine=True), nn.Conv1d(WIDTH, HIDDEN, 1))
    ),
    "batch norm in evaluation mode": lambda: of_channels(
        nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Conv1d(WIDTH, HIDDEN, 1))
    ),
    "conv 1d": lambda: of_channels(nn.Conv1d(WIDTH, HIDDEN, 3, padding=2, dilation=2, groups=2)),
    "conv 1d transposed": lambda: of_channels(nn.ConvTranspose1d(WIDTH, HIDDEN, 3, stride=2, groups=2)),
    "conv 2d without bias": lambda: Model(
        lambda s, x: s.h(s.c(x.unsqueeze(1)).tanh().mean((2, 3))), c=nn.Conv2d(1, HIDDEN, 2, bias=False)
    ),
    "PReLU": lambda: of_channels(nn.Sequential(nn.Conv1d(WIDTH, HIDDEN, 1), nn.PReLU(HIDDEN))),
    "LSTM": lambda: Model(lambda s, x: s.h(s.r(x)[0][:, -1]), r=nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True)),
    "GRU, sequence first": lambda: Model(lambda s, x: s.h(s.r(x.transpose(0, 1))[0][-1]), r=nn.GRU(WIDTH, HIDDEN)),
    "attention": lambda: Model(attention, q=nn.Linear(WIDTH, 3 * HIDDEN)),
    "nn.MultiheadAttention": lambda: plain(
        a=Model(lambda s, x: s.a(x + s.m(x, x, x)[0]), m=nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    ),
    "the same, with biases of keys": lambda: Model(
        lambda s, x: s.h(s.a(s.m(*[x.transpose(0, 1)] * 3)[0]).tanh().mean(0)),
        m=nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True),
    ),
    "a layer in a loop": lambda: Model(lambda s, x: s.h(s.r(s.r(s.r(s.a(x)).tanh())).mean(1)), r=nn.Linear(8, 8)),
    "halves of a matrix": lambda: Model(
        lambda s, x: s.h((F.linear(x, s.w[:8]) * F.linear(x, s.w[8:])).mean(1)), w=random(16, WIDTH)
    ),
    "a complex number": lambda: Model(
        lambda s, x: s.h(s.a(torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.complex(s.w, s.v), n=5, dim=1)).mean(1)),
        w=random(3, WIDTH), v=random(3, WIDTH),
    ),
    "other operations": lambda: Model(
        lambda s, x: s.h(s.a(torch.lerp(x, s.w.expand_as(x), 0.3) / s.v.exp() + torch.maximum(x, s.w)).tanh().mean(1)),
        w=random(WIDTH), v=random(WIDTH),
    ),
    "weight norm": lambda: plain(a=nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, HIDDEN))),
    "spectral norm": lambda: plain(a=nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, HIDDEN))),
    "in place": lambda: Model(lambda s, x: s.h(s.a(x).add_(1).mul_(2).tanh_().mean(1))),
    "embedding": lambda: of_tokens(nn.Embedding(20, WIDTH)),
    "embedding with padding": lambda: of_tokens(nn.Embedding(20, WIDTH, padding_idx=3)),
    "sparse embedding": lambda: of_tokens(nn.Embedding(20, WIDTH, sparse=True)),
    "embedding twice": lambda: Model(
        lambda s, x: s.h(s.a(s.e(x) + s.e(x.flip(1)) * 2 + s.p(torch.arange(x.shape[1]))).tanh().mean(1)),
        e=nn.Embedding(20, WIDTH), p=nn.Embedding(9, WIDTH),
    ),
    "embedding bag": lambda: Model(lambda s, x: s.h(s.a(s.e(x)).tanh()), e=nn.EmbeddingBag(20, WIDTH, mode="mean")),
    "rows by number": lambda: Model(
        lambda s, x: s.h(s.a(s.e[x] + s.e.index_select(0, x.flatten()).view(*x.shape, -1)).mean(1)), e=random(20, WIDTH)
    ),
}  # fmt: skip
OF_TOKENS = {name for name in MODELS if name.startswith(("embedding", "sparse", "rows"))}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_single_passes(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    batch = helpers.token_batch() if name in OF_TOKENS else helpers.batch(dtype=torch.float64)
    found, expected = split_gradients(model, batch), single_gradients(model, batch)
    assert {key for key, grad in expected.items() if grad.to_dense().any()} <= found.keys()
    for (param, example), grad in found.items():
        of_one = expected[param, example].to_dense()
        assert (grad - of_one).abs().max() <= 1e-12 * max(1e-3, of_one.abs().max()), param


def test_every_rule_is_used(monkeypatch):
    used = set()

    def noting(key, rule):
        def noted(*arguments):
            used.add(key)
            return rule(*arguments)

        return noted

    for key, rule in list(rules._RULES.items()):
        monkeypatch.setitem(rules._RULES, key, noting(key, rule))
    for name in MODELS:
        test_gradients_are_those_of_single_passes(name)
    assert used == rules._RULES.keys()


@pytest.mark.parametrize("name", ["addmm", "layer norm", "embedding twice", "conv 1d", "LSTM", "a layer in a loop"])
@pytest.mark.parametrize("fault", ["a factor", "exchanged"])
def test_the_trial_finds_a_wrong_rule(monkeypatch, name, fault):
    """A thousandth too much is found, and the first two examples one for the other."""
    right = split.of_examples

    def wrong(place, grad):
        gradients = right(place, grad)

        def changed(begin, end):
            of_each = list(gradients(begin, end))
            if fault == "exchanged" and begin == 0 and len(of_each) > 1:
                return [of_each[1], of_each[0], *of_each[2:]]
            return [g._replace(values=g.values * 1.001) if isinstance(g, rules.Rows) else g * 1.001 for g in of_each]

        return changed

    monkeypatch.setattr(split, "of_examples", wrong)
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with pytest.raises(NotCovered, match="are not those of the examples alone"):
        split_gradients(model, helpers.token_batch() if name in OF_TOKENS else helpers.batch())
