"""Losses: what is taken for one, as Trainer takes it, and sentences for what goes wrong in the model or in torch."""

import pytest
import torch
from fisher_models import estimate, loss_fn, make_batches, make_model
from models import family
from torch import nn

from childtune_fast import estimate_fisher

RNN = "cudnn RNN backward can only be called in training mode"  # in torch's aten/src/ATen/native/cudnn/RNN.cpp


class Model(nn.Module):
    """Returns whatever `output` makes of the loss and the logits."""

    def __init__(self, output, training_only=False):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.output, self.training_only = output, training_only

    def forward(self, x, labels):
        logits = self.layer(x)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.training_only and not self.training:
            return self.training_only(loss, logits)
        return self.output(loss, logits)


def batches_of(count=3):
    return [{"x": batch["x"], "labels": batch["y"][0]} for batch in make_batches(count=count)]


def scores_of(model, **options):
    return estimate_fisher(model, batches_of(), **{"progress": False, **options})


def same_scores(found, expected):
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- What is a loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [
        lambda loss, logits: {"logits": logits, "loss": loss},
        lambda loss, logits: (loss, logits),
        lambda loss, logits: (loss,),
        lambda loss, logits: [loss, {"logits": logits}],
        lambda loss, logits: {"loss": loss, "aux_loss": 3 * loss},
    ],
    ids=["dict", "tuple", "tuple of one", "list", "dict of losses with the loss"],
)
def test_what_trainer_takes_for_the_loss(output):
    torch.manual_seed(0)
    model = Model(output)
    expected = scores_of(model, loss_fn=lambda m, b: nn.functional.cross_entropy(m.layer(b["x"]), b["labels"]))
    assert same_scores(scores_of(model), expected)


def test_a_tuple_of_a_transformers_model():
    model = family("BERT", num_labels=3)[0]
    batches = [{"input_ids": torch.randint(3, 40, (4, 8)), "labels": torch.tensor([0, 1, 2, 0])}]
    expected = estimate_fisher(model, batches, progress=False)
    batches[0]["return_dict"] = False
    assert same_scores(estimate_fisher(model, batches, progress=False), expected)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda loss, logits: (logits, loss), "tuple"),
        (lambda loss, logits: (), "tuple"),
        (lambda loss, logits: (logits[:1, 0], logits), "tuple"),  # one number, but a logit
        (lambda loss, logits: loss, "Tensor"),
        (lambda loss, logits: {"logits": logits}, "dict"),
        (lambda loss, logits: {"loss": None, "logits": logits}, "dict"),
    ],
)
def test_what_is_no_loss(output, got):
    with pytest.raises(TypeError, match=rf"with a loss \(got {got}\); pass loss_fn=lambda model, batch: \.\.\., which"):
        scores_of(Model(output))


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (lambda loss, logits: {"loss_a": loss, "loss_b": 2 * loss}, "sum(model(**batch).values())"),
        (
            lambda loss, logits: {"loss_a": loss, "logits": logits, "loss_b": 2 * loss},
            "sum(model(**batch)[name] for name in ['loss_a', 'loss_b'])",
        ),
        (lambda loss, logits: {"loss_a": 3 * loss, "logits": logits}, "model(**batch)['loss_a']"),
    ],
    ids=["losses alone", "losses beside logits", "one loss of another name"],
)
def test_several_losses_and_the_code_that_adds_them_up(output, code):
    torch.manual_seed(0)
    model = Model(output)
    with pytest.raises(TypeError, match=r"\(got dict with loss_a") as error:
        scores_of(model)
    assert f"pass loss_fn=lambda model, batch: {code}, which returns the loss" in str(error.value)
    scores = scores_of(model, loss_fn=lambda model, batch: eval(code, {"model": model, "batch": batch}))
    expected = scores_of(model, loss_fn=lambda m, b: 3 * nn.functional.cross_entropy(m.layer(b["x"]), b["labels"]))
    torch.testing.assert_close(scores, expected)
    output = code.replace("model(**batch)", "output")
    with pytest.raises(ValueError, match=r"batch 0: the loss must be a tensor of one number") as error:
        scores_of(model, loss_fn=lambda model, batch: model(**batch))
    assert str(error.value).endswith(f"; return {output}")


# ---- Models that compute their loss in training mode only ----------------------------------------------------------


def raises(error):
    def forward(*_):
        raise error

    return forward


NO_LOSS = {
    "a list": lambda loss, logits: [{"boxes": logits}],
    "no loss": lambda loss, logits: {"logits": logits},
    "a loss without a graph": lambda loss, logits: {"loss": loss.detach()},
    "an error": raises(UnboundLocalError("local variable 'loss' referenced before assignment")),
    "torch's error": raises(RuntimeError("shapes")),
}


@pytest.mark.parametrize("in_evaluation", NO_LOSS.values(), ids=NO_LOSS)
@pytest.mark.parametrize("fn", [None, lambda model, batch: model(**batch)["loss"]], ids=["own loss", "loss_fn"])
@pytest.mark.parametrize("per_example", [False, True])
def test_a_loss_in_training_mode_only(fn, in_evaluation, per_example):
    model = Model(lambda loss, logits: {"loss": loss}, in_evaluation).train()
    where = "batch 0, example 0" if per_example else "batch 0"
    expected = rf"{where}: in evaluation mode the model must compute its loss \(got .*pass train_mode=True"
    with pytest.raises(ValueError, match=expected) as error:
        scores_of(model, loss_fn=fn, per_example=per_example)
    assert error.value.__cause__ is not None
    assert model.training
    assert scores_of(model, loss_fn=fn, per_example=per_example, train_mode=True)


def test_a_detection_model():
    """As torchvision's: several losses in training mode, boxes in evaluation mode; batches of images and targets."""
    model = Model(lambda loss, logits: {"loss_box": loss, "loss_class": loss}, lambda loss, logits: [{"boxes": logits}])
    options = {"loss_fn": lambda model, batch: sum(model(*batch).values()), "progress": False}
    batches = [tuple(batch.values()) for batch in batches_of()]
    with pytest.raises(ValueError, match=r"\(got AttributeError, and a loss in training mode only\); pass train_mode"):
        estimate_fisher(model, batches, **options)
    assert estimate_fisher(model, batches, train_mode=True, **options)


def test_an_error_in_both_modes_is_raised_as_it_is():
    calls = []

    def fails(model, batch):
        calls.append(model.training)
        raise ZeroDivisionError("mine")

    model = make_model(dropout=0.5).eval()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        estimate(model, make_batches(), loss_fn=fails)
    assert calls == [False, True]
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError):
        estimate(model, make_batches(), loss_fn=fails, train_mode=True)
    assert calls == [False, True, True]


def test_no_second_try_after_memory_ran_out():
    calls = []

    def fails(model, batch):
        calls.append(model.training)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        estimate(make_model(), make_batches(), loss_fn=fails)
    assert calls == [False]


def test_a_loss_that_is_not_finite_has_another_cause():
    model = make_model(dropout=0.5)
    with pytest.raises(ValueError, match="batch 0: the loss must be finite"):
        estimate(model, make_batches(), loss_fn=lambda m, b: loss_fn(m, b) / float(m.training))


# ---- Recurrent layers of cuDNN -------------------------------------------------------------------------------------


class CudnnLike(torch.autograd.Function):
    """Stands in for a layer of cuDNN, whose backward pass raises what torch's own does."""

    @staticmethod
    def forward(ctx, x, training):
        ctx.works = training or not torch.backends.cudnn.enabled
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if not ctx.works:
            raise RuntimeError(RNN)
        return grad, None


class Recurrent(nn.Module):
    def __init__(self, always_in_evaluation=False):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.always_in_evaluation = always_in_evaluation

    def forward(self, x):
        return CudnnLike.apply(self.layer(x), self.training and not self.always_in_evaluation)


def itself_backward(model, batch):
    torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
    return loss_fn(model, batch)


@pytest.mark.parametrize("fn", [loss_fn, itself_backward], ids=["in the backward pass", "in the loss"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.filterwarnings("ignore:estimate_fisher. .*slower way", "ignore:.*since torch.func.vmap cannot run")
def test_a_recurrent_layer_in_evaluation_mode(fn, per_example):
    options = {"loss_fn": fn, "per_example": per_example}
    with pytest.raises(RuntimeError, match=r"recurrent layers on a GPU .*; pass train_mode=True, or, without dropout,"):
        estimate(Recurrent(), make_batches(), **options)
    assert estimate(Recurrent(), make_batches(), train_mode=True, **options)
    frozen = Recurrent(always_in_evaluation=True)
    with pytest.raises(RuntimeError, match=r"\(got one in evaluation mode\); estimate inside of `with torch.backends"):
        estimate(frozen, make_batches(), train_mode=True, **options)
    with torch.backends.cudnn.flags(enabled=False):
        assert estimate(frozen, make_batches(), **options)


def test_another_error_of_the_backward_pass_is_raised_as_it_is():
    class Fails(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        estimate(make_model(), make_batches(), loss_fn=lambda m, b: Fails.apply(loss_fn(m, b)))
