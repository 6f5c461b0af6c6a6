"""What estimate_fisher refuses, and the sentences that say so."""

import pytest
import torch
from fisher_models import SIZE, estimate, loss_fn, make_batches, make_model


@pytest.mark.parametrize("per_example", [False, True])
def test_a_loss_that_is_not_finite_names_its_batch(per_example):
    batches = make_batches()
    batches[3]["x"][2] = float("nan")
    with pytest.raises(ValueError, match=r"batch 3(, example 2)?: the loss must be finite \(got \["):
        estimate(make_model(), batches, per_example=per_example)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_gradient_that_is_not_finite_names_batch_and_parameter(monkeypatch, per_example, backend):
    """The root of zero has a loss, and no gradient."""
    monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
    batches = make_batches()

    def loss(model, batch):
        output = model(batch["x"])
        zero = (output * batch["zero"][:, None]).square().sum() if "zero" in batch else output.square().sum()
        return zero.sqrt()

    for i, batch in enumerate(batches):
        batch["zero"] = torch.zeros(SIZE) if i == 2 else torch.ones(SIZE)
    with pytest.raises(
        ValueError, match=r"batch 2(, example 0)?: the gradient of '\d\.\w+' and of 3 more must be finite"
    ):
        estimate(make_model(), batches, loss_fn=loss, per_example=per_example)


def test_empty_loader_raises():
    with pytest.raises(ValueError, match="dataloader must yield at least one batch"):
        estimate(make_model(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_clip": 0}, r"grad_clip must be a number above 0.*\(got 0\)"),
        ({"grad_clip": -1.0}, r"grad_clip must be a number above 0.*\(got -1.0\)"),
        ({"grad_clip": float("nan")}, "grad_clip must be a number above 0"),
        ({"offload": "disk"}, r"offload must be 'cpu', or None .*\(got 'disk'\)"),
        ({"max_batches": 0}, r"max_batches must be a whole number above 0.*\(got 0\)"),
        ({"names": "nothing like it"}, r"must select at least one .*\(got none of 4: 0.weight, "),
        ({"loss_fn": lambda model, batch: model(batch["x"])}, r"batch 0: the loss must be a tensor of one number"),
        ({"loss_fn": lambda model, batch: 1.0}, r"batch 0: .*\(got float\)"),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch).detach()}, r"batch 0: .*do not detach"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(make_model(), make_batches(), **options)


def test_unknown_loss_raises_with_the_remedy():
    with pytest.raises(TypeError, match=r"mapping with 'labels' \(got keys x, y\); pass loss_fn=lambda"):
        estimate(make_model(), make_batches(), loss_fn=None)
    with pytest.raises(TypeError, match=r"mapping with 'labels' \(got Tensor\); pass loss_fn"):
        estimate(make_model(), [torch.zeros(2)], loss_fn=None)
    model = make_model()
    model.forward = lambda x, labels: x
    with pytest.raises(TypeError, match=r"output with a loss \(got Tensor\); pass loss_fn"):
        estimate(model, [{"x": torch.zeros(1), "labels": 1}], loss_fn=None)


def test_hooks_that_may_change_weights_are_refused():
    model = make_model()
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="no post-accumulate-grad hooks"):
        estimate(model, make_batches())
    handle.remove()
    estimate(model, make_batches())
