"""estimate_fisher leaves everything as it was, also when it raises."""

import contextlib
import random

import numpy as np
import pytest
import torch
from fisher_models import SIZE, estimate, loss_fn, make_batches, make_model
from helpers import same_bits
from tensor_kinds import KINDS, META, made
from torch import nn

from childtune_fast.ops import tensor_parts


def everything_of(model):
    return (
        [module.training for module in model.modules()],
        [(p, p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
        [(name, b, b.clone(), b._version) for name, b in model.named_buffers()],
        (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
    )


def assert_as_it_was(before, after, *, versions):
    assert before[0] == after[0]
    for (p, value, grad, grad_value), (q, value2, grad2, grad_value2) in zip(before[1], after[1], strict=True):
        assert p is q
        assert grad is grad2
        assert same_bits(value, value2)
        assert grad is None or same_bits(grad_value, grad_value2)
    assert before[2:5] == after[2:5]
    for (name, b, value, version), (name2, b2, value2, version2) in zip(before[5], after[5], strict=True):
        assert name == name2
        assert b is b2
        assert same_bits(value, value2)
        assert version == version2 or not versions
    assert torch.equal(before[6][0], after[6][0])
    assert before[6][1] == after[6][1]
    np.testing.assert_equal(before[6][2], after[6][2])


def busy_model():
    """Dropout, batch norm, mixed training flags, a frozen part, gradients on some parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.eval()
    model[2].train()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones(3, 8)
    model[0].bias.grad = torch.ones(8)
    return model


def draws(model, batch):
    random.random()
    np.random.rand()  # noqa: NPY002
    return loss_fn(model, batch)


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.filterwarnings("ignore:estimate_fisher")  # batch norm writes its statistics, which vmap refuses
def test_everything_is_left_as_it_was(train_mode, per_example):
    model = busy_model()
    size = 1 if per_example and train_mode else SIZE
    if size == 1:  # batch norm needs more than one value
        model[1].forward = lambda x: nn.functional.batch_norm(
            x.expand(2, -1), model[1].running_mean, model[1].running_var, training=True
        )[: len(x)]
    before = everything_of(model)
    scores = estimate(model, make_batches(), loss_fn=draws, train_mode=train_mode, per_example=per_example)
    assert_as_it_was(before, everything_of(model), versions=not train_mode)
    assert not any(score.requires_grad for score in scores.values())


@pytest.mark.parametrize("when", ["loader", "loss", "backward", "interrupt"])
def test_everything_is_left_as_it_was_after_an_exception(when):
    model = busy_model()
    error = {"interrupt": KeyboardInterrupt}.get(when, ZeroDivisionError)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise error

    def batches():
        for i, batch in enumerate(make_batches()):
            if i == 3 and when == "loader":
                raise error
            yield {**batch, "i": i}

    def loss(model, batch):
        loss = draws(model, batch)
        if batch["i"] == 3 and when in ("loss", "interrupt"):
            raise error
        return Fails.apply(loss) if batch["i"] == 3 else loss

    before = everything_of(model)
    with pytest.raises(error):
        estimate(model, batches(), loss_fn=loss, train_mode=True)
    assert_as_it_was(before, everything_of(model), versions=False)


def test_replaced_buffers_come_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1
            return self.inner(x)

    model = Counts()
    seen = model.seen
    estimate(model, make_batches())
    assert model.seen is seen
    assert seen == 0


def test_under_no_grad_and_inference_mode():
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            scores = estimate(model, batches)
        assert all(same_bits(scores[name], expected[name]) for name in scores)


def test_scores_do_not_depend_on_present_gradients():
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    assert all(same_bits(s, expected[n]) for n, s in estimate(model, batches).items())


# ---- Buffers of every kind -----------------------------------------------------------------------------------------


def with_buffer(buffer):
    model = make_model()
    model[1].register_buffer("held", buffer)
    return model


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    ("make", "change"), [(make, change) for make, changes in [*KINDS.values(), META] for change in changes]
)
def test_a_buffer_of_any_kind_that_changes_comes_back(make, change, replace):
    buffer = made(make)
    model = with_buffer(buffer)
    before = tensor_parts.copied(buffer)

    def loss(model, batch):
        if model[1].held is buffer:
            made(lambda: change(buffer))
        if replace:
            model[1].held = torch.zeros(1)
        return loss_fn(model, batch)

    scores = estimate(model, make_batches(), loss_fn=loss)
    expected = estimate(make_model(), make_batches())
    assert model[1].held is buffer
    assert tensor_parts.same_bits(buffer, before)
    assert all(same_bits(score, expected[name]) for name, score in scores.items())


@pytest.mark.parametrize("make", [make for make, _ in [*KINDS.values(), META]], ids=[*KINDS, "meta"])
def test_a_buffer_of_any_kind_that_stays_is_not_written(make):
    buffer = made(make)
    model = with_buffer(buffer)
    version = None if buffer.is_inference() else buffer._version
    batches = make_batches()
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            estimate(model, batches)
    assert model[1].held is buffer
    assert buffer.is_inference() if version is None else buffer._version == version


def never():
    raise AssertionError("a batch was asked for")
    yield


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, 2).to_mkldnn(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        nn.UninitializedBuffer,
    ],
)
def test_a_buffer_that_could_not_be_restored_is_named_before_the_first_batch(make):
    model = with_buffer(made(make))
    before = [(param, param.grad) for param in model.parameters()]
    with pytest.raises(
        ValueError, match=r"buffers must be of a kind that can be restored .*\(got '1\.held': .*replace"
    ):
        estimate(model, never())
    assert all(param.grad is grad for param, grad in before)
    assert model.training


@pytest.mark.parametrize("make", [make for make, _ in [*KINDS.values(), META]], ids=[*KINDS, "meta"])
def test_a_frozen_parameter_of_any_kind_does_not_hurt(make):
    model = make_model()
    model.held = nn.Parameter(made(make), requires_grad=False)
    expected = estimate(make_model(), make_batches())
    assert all(same_bits(score, expected[name]) for name, score in estimate(model, make_batches()).items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, device="meta"), r"must have values \(got 'held', which is meta\); load"),
        (nn.UninitializedParameter, r"must have values \(got 'held', which is uninitialized\)"),
        (KINDS["COO"][0], r"must be dense and of .*\(got 'held', sparse_coo, torch.float32\)"),
        (KINDS["CSR"][0], r"\(got 'held', sparse_csr, torch.float32\)"),
        (KINDS["float8"][0], r"\(got 'held', dense, torch.float8_e4m3fn\)"),
        (KINDS["complex"][0], r"\(got 'held', dense, torch.complex64\)"),
    ],
)
def test_a_parameter_that_cannot_be_scored_is_named_before_the_first_batch(make, message):
    model = make_model()
    model.held = made(lambda: nn.Parameter(make()) if make is not nn.UninitializedParameter else make())
    with pytest.raises(ValueError, match=message):
        estimate(model, never())
    if make is not nn.UninitializedParameter:  # to which torch attaches no hook
        assert list(estimate(model, make_batches(), names=r"^\d")) == list(estimate(make_model(), make_batches()))


# ---- What goes wrong in between ------------------------------------------------------------------------------------


def test_what_cannot_be_restored_is_told_and_costs_neither_the_scores_nor_the_rest(monkeypatch):
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            if mode and not self.training:
                raise ZeroDivisionError("no way back")
            return super().train(mode)

    model = Stubborn(*busy_model()).train()
    model.register_buffer("lost", torch.ones(5))
    model.register_buffer("other", torch.ones(5))
    before = everything_of(model)
    weight = model[3].weight.data

    def loss(model, batch):
        model.lost += 1
        model.other += 1
        model[3].weight.data = weight.double()  # its gradient is of float32
        last = nn.functional.linear(model[:3](batch["x"]), model[3].weight.float())
        return nn.functional.cross_entropy(last, batch["y"][0])

    def overwrite(tensor, values):
        if tensor is model.lost:
            raise RuntimeError("out of memory")
        tensor_parts.overwrite(tensor, values)

    monkeypatch.setattr("childtune_fast.fisher.restore.overwrite", overwrite)
    message = (
        r"\(could not restore the mode by train\(\) \(ZeroDivisionError: no way back\); buffer 'lost' \(RuntimeError: "
        r"out of memory\)\); the scores are valid"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        scores = estimate(model, make_batches(), loss_fn=loss, names=r"^0\.weight")
    assert len(warned) == 1
    assert scores["0.weight"].all()
    model.lost.fill_(1)
    assert_as_it_was(before, everything_of(model), versions=False)
