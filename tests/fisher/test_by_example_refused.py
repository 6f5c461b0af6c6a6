"""Where a batch's backward pass cannot be taken apart by examples, a slower way gives the same scores."""

import warnings

import by_example_helpers as helpers
import pytest
import torch
import torch.utils.checkpoint
from by_example_helpers import HIDDEN, WIDTH, Model, batch, check_scores, loss_of, plain, random
from torch import nn
from torch.nn import functional as F

from childtune_fast import estimate_fisher

ALONE, DIFFERENTLY = "are not those of the examples alone", "computes differently"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def centered(share, when=lambda s, z: True):
    """A model that mixes the examples of a batch."""
    return Model(
        lambda s, x: (lambda z: s.h(z - share * z.mean(0) if when(s, z) else z))(s.a(s.d(x)).tanh().mean(1)),
        d=nn.Dropout(1e-12),
    )


MIXING = {
    "a mean": (centered(1), {}, ALONE),
    "a thousandth of a mean": (centered(1e-3), {}, ALONE),
    "in training mode": (centered(1, lambda s, z: s.training), {"train_mode": True}, ALONE),
    "in large batches": (centered(1, lambda s, z: len(z) > 4), {}, DIFFERENTLY),
    "a norm of the batch": (Model(lambda s, x: (lambda z: s.h(z / z.norm().detach()))(s.a(x).mean(1))), {}, ALONE),
    "two halves": (
        Model(lambda s, x: s.h((lambda p, q: p - q / 3)(*s.a(torch.cat([x, x * 2])).chunk(2))[:, 0])),
        {},
        "",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_examples(name):
    model, options, reason = MIXING[name]
    check_scores(model, [batch(), batch(5)], refused=reason, **options)


def test_batch_norm_in_training_mode():
    """Beside dropout, whose random numbers differ from pass to pass."""
    model = Model(lambda s, x: s.h(s.b(s.a(s.d(x)).tanh()).mean(1)), b=nn.BatchNorm1d(5), d=nn.Dropout(1e-12))
    check_scores(model, [batch()], refused=ALONE, train_mode=True)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 1))


def kept(s, x):
    s.features = s.a(x).tanh()
    return s.h(s.features.mean(1))


def masked(s, x):
    used = torch.zeros(len(x), 5, dtype=torch.bool)
    used[:, :2] = True  # the same number of every example, but that cannot be known
    return s.h(s.a(x)[used].tanh().view(len(x), 2, -1).mean(1))


def with_adversary(model, batch):
    x = batch["x"].detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(model, {**batch, "x": x}), x)
    return loss_of(model, batch) + loss_of(model, {**batch, "x": batch["x"] + 0.1 * grad.sign()})


def in_place(model, batch):
    return F.cross_entropy(model(batch["x"]).mul_(2), batch["y"])


def penalized(model, batch):
    return loss_of(model, batch) + 0.1 * model.a.weight.pow(2).sum()


def of_features(model, batch):
    return loss_of(model, batch) + model.features.pow(2).mean()


def reentrant(s, x):
    hidden = torch.utils.checkpoint.checkpoint(lambda x: s.a(x).tanh(), x.requires_grad_(), use_reentrant=True)
    return s.h(hidden.mean(1))


def dropping(s, x):
    """What fails in between must not leave the model in training mode."""
    return s.h(s.d(s.a(x)).mean(1))


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = random(WIDTH, 3)

    def forward(self, x):
        return (x.mean(1) @ self.w).sum(0, keepdim=True) / len(x)


REFUSED = {
    "a function of one's own": (
        plain(a=Model(lambda s, x: Scaled.apply(s.a(x), s.w), w=random(HIDDEN))),
        loss_of,
        "call",
    ),
    "features that are kept": (Model(kept), of_features, "RuntimeError"),
    "a mask": (Model(masked), loss_of, "selects elements by their values"),
    "gradients within the loss": (Model(dropping, d=nn.Dropout(0.5)), with_adversary, "RuntimeError"),
    "a write in place": (plain(), in_place, "in-place"),
    "a weight in the loss": (plain(), penalized, "'a.weight' is used inside and outside of the modules"),
    "a reentrant checkpoint": (Model(reentrant), loss_of, ALONE),
    "no pieces": (Root(), lambda m, b: F.cross_entropy(m(b["x"]), b["y"][:1]), "no module of the model returns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    model, loss, reason = REFUSED[name]
    check_scores(model, [batch(), batch(4)], loss, refused=reason)


def test_an_embedding_that_counts_indices():
    model = Model(lambda s, x: s.h(s.a(s.e(x)).mean(1)), e=nn.Embedding(20, WIDTH, scale_grad_by_freq=True))
    check_scores(model, [helpers.token_batch()], refused="frequencies")


def test_large_parameters_outside_of_the_modules(monkeypatch):
    def loss(model, batch):
        return F.cross_entropy(F.linear(model(batch["x"]), model.t), batch["y"])

    monkeypatch.setattr("childtune_fast.fisher.by_example._MOST_HELD", 10)
    check_scores(plain(t=random(3, 3)), [batch()], loss, refused="large parameters are used outside of the modules")


def test_graphs_that_differ_from_batch_to_batch():
    """As many as there are plans are taken apart."""

    def function(s, x):
        z = s.a(x)
        for _ in range(x.shape[1]):
            z = s.r(z).tanh()
        return s.h(z.mean(1))

    model = Model(function, r=nn.Linear(HIDDEN, HIDDEN))
    _, taken = check_scores(model, [batch(8, length) for length in range(2, 12)], refused=DIFFERENTLY)
    assert len(taken) == 8


def test_an_error_of_a_later_batch():
    """One that only the batch leads to, and no example alone."""

    def function(s, x):
        if len(x) == 5:
            raise KeyError("five")
        return s.h(s.a(x).tanh().mean(1))

    _, taken = check_scores(Model(function), [batch(), batch(5), batch()], refused="KeyError: 'five'")
    assert taken == [8]


def test_an_error_before_the_first_gradient(monkeypatch):
    def fail(*_):
        raise IndexError("mine")

    monkeypatch.setattr("childtune_fast.fisher.split.SplitPass._place", fail)
    check_scores(plain(), [batch()], refused="IndexError: mine")


def test_an_error_after_a_gradient_is_raised(monkeypatch):
    from childtune_fast.fisher.split import SplitPass

    place, calls = SplitPass._place, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 7:  # the trial has four uses
            raise IndexError("mine")
        return place(*arguments)

    monkeypatch.setattr(SplitPass, "_place", fail)
    with pytest.raises(IndexError, match="mine"):
        estimate_fisher(plain(), [batch()], loss_fn=loss_of, per_example=True, progress=False)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("whole", [False, True])
def test_modules_of_torch_jit(whole):
    """They keep their own `forward`, which is no attribute of theirs."""
    inner = torch.jit.trace(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3)), torch.randn(4, 6))
    data = {"x": torch.randn(8, WIDTH), "y": torch.arange(8) % 3}
    model = inner if whole else nn.Sequential(inner, nn.Identity())
    before = model(data["x"])
    check_scores(model, [data])
    assert torch.equal(model(data["x"]), before)


def test_a_compiled_model():
    model = torch.compile(plain(), backend="eager")
    check_scores(model, [batch()])


def test_a_forward_of_ones_own_is_put_back():
    model = plain()
    forward = model.a.forward
    model.a.forward = own = lambda x: forward(x) * 2
    check_scores(model, [batch()])
    assert model.a.forward is own


def test_random_states_are_restored():
    model = centered(0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_fisher(model, [batch()], loss_fn=loss_of, per_example=True, progress=False, train_mode=True)
        torch.manual_seed(3)
        assert torch.equal(torch.get_rng_state(), state)
        data = [batch()]
        before = torch.get_rng_state()
        estimate_fisher(model, data, loss_fn=loss_of, per_example=True, progress=False, train_mode=True)
        assert torch.equal(torch.get_rng_state(), before)
