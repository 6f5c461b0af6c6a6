"""estimate_fisher: its values against float64, and that it leaves everything as it was."""

import copy
import itertools
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from childtune_fast import FisherAccumulator, estimate_fisher

BATCHES, SIZE = 5, 4


def make_model(dropout=0.0, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(dropout), nn.Linear(40, 3)).to(dtype)


def make_batches(seed=0, dtype=torch.float32, count=BATCHES):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(SIZE, 6, generator=generator, dtype=torch.float64).to(dtype),
            "y": [torch.randint(3, (SIZE,), generator=generator), "a string"],
        }
        for _ in range(count)
    ]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"][0])


def estimate(model, batches, **options):
    return estimate_fisher(model, batches, **{"loss_fn": loss_fn, "progress": False, **options})


def examples_of(batches):
    return [{"x": b["x"][i : i + 1], "y": [b["y"][0][i : i + 1]]} for b in batches for i in range(SIZE)]


def reference(model, batches, grad_clip=None):
    """The mean of squared gradients by a plain loop, with the published code's clipping."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, p in model.named_parameters():
            if grad_clip is not None:
                nn.utils.clip_grad_norm_(p, grad_clip)
            sums[name] += p.grad**2
    model.zero_grad()
    return {name: s / len(batches) for name, s in sums.items()}


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_float64_oracle(per_example, grad_clip):
    """A float64 model, so that gradients carry no error of their own.

    Then each of the n terms is exact to 2^-50, each of the n sums in float32 rounds by 2^-24 of itself, and so does the
    division: in all less than (n + 2) * 2^-24 of the mean, as all terms are positive.
    """
    model, batches = make_model(dtype=torch.float64), make_batches(dtype=torch.float64)
    parts = examples_of(batches) if per_example else batches
    expected = reference(model, parts, grad_clip)
    scores = estimate(model, batches, per_example=per_example, grad_clip=grad_clip)
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        assert score.dtype == torch.float32
        assert ((score.double() - expected[name]).abs() <= (len(parts) + 2) * 2**-24 * expected[name]).all()
    if grad_clip is not None:
        assert any(not torch.allclose(scores[n], s.float()) for n, s in reference(model, parts).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduced_precision_against_its_own_gradients(dtype):
    """The gradients are the model's; only their squares and sums are ours."""
    model, batches = make_model(dtype=dtype), make_batches(dtype=dtype)
    expected = {name: 0.0 for name, _ in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, p in model.named_parameters():
            expected[name] = expected[name] + p.grad.double() ** 2 / BATCHES
    for name, score in estimate(model, batches).items():
        # As above; a square rounds once more. Below float32's normal range errors are absolute.
        bound = (BATCHES + 3) * 2**-24 * expected[name] + BATCHES * 2**-149
        assert ((score.double() - expected[name]).abs() <= bound).all()


def test_published_recipe_with_dropout():
    """Dropout draws the same as in a plain loop. Norms round differently (ours are sums in double), hence a tolerance:
    the factor's error is at most about that of a float32 norm of 240 terms, 2^-24 * 240, and counts twice."""
    model, batches = make_model(dropout=0.3), make_batches()
    model.train()
    torch.manual_seed(5)
    expected = reference(model, batches, grad_clip=0.1)
    model.eval()
    torch.manual_seed(5)
    scores = estimate(model, batches, grad_clip=0.1, train_mode=True)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=2 * 240 * 2**-24, atol=0)
    plain = estimate(model, batches, grad_clip=0.1)
    assert any((plain[name] != scores[name]).any() for name in scores)


@pytest.mark.parametrize("per_example", [False, True])
def test_native_equals_fallback(monkeypatch, per_example):
    model, batches = make_model(), make_batches()
    results = []
    for backend in ("native", "torch"):
        monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
        results.append(estimate(model, batches, per_example=per_example, grad_clip=0.05))
    assert all(same_bits(results[0][name], results[1][name]) for name in results[0])


def test_seed_governs_dropout():
    model, batches = make_model(dropout=0.5), make_batches()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(estimate(model, torch.utils.data.DataLoader(batches, batch_size=None), train_mode=True))
    assert all(same_bits(results[0][n], results[1][n]) for n in results[0])
    assert any(not same_bits(results[0][n], results[2][n]) for n in results[0])


def test_max_batches_takes_no_more():
    taken = []
    model, batches = make_model(), make_batches()

    def stream():
        for batch in batches:
            taken.append(batch)
            yield batch

    scores = estimate(model, stream(), max_batches=2)
    assert len(taken) == 2
    assert all(same_bits(scores[name], s) for name, s in estimate(model, batches[:2]).items())


# ---- Per example -------------------------------------------------------------------------------------------------


def test_vmap_equals_single_examples():
    """The same sums, of gradients that differ by the rounding of batched matrix products."""
    model, batches = make_model(), make_batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunked = estimate(model, batches, per_example=True)
    single = estimate(model, examples_of(batches))
    for name, score in chunked.items():
        torch.testing.assert_close(score, single[name], rtol=1e-4, atol=1e-9)


class BranchesOnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, x):
        return self.inner(x) if x.sum() > -1e9 else x


def test_what_vmap_cannot_run_goes_by_single_examples():
    model, batches = BranchesOnData(), make_batches()
    with pytest.warns(UserWarning, match="one example at a time, since .*vmap.* cannot .*RuntimeError: ") as caught:
        scores = estimate(model, batches, per_example=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # not a line of ours
    expected = estimate(model, examples_of(batches))
    assert all(same_bits(scores[name], expected[name]) for name in scores)


def test_large_models_go_by_single_examples(monkeypatch):
    monkeypatch.setattr("childtune_fast.per_example._CHUNK_BYTES", 1000)
    monkeypatch.setattr(torch.func, "vmap", None)
    model, batches = make_model(), make_batches()
    expected = estimate(model, examples_of(batches))
    assert all(same_bits(s, expected[n]) for n, s in estimate(model, batches, per_example=True).items())


def test_chunks_cover_every_example(monkeypatch):
    """Three examples at a time of four: a chunk of three, and one of one."""
    model, batches = make_model(), make_batches()
    whole = estimate(model, batches, per_example=True)
    size = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr("childtune_fast.per_example._CHUNK_BYTES", 3 * size)
    for name, score in estimate(model, batches, per_example=True).items():
        torch.testing.assert_close(score, whole[name], rtol=1e-4, atol=1e-9)


def test_vmap_that_fails_half_way(monkeypatch):
    """After the first chunk of two: every example is still counted once."""
    model, batches = make_model(), make_batches()
    expected = estimate(model, examples_of(batches))
    size = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr("childtune_fast.per_example._CHUNK_BYTES", 2 * size)
    vmap = torch.func.vmap

    def fails_later(*args, **options):
        results = iter([vmap(*args, **options)])
        return lambda *inputs: next(results)(*inputs)

    monkeypatch.setattr(torch.func, "vmap", fails_later)
    with pytest.warns(UserWarning, match="StopIteration"):
        scores = estimate(model, batches, per_example=True)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("x", [torch.zeros(3, 6), torch.zeros(())])
def test_examples_must_lie_in_dimension_0(x):
    batches = make_batches()
    batches[1]["x"] = x
    with pytest.raises(ValueError, match=r"batch 1: .*examples in dimension 0 \(got .*\); change the batch"):
        estimate(make_model(), batches, per_example=True)


@pytest.mark.cuda
@pytest.mark.parametrize("per_example", [False, True])
def test_on_a_gpu(per_example):
    """Batches from the CPU; gradients that differ by the rounding of matrix products."""
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches, per_example=per_example, grad_clip=0.05)
    model.cuda()
    state = torch.cuda.get_rng_state()
    scores = estimate(model, batches, per_example=per_example, grad_clip=0.05)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for name, score in scores.items():
        assert score.is_cuda
        torch.testing.assert_close(score.cpu(), expected[name], rtol=1e-3, atol=1e-9)


# ---- Which parameters --------------------------------------------------------------------------------------------


def test_frozen_and_unselected_parameters_are_left_out():
    model, batches = make_model(), make_batches()
    everything = estimate(model, batches)
    model[0].weight.requires_grad_(False)
    assert list(estimate(model, batches)) == ["0.bias", "3.weight", "3.bias"]
    for selection in (r"\.bias$", lambda name: name.endswith("bias")):
        scores = estimate(model, batches, parameters=selection)
        assert list(scores) == ["0.bias", "3.bias"]
        assert all(same_bits(scores[name], everything[name]) for name in scores)
    assert not model[0].weight.requires_grad


def test_a_parameter_without_a_gradient_scores_zero():
    model = make_model()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[3](model[1](model[0](x)))
    scores = estimate(model, make_batches())
    assert scores["unused.weight"].tolist() == [[0, 0], [0, 0]]
    assert (scores["0.weight"] > 0).all()


@pytest.mark.parametrize("per_example", [False, True])
def test_tied_parameters_are_scored_once(per_example):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    model, batches = Tied(), make_batches()
    scores = estimate(model, batches, per_example=per_example)
    assert "a.weight" in scores
    assert "b.weight" not in scores
    expected = reference(model, examples_of(batches) if per_example else batches)
    torch.testing.assert_close(scores["a.weight"], expected["a.weight"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches)

    def checkpointed(model, batch):
        x = batch["x"].clone().requires_grad_()
        return nn.functional.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), batch["y"][0])

    scores = estimate(model, batches, loss_fn=checkpointed)
    assert all(same_bits(scores[name], expected[name]) for name in scores)


def test_shared_weights_under_reentrant_checkpointing_raise():
    """Their gradient comes in parts, whose squares are not the square of the sum."""

    def twice(model, batch):
        x = checkpoint(model, batch["x"].clone().requires_grad_(), use_reentrant=True)
        return checkpoint(model, nn.functional.pad(x, (0, 3)), use_reentrant=True).sum()

    with pytest.raises(RuntimeError, match=r"each parameter once \(it reached .* twice.*use_reentrant=False"):
        estimate(make_model(), make_batches(), loss_fn=twice)


# ---- Everything stays as it was ----------------------------------------------------------------------------------


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


def test_never_a_second_gradient(monkeypatch):
    """When a gradient is squared, those before it are gone, and no parameter holds one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(8)), nn.Linear(6, 3))
    seen, alive = [], []
    add = FisherAccumulator._add

    def counting(self, name, grad, *args):
        seen.append(weakref.ref(grad))
        alive.append(sum(ref() is not None for ref in seen))
        assert all(p.grad is None for p in model.parameters())
        return add(self, name, grad, *args)

    monkeypatch.setattr(FisherAccumulator, "_add", counting)
    estimate(model, make_batches(), parameters="weight")
    assert len(seen) == 9 * BATCHES
    assert set(alive) == {1}


def peak_allocation(function):
    """The most bytes that torch's allocator had handed out at once during the call, beyond those from before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del kept
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_peak_memory_is_one_backward_and_the_scores(monkeypatch, backend):
    """Not even that: the gradients are not all there at once. The fallback has temporaries of single tensors."""
    monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
    model = nn.Sequential(nn.Linear(6, 128), *(nn.Linear(128, 128) for _ in range(20)), nn.Linear(128, 3))
    batches = make_batches()
    size = sum(4 * p.numel() for p in model.parameters())

    def backward():
        loss_fn(model, batches[0]).backward()

    one_backward = peak_allocation(backward)
    assert one_backward >= size
    model.zero_grad()
    assert peak_allocation(lambda: estimate(model, batches)) <= 1.5 * size
    assert 1.5 * size < one_backward + size


def test_scores_do_not_depend_on_present_gradients():
    model, batches = make_model(), make_batches()
    expected = estimate(model, batches)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    assert all(same_bits(s, expected[n]) for n, s in estimate(model, batches).items())


# ---- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_example", [False, True])
def test_a_loss_that_is_not_finite_names_its_batch(per_example):
    batches = make_batches()
    batches[3]["x"][2] = float("nan")
    with pytest.raises(ValueError, match=r"batch 3: the loss must be finite \(got \["):
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
    with pytest.raises(ValueError, match=r"batch 2: the gradient of '\d\.\w+' and of 3 more must be finite"):
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
        ({"max_batches": 0}, r"max_batches must be a whole number above 0.*\(got 0\)"),
        ({"parameters": "nothing like it"}, r"must select at least one .*\(got none of 4: 0.weight, "),
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


def test_progress_bar(capsys):
    estimate(make_model(), make_batches(), progress=True, max_batches=3)
    assert "3/3" in capsys.readouterr().err


def test_transformers_batches_need_no_loss_fn():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    batch = transformers.BatchEncoding(
        {"input_ids": torch.randint(30, (4, 7)), "attention_mask": torch.ones(4, 7), "labels": torch.arange(4) % 2}
    )
    scores = estimate_fisher(model, [batch] * 2, progress=False)
    model.eval()
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(scores[name], p.grad.square(), rtol=2**-22, atol=1e-30)
    original = copy.deepcopy(model.state_dict())
    assert all(same_bits(original[name], value) for name, value in model.state_dict().items())
