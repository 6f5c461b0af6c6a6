"""estimate_fisher leaves weights that a loss writes as they were, or says which it cannot restore."""

import copy
import gc

import pytest
import torch
from fisher_models import estimate, loss_fn, make_batches, make_model
from helpers import same_bits
from restored import Tokens, assert_same_weights, bits_of
from torch import nn
from torch.nn import functional

from childtune_fast.fisher.weights import Weights


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("model", [Tokens(), Tokens(nn.EmbeddingBag), Tokens(checkpointed=True)], ids=str)
@pytest.mark.filterwarnings("ignore:estimate_fisher.*vmap")
def test_a_table_with_max_norm(model, per_example):
    model = copy.deepcopy(model)
    before = bits_of(model)
    model(make_batches()[0]["x"])
    assert not same_bits(model.table.weight.detach(), before["table.weight"][2])
    model.table.weight.data.copy_(before["table.weight"][2])
    scores = estimate(model, make_batches(), per_example=per_example)
    assert scores["table.weight"].any()
    assert_same_weights(model, before)


class ActNorm(nn.Module):
    """An affine layer that its first batch initialises."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.initialised = False

    def forward(self, x):
        if self.training and not self.initialised:
            self.scale.data.copy_(1 / x.detach().std(0, unbiased=False).clamp(min=0.1))
            self.shift.data = -x.detach().mean(0) * self.scale.data
            self.initialised = True
        return x * self.scale + self.shift


def test_an_initialisation_by_the_first_batch_happens_again_in_training():
    model, other = (nn.Sequential(ActNorm(), *make_model()) for _ in range(2))
    before = bits_of(model)
    first, second = make_batches()[:2]
    estimate(model, [first], train_mode=True)
    assert_same_weights(model, before)
    assert not model[0].initialised
    for each in (model, other):
        each.train()(second["x"])
        assert not same_bits(each[0].scale.detach(), before["0.scale"][2])
    assert same_bits(model[0].scale.detach(), other[0].scale.detach())
    assert same_bits(model[0].shift.detach(), other[0].shift.detach())


def replaced(model):
    model[3].weight = nn.Parameter(model[3].weight.detach() * 2)


def replaced_by_a_buffer(model):
    weight = model[3].weight
    del model[3].weight
    model[3].weight = weight.detach() * 2


def deleted(model):
    if "bias" in model[0]._parameters:
        del model[0].bias
        model[0].bias = None


def stepped(model):
    params = [param for param in model.parameters() if param.requires_grad]
    torch._foreach_mul_([param.data for param in params], 0.9)


def changed_dtype(model):
    model.double().float()


def registered(model):
    if "extra" not in model[3]._modules:
        model[3].extra = nn.Linear(2, 2)
        model[3].register_parameter("own", nn.Parameter(torch.ones(2)))


WRITES = {
    "clamp_": lambda model: model[3].weight.clamp_(-0.01, 0.01),
    "data.mul_": lambda model: model[3].weight.data.mul_(0.9),
    "a view": lambda model: model[0].weight.detach().view(-1)[3:5].zero_(),
    "out=": lambda model: torch.mul(model[3].bias, 2, out=model[3].bias),
    "data=": lambda model: setattr(model[3].weight, "data", model[3].weight.data * 0.9),
    "data=, then a write": lambda model: (
        setattr(model[3].weight, "data", model[3].weight.data * 0.9),
        model[3].weight.data.mul_(0.9),
    ),
    "a write, then data=": lambda model: (
        model[3].weight.data.mul_(0.9),
        setattr(model[3].weight, "data", model[3].weight.data * 0.9),
    ),
    "inference mode": lambda model: torch.inference_mode()(model[3].weight.data.mul_)(0.9),
    "several": stepped,
    "replaced": replaced,
    "replaced by a buffer": replaced_by_a_buffer,
    "deleted": deleted,
    "changed dtype": changed_dtype,
    "registered": registered,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("when", ["always", "fails"])
def test_a_write_in_the_loss(write, when):
    model = make_model()
    before, modules = bits_of(model), list(model.modules())
    attributes = [sorted(vars(module)) for module in modules]

    def loss(model, batch):
        with torch.no_grad():
            WRITES[write](model)
        if when == "fails":
            raise ZeroDivisionError
        return loss_fn(model, batch)

    if when == "fails":
        with pytest.raises(ZeroDivisionError):
            estimate(model, make_batches(), loss_fn=loss)
    else:
        estimate(model, make_batches(), loss_fn=loss, names=r"^0\.weight")
    assert_same_weights(model, before)
    assert list(model.modules()) == modules
    assert [sorted(vars(module)) for module in modules] == attributes


def test_a_step_within_the_loss():
    """An optimizer's step changes all weights, and with momentum also in later batches."""
    model = make_model()
    before = bits_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, batch):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()
        return loss_fn(model, batch)

    estimate(model, make_batches(), loss_fn=loss)
    assert_same_weights(model, before)


def test_once_something_was_written_later_batches_are_watched_too():
    model, count = make_model(), 0
    before = bits_of(model)

    def loss(model, batch):
        nonlocal count
        model[count % 4].bias.data.mul_(0.9) if count % 4 in (0, 3) else None
        count += 1
        return loss_fn(model, batch)

    estimate(model, make_batches(), loss_fn=loss)
    assert count == 5
    assert_same_weights(model, before)


def test_a_table_with_max_norm_that_a_later_batch_is_the_first_to_use():
    model, count = Tokens(), 0
    before = bits_of(model)

    def loss(model, batch):
        nonlocal count
        count += 1
        return functional.cross_entropy((model if count == 3 else model.rest)(batch["x"]), batch["y"][0])

    estimate(model, make_batches(), loss_fn=loss)
    assert_same_weights(model, before)


def test_scores_are_of_the_weights_that_were_written():
    model, clamped = make_model(), make_model()
    with torch.no_grad():
        clamped[3].weight.clamp_(-0.01, 0.01)
    expected = estimate(clamped, make_batches())
    scores = estimate(
        model, make_batches(), loss_fn=lambda m, b: (m[3].weight.data.clamp_(-0.01, 0.01), loss_fn(m, b))[1]
    )
    assert all(same_bits(scores[name], expected[name]) for name in scores)


def test_weights_in_one_memory_come_back_together():
    model = make_model()
    together = torch.randn(250, generator=torch.Generator().manual_seed(1))
    model[0].weight.data = together[1:241].view(40, 6)  # at an address that no wide read may begin at
    model[3].bias.data = together[241:244]
    before = bits_of(model)
    estimate(model, make_batches(), loss_fn=lambda m, b: (together.mul_(0.9), loss_fn(m, b))[1])
    assert_same_weights(model, before)


def test_only_written_weights_are_copied(monkeypatch):
    copies = []

    def noted(tensor):
        copies.append(tensor.data_ptr())
        return copied(tensor)

    from childtune_fast.fisher import weights

    copied = weights.copied
    monkeypatch.setattr(weights, "copied", noted)
    model = make_model()
    estimate(model, make_batches())
    assert copies == []
    estimate(model, make_batches(), loss_fn=lambda m, b: (m[3].bias.data.mul_(0.9), loss_fn(m, b))[1])
    assert copies == [model[3].bias.data_ptr()]


# ---- What cannot be restored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in a later batch", "behind torch's back"])
def test_a_write_that_cannot_be_undone_is_named(how):
    model, count = make_model(), 0
    array = model[3].bias.detach().numpy()

    def loss(model, batch):
        nonlocal count
        count += 1
        if how == "behind torch's back":
            array[0] += 1
        elif count == 3:
            model[3].bias.data[0] += 1
        return loss_fn(model, batch)

    with pytest.raises(ValueError, match=r"must write weights in the first batch .*\(got others in '3\.bias'\); load"):
        estimate(model, make_batches(), loss_fn=loss)
    assert all(param.grad is None for param in model.parameters())


def test_weights_that_an_error_in_the_loss_left_changed_are_told_beside_it():
    model = make_model()
    array = model[3].bias.detach().numpy()

    def loss(model, batch):
        array[0] += 1
        raise ZeroDivisionError

    with (
        pytest.warns(UserWarning, match=r"could not restore all weights .*'3\.bias'"),
        pytest.raises(ZeroDivisionError),
    ):
        estimate(model, make_batches(), loss_fn=loss)


def test_copies_are_freed_at_once():
    model = Tokens()
    gc.collect()
    gc.disable()
    try:
        before = {id(thing) for thing in gc.get_objects()}
        estimate(model, make_batches())
        left = [thing for thing in gc.get_objects() if type(thing) is Weights and id(thing) not in before]
    finally:
        gc.enable()
    assert left == []


def never():
    raise AssertionError("a batch was asked for")
    yield


def test_a_lazy_module_is_named_before_the_first_batch():
    model = make_model()
    model.later = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"must be initialised \(got 'later\.weight', .*run the model"):
        estimate(model, never(), names=r"^0")
    model.later(torch.ones(2, 3))
    estimate(model, make_batches(), names=r"^0")
