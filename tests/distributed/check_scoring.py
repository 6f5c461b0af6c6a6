"""What a Fisher pass over ranks leaves behind, and how ranks raise together."""

import pytest
import torch
from helpers import same_bits
from sharded_models import (
    BATCHES,
    CLIP,
    assert_same,
    counted_additions,
    cut_models,
    estimate,
    exact_batches,
    exact_loss,
    exact_model,
    never,
    under_fsdp,
    whole,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from childtune_fast import FisherAccumulator
from childtune_fast.ops import shards

# ---- The model is left as it was -----------------------------------------------------------------------------------


def sharded(model):
    """Whether all parameters are DTensors, by the modules that hold them."""
    return all(isinstance(param, DTensor) for param in model.parameters())


def state_of(model):
    hooks = [(len(m._forward_hooks), list(m._forward_pre_hooks.values()), m.training) for m in model.modules()]
    params = [(p, p.grad, p.requires_grad, len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()]
    return hooks, [tuple(map(id, row[:2])) + row[2:] for row in params]


def check_the_model_is_sharded_before_and_after(rank, world, folder):
    model = under_fsdp(exact_model())
    model.train()
    model[1].eval()
    for i, param in enumerate(model.parameters()):
        param.grad = torch.ones_like(param) if i % 2 else None
    before, values = state_of(model), [whole({"": p})[""].clone() for p in model.parameters()]
    expected = estimate(exact_model(), exact_batches(range(world)))
    for forward in (lambda: model(torch.ones(2, 6)), torch.no_grad()(lambda: model(torch.ones(2, 6)))):
        forward()
        assert not sharded(model)
        assert_same(estimate(model, exact_batches([rank])), expected)
        assert state_of(model) == before
        forward()
        assert list(FisherAccumulator(model).state_dict()["sums"]) == list(expected)
        assert state_of(model) == before
    assert all(torch.equal(whole({"": p})[""], v) for p, v in zip(model.parameters(), values, strict=True))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    def in_model(model, batch):
        handle = model[2].register_forward_pre_hook(lambda *_: Fails.none())
        try:
            return exact_loss(model, batch)
        finally:
            handle.remove()

    def in_backward(model, batch):
        handle = model[2].register_forward_pre_hook(lambda _, args: Fails.apply(args[0]))
        try:
            return exact_loss(model, batch)
        finally:
            handle.remove()

    def between(model, batch):
        exact_loss(model, batch)
        raise ZeroDivisionError

    def before_model(model, batch):
        raise ZeroDivisionError

    for loss in (before_model, in_model, between, in_backward):
        with pytest.raises((ZeroDivisionError, AttributeError)):
            estimate(model, exact_batches([rank]), loss_fn=loss)
        assert state_of(model) == before
        assert_same(estimate(model, exact_batches([rank])), expected)


def check_weights_that_the_loss_writes_come_back(rank, world, folder):
    """Those that a rank holds, and those that fully_shard has made whole for a forward pass."""
    for way, (model, mine, _) in cut_models(rank, world).items():
        before = [(param, shards.local_tensor(param).clone()) for param in model.parameters()]
        seen = []

        def write(module, inputs, seen=seen):
            with torch.no_grad():
                module.weight.mul_(2)
            seen.append(isinstance(module.weight, DTensor))

        def loss(model, batch):
            with torch.no_grad():
                model[2].bias.mul_(2)
            return exact_loss(model, batch)

        hook = model[1].register_forward_pre_hook(write)
        estimate(model, exact_batches(mine), loss_fn=loss)
        hook.remove()
        assert seen == [way == "TP" or "x TP" in way] * BATCHES, way
        for param, (same, values) in zip(model.parameters(), before, strict=True):
            assert param is same, way
            assert same_bits(shards.local_tensor(param), values), way


def check_ranks_raise_together_where_one_cannot_restore_a_weight(rank, world, folder):
    """Rank 0 writes a weight in a batch that is not watched."""
    for model, mine, _ in cut_models(rank, world).values():
        batches = [{**batch, "i": i} for i, batch in enumerate(exact_batches(mine))]

        def loss(model, batch):
            if batch["i"] == 1 and rank == 0:
                shards.local_tensor(model[1].weight).add_(1)
            return exact_loss(model, batch)

        error = ("all ranks must go on together" if rank else "") + r".*must write weights .*got others in '1\.weight'"
        with pytest.raises(ValueError, match=error):
            estimate(model, batches, loss_fn=loss)
        estimate(model, exact_batches(mine))  # the ranks are where they were


def check_accumulation_is_refused(rank, world, folder):
    model = under_fsdp(exact_model())
    for change, undo in (
        (lambda: model.set_requires_gradient_sync(False), lambda: model.set_requires_gradient_sync(True)),
        (lambda: model.set_is_last_backward(False), lambda: model.set_is_last_backward(True)),
    ):
        model(torch.ones(2, 6))  # what sets torch's own state up
        change()
        with pytest.raises(
            ValueError, match=r"must reduce the gradients .*call model.set_requires_gradient_sync\(True\)"
        ):
            estimate(model, never())
        undo()
    assert_same(estimate(model, exact_batches([rank])), estimate(exact_model(), exact_batches(range(world))))


def check_a_module_that_runs_several_times(rank, world, folder):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            first, _, _ = exact_model()
            self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 6)
            for layer in (self.first, self.layer):
                layer.load_state_dict({"weight": first.weight[:6], "bias": first.bias[:6]})

        def forward(self, x):
            return self.layer(self.layer(self.first(x)))

    def loss(model, batch):
        return model(batch["x"]).sum(1).mean()

    for grad_clip in (None, CLIP):
        options = {"loss_fn": loss, "grad_clip": grad_clip}
        expected = estimate(Twice(), exact_batches(range(world)), **options)
        model = Twice()
        fully_shard(model.first)
        fully_shard(model.layer)
        with counted_additions() as counts:
            assert_same(estimate(fully_shard(model), exact_batches([rank]), **options), expected)
        assert set(counts.values()) == {BATCHES}


# ---- Ranks raise together ------------------------------------------------------------------------------------------


def check_ranks_raise_together(rank, world, folder):
    model, batches = under_fsdp(exact_model()), exact_batches([rank])
    last, expected = world - 1, estimate(exact_model(), exact_batches(range(world)))

    def raises(match, loader=None, there=None, error=ValueError, **options):
        """The last rank raises by its own words, `there`, the others by the last rank's or those of `match`."""
        with pytest.raises(error, match=there if rank == last and there else match):
            estimate(model, batches if loader is None else loader, **options)
        assert sharded(model)
        assert_same(estimate(model, batches), expected)

    def spoiled(how):
        """The batches, the second of them changed on the last rank."""
        return [how(dict(batch)) if i == 1 and rank == last else batch for i, batch in enumerate(batches)]

    nan = spoiled(lambda batch: {**batch, "c": batch["c"] * torch.nan})
    words = r"batch 1: the loss must be finite \(got \[nan\]\); look"
    raises(
        rf"all ranks must go on together \(another raised NotFiniteError: .*{words}", nan, "^estimate_fisher: " + words
    )
    with pytest.warns(UserWarning, match=rf"1 of {BATCHES} were left out, .*: batch 1$"):  # on all ranks
        left = estimate(model, nan, on_nonfinite="skip")
    assert_same(left, estimate(exact_model(), [b for i, b in enumerate(exact_batches(range(world))) if i != 1]))
    bare = spoiled(lambda batch: {"x": batch["x"]})
    raises(r"together \(another raised KeyError: 'c'\)", bare, r"^'c'$", error=(RuntimeError, KeyError))
    early = spoiled(lambda batch: {"c": batch["c"]})  # before the model is entered
    raises(r"together \(another raised KeyError: 'x'\)", early, r"^'x'$", error=(RuntimeError, KeyError))
    wrong = {"loss_fn": None, "loader": [{"x": batches[0]["x"]}] if rank == last else [{**batches[0], "labels": 1}]}
    words = "without loss_fn a batch must be a mapping with 'labels'"
    if world > 1:
        raises(rf"another raised TypeError: .*{words}", there="^estimate_fisher: " + words, error=TypeError, **wrong)

    def loader():
        yield from batches[:2]
        if rank == last:
            raise ZeroDivisionError("a worker died")
        yield batches[2]

    words, error = "a worker died", (RuntimeError, ZeroDivisionError)
    raises(rf"another raised ZeroDivisionError: {words}", loader(), f"^{words}$", error)
    if world > 1:
        words = r"the same number of batches on every rank \(got {}\); pass max_batches=2, or"
        few = batches[:2] if rank == last else batches
        raises(words.format("more here, 2 on another"), few, words.format("2 here, more on another"))
        assert_same(estimate(model, few, max_batches=2), estimate(exact_model(), exact_batches(range(world), 2)))
        with pytest.raises(ValueError, match=r"the same number of batches .*0.*\); use a sampler"):
            estimate(model, [] if rank == last else batches)
    with pytest.raises(ValueError, match="must yield at least one batch"):
        estimate(model, [])


def check_a_gradient_that_is_not_finite_on_one_rank(rank, world, folder):
    """In the first row of a layer, which only rank 0 holds."""
    model, batches = under_fsdp(exact_model()), exact_batches([rank])
    expected = estimate(exact_model(), exact_batches(range(world)), grad_clip=CLIP)

    def spoil(grad):
        return torch.cat([grad[:, :1] * torch.inf, grad[:, 1:]], 1)

    def loss(model, batch):
        handle = model[0].register_forward_hook(lambda module, args, output: output.register_hook(spoil) and None)
        try:
            return exact_loss(model, batch)
        finally:
            handle.remove()

    words = r"the gradient of '0\.\w+' .*must be finite"

    def start_of(where):
        return f"^{where}" if rank == 0 else rf"^Fisher scores: .*\(another raised NotFiniteError: {where}"

    for grad_clip in (None, CLIP):
        with pytest.raises(ValueError, match=start_of("estimate_fisher: batch 0: ") + words):
            estimate(model, batches, loss_fn=loss, grad_clip=grad_clip)
        assert sharded(model)
        fisher = FisherAccumulator(model, grad_clip=grad_clip)
        model.zero_grad()
        loss(model, batches[0]).backward()
        with pytest.raises(ValueError, match=start_of("FisherAccumulator.update: ") + words):
            fisher.update()
        with pytest.raises(ValueError, match=r"the sums must be whole .*call reset\(\)"):
            fisher.scores()
        model.zero_grad()
    assert_same(estimate(model, batches, grad_clip=CLIP), expected)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        FisherAccumulator(model).update()


def check_a_loss_in_training_mode_only(rank, world, folder):
    """No rank computes the loss again, since others might not: the remedy is named on a condition."""
    model, calls = under_fsdp(exact_model()), []

    def loss(model, batch):
        calls.append(model.training)
        return exact_loss(model, batch) if model.training else [model(batch["x"])]

    with pytest.raises(ValueError, match=r"\(got list\); .*; or train_mode=True, if the model computes its loss in"):
        estimate(model, exact_batches([rank]), loss_fn=loss)
    assert calls == [False]
    assert estimate(model, exact_batches([rank]), loss_fn=loss, train_mode=True)


CHECKS = (
    check_the_model_is_sharded_before_and_after,
    check_weights_that_the_loss_writes_come_back,
    check_ranks_raise_together_where_one_cannot_restore_a_weight,
    check_accumulation_is_refused,
    check_a_module_that_runs_several_times,
    check_ranks_raise_together,
    check_a_gradient_that_is_not_finite_on_one_rank,
    check_a_loss_in_training_mode_only,
)
