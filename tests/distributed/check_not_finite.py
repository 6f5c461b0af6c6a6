"""A loss or a gradient that is not finite on one rank: all ranks raise, or all leave the batch out."""

import warnings

import pytest
import torch
from sharded_models import (
    BATCHES,
    CLIP,
    SIZE,
    assert_same,
    estimate,
    exact_batches,
    exact_loss,
    exact_model,
    mesh_of,
    under_fsdp,
    under_tp,
)


def spoiled(batches, rank):
    """Makes the second batch of the last rank infinite, if this is the one."""
    if rank:
        batches[1]["x"][2] = float("inf")
    return batches


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("inf")) if ctx.fails else grad, None


def infinite_gradient(model, batch):
    """A loss that is finite, with an infinite gradient for the batch that is marked."""
    fails = bool(batch["x"].isinf().any())
    clean = {**batch, "x": batch["x"].nan_to_num(posinf=1.0)}
    return InfiniteGradient.apply(exact_loss(model, clean), fails)


def without_second(ranks):
    batches = exact_batches(ranks)
    return [batches[0], *batches[2:]]


def check_all_ranks_leave_the_batch_out(rank, world, folder):
    last = rank == world - 1
    for loss in (exact_loss, infinite_gradient):
        for options in ({}, {"grad_clip": CLIP}, {"offload": "cpu"}):
            expected = estimate(exact_model(), without_second(range(world)), **options)
            model = under_fsdp(exact_model())
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                batches = spoiled(exact_batches([rank]), last)
                assert_same(estimate(model, batches, loss_fn=loss, on_nonfinite="skip", **options), expected)
            (text,) = (str(warning.message) for warning in caught if "left out" in str(warning.message))
            assert text.startswith(f"estimate_fisher: 1 of {BATCHES} were left out")
            assert text.endswith("batch 1")
            assert all(param.grad is None for param in model.parameters())


def check_all_ranks_raise(rank, world, folder):
    last = rank == world - 1
    own, of_another = "batch 1: .*must be finite", r"all ranks must go on together \(another raised NotFiniteError"
    for loss in (exact_loss, infinite_gradient):
        text = own if last else of_another
        if loss is infinite_gradient:  # it is the mean over the ranks, of which each one has some rows, or none
            text = f"{own}|{of_another}"
        model = under_fsdp(exact_model())
        with pytest.raises(ValueError, match=text):
            estimate(model, spoiled(exact_batches([rank]), last), loss_fn=loss)
        assert_same(estimate(model, exact_batches([rank])), estimate(exact_model(), exact_batches(range(world))))


def check_all_ranks_leave_the_example_out(rank, world, folder):
    """Under tensor parallelism all ranks have the same examples."""
    batches = spoiled(exact_batches([0]), True)
    one_by_one = [{k: v[i : i + 1] for k, v in b.items()} for b in exact_batches([0]) for i in range(SIZE)]
    del one_by_one[SIZE + 2]
    with pytest.warns(UserWarning, match=f"1 of {BATCHES * SIZE} were left out, .*: batch 1, example 2$"):
        scores = estimate(under_tp(exact_model(), mesh_of(world)), batches, per_example=True, on_nonfinite="skip")
    assert_same(scores, estimate(exact_model(), one_by_one))


CHECKS = (
    check_all_ranks_leave_the_batch_out,
    check_all_ranks_raise,
    check_all_ranks_leave_the_example_out,
)
