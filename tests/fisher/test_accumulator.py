"""FisherAccumulator: the same scores in the user's own training loop, in parts, and across processes."""

import math

import pytest
import torch
from fisher_models import estimate, loss_fn, make_batches, make_model
from helpers import both_backends, every_dtype, same_bits

from childtune_fast import FisherAccumulator
from childtune_fast.fisher.sums import SquareSums


@pytest.fixture(autouse=True)
def _backend(monkeypatch, backend):
    monkeypatch.setenv("CHILDTUNE_BACKEND", backend)


pytestmark = both_backends


def accumulate(fisher, model, batches, scale=1.0, **options):
    for batch in batches:
        model.zero_grad()
        (loss_fn(model, batch) * scale).backward()
        fisher.update(grad_scale=scale, **options)
    return fisher


def assert_same_scores(a, b):
    assert a.keys() == b.keys()
    assert all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_equals_estimate_fisher(grad_clip):
    model, batches = make_model(), make_batches()
    fisher = accumulate(FisherAccumulator(model, grad_clip=grad_clip), model, batches)
    assert_same_scores(fisher.scores(), estimate(model, batches, grad_clip=grad_clip))


@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_grad_scale_is_undone(grad_clip):
    """By a power of two, exactly; before the clipping."""
    model, batches = make_model(), make_batches()
    plain = accumulate(FisherAccumulator(model, grad_clip=grad_clip), model, batches)
    scaled = accumulate(FisherAccumulator(model, grad_clip=grad_clip), model, batches, scale=1024.0)
    assert_same_scores(scaled.scores(), plain.scores())


def test_gradients_are_only_read_and_scores_are_new():
    model, batches = make_model(), make_batches()
    fisher = accumulate(FisherAccumulator(model, grad_clip=0.01), model, batches[:1])
    before = [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()]
    fisher.update()
    for p, (grad, values, version) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert same_bits(grad, values)
        assert grad._version == version
    scores = fisher.scores()
    expected = {name: score.clone() for name, score in scores.items()}
    scores["0.weight"].zero_()
    assert_same_scores(fisher.scores(), expected)


@every_dtype
def test_weighted_mean(dtype):
    """Numbers that no rounding touches; a parameter that has no gradient in one of the updates."""
    model = torch.nn.ParameterList([torch.zeros(2, dtype=dtype), torch.zeros(1, dtype=dtype)])
    fisher = FisherAccumulator(model)
    model[0].grad = torch.tensor([1.0, -2.0], dtype=dtype)
    fisher.update(weight=3.0)
    model[0].grad = torch.tensor([2.0, 0.0], dtype=dtype)
    model[1].grad = torch.tensor([-4.0], dtype=dtype)
    fisher.update(weight=1.0)
    scores = fisher.scores()
    assert {name: score.tolist() for name, score in scores.items()} == {"0": [1.75, 3.0], "1": [4.0]}
    assert all(score.dtype == torch.float32 for score in scores.values())


def test_merge_equals_one_pass():
    """Whole numbers as gradients, so that sums are exact in any order."""
    model = make_model()
    whole, parts = FisherAccumulator(model), [FisherAccumulator(model) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        for p in model.parameters():
            p.grad = torch.randint(-9, 9, p.shape, generator=generator).float()
        whole.update(weight=2.0)
        parts[i % 3 == 0].update(weight=2.0)
    parts[0].merge(parts[1])
    assert_same_scores(parts[0].scores(), whole.scores())
    parts[0].merge(FisherAccumulator(model))  # an empty part changes nothing
    assert_same_scores(parts[0].scores(), whole.scores())


def test_saved_and_resumed(tmp_path):
    model, batches = make_model(), make_batches()
    whole = accumulate(FisherAccumulator(model), model, batches)
    first = accumulate(FisherAccumulator(model), model, batches[:2])
    torch.save(first.state_dict(), tmp_path / "fisher.pt")
    second = FisherAccumulator(make_model())
    second.load_state_dict(torch.load(tmp_path / "fisher.pt", weights_only=True))
    accumulate(first, model, batches[2:])  # the copy does not share its memory
    model = make_model()
    third = FisherAccumulator(model)
    third.load_state_dict(second.state_dict())
    assert_same_scores(accumulate(third, model, batches[2:]).scores(), whole.scores())


def test_foreign_sums_are_refused_whole():
    model, batches = make_model(), make_batches()
    fisher = accumulate(FisherAccumulator(model), model, batches)
    expected = fisher.scores()
    others = [
        FisherAccumulator(model, names="weight"),
        FisherAccumulator(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))),
        FisherAccumulator(model, grad_clip=1.0),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"merge: both must .* \(got "):
            fisher.merge(other)
        with pytest.raises(ValueError, match=r"load_state_dict: both must .* \(got "):
            fisher.load_state_dict(other.state_dict())
    assert_same_scores(fisher.scores(), expected)


@pytest.mark.parametrize("grad_clip", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(value, grad_clip):
    model, batches = make_model(), make_batches()
    fisher = accumulate(FisherAccumulator(model, grad_clip=grad_clip), model, batches)
    expected = fisher.scores()
    model[3].bias.grad[1] = value
    with pytest.raises(ValueError, match=r"update: the gradient of '3.bias' must be finite"):
        fisher.update()
    empty = FisherAccumulator(model, grad_clip=grad_clip)
    for unusable in (fisher.scores, fisher.update, fisher.state_dict, lambda: empty.merge(fisher)):
        with pytest.raises(ValueError, match=r"must be whole .*call reset\(\)"):
            unusable()
    fisher.reset()
    assert_same_scores(accumulate(fisher, model, batches).scores(), expected)


def test_wrong_calls():
    model = make_model()
    fisher = FisherAccumulator(model)
    with pytest.raises(ValueError, match=r"nothing has been accumulated yet; call update\(\)"):
        fisher.scores()
    with pytest.raises(ValueError, match=r"no parameter has a gradient; call it after backward\(\)"):
        fisher.update()
    loss_fn(model, make_batches()[0]).backward()
    for name in ("weight", "grad_scale"):
        for value in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"{name} must be above 0 and finite \(got {value}\)"):
                fisher.update(**{name: value})
    with pytest.raises(ValueError, match=r"load_state_dict: .*\(got one without grad_clip, sums, weight\)"):
        fisher.load_state_dict(model.state_dict())
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"at least one parameter that requires a gradient \(got none of 0: none\)"):
        FisherAccumulator(model)


def test_a_weight_may_be_any_number():
    model, batches = make_model(), make_batches()
    fisher, whole = FisherAccumulator(model), FisherAccumulator(model)
    accumulate(fisher, model, batches[:1], weight=2.0**70)
    accumulate(whole, model, batches[:1], weight=2**70)  # which fits no integer of torch's
    assert_same_scores(fisher.scores(), whole.scores())


@pytest.mark.parametrize("negated", [False, True])
def test_a_gradient_without_memory(negated):
    """Its squares cannot be added, and those of the gradients before it are not a whole."""
    model, batches = make_model(), make_batches()
    fisher = accumulate(FisherAccumulator(model), model, batches[:1])
    grad = list(model.parameters())[1].grad
    lost = torch.ones(grad.shape)
    list(model.parameters())[1].grad = torch._neg_view(lost) if negated else lost
    lost.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"the gradient of '.*' must have memory for its values"):
        fisher.update()
    with pytest.raises(ValueError, match="or of an addition that did not come to its end"):
        fisher.scores()
    fisher.reset()
    assert_same_scores(accumulate(fisher, model, batches[:1]).scores(), estimate(model, batches[:1]))


@pytest.mark.parametrize("method", ["update", "merge", "load_state_dict"])
def test_an_interrupt_amid_the_sums_is_not_forgotten(method, monkeypatch):
    model, batches = make_model(), make_batches()
    fisher, other = (accumulate(FisherAccumulator(model), model, batches[:1]) for _ in range(2))
    asked = iter([False, True])

    def interrupted(whole):
        def call(*arguments, **options):
            if next(asked):
                raise KeyboardInterrupt
            return whole(*arguments, **options)

        return call

    name = "add" if method == "update" else "part_of"
    monkeypatch.setattr(SquareSums, name, interrupted(getattr(SquareSums, name)))
    given = {"merge": [other], "load_state_dict": [other.state_dict()]}.get(method, [])
    with pytest.raises(KeyboardInterrupt):
        getattr(fisher, method)(*given)
    for call in (fisher.scores, fisher.update, fisher.state_dict, lambda: other.merge(fisher)):
        with pytest.raises(ValueError, match="or of an addition that did not come to its end"):
            call()


def test_sparse_and_strided_gradients():
    dense, sparse = (torch.nn.Embedding(5, 3, sparse=is_sparse) for is_sparse in (False, True))
    sparse.load_state_dict(dense.state_dict())
    scores = []
    for model in (dense, sparse):
        fisher = FisherAccumulator(model)
        (model(torch.tensor([1, 1, 4])) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        fisher.update()
        scores.append(fisher.scores())
    assert_same_scores(*scores)
    dense.weight.grad = dense.weight.grad.t().contiguous().t()
    fisher = FisherAccumulator(dense)
    fisher.update()
    assert_same_scores(fisher.scores(), scores[0])


@pytest.mark.parametrize(
    "damage", [{"weight": -1.0}, {"weight": math.nan}, {"weight": "1"}, {"sums": math.nan}, {"sums": None}]
)
def test_a_damaged_checkpoint_is_refused(damage):
    model = make_model()
    fisher = accumulate(FisherAccumulator(model), model, make_batches())
    before, damaged = fisher.scores(), fisher.state_dict()
    if "sums" in damage:
        name, sums = next(iter(damaged["sums"].items()))
        bad = None if damage["sums"] is None else torch.full_like(sums, damage["sums"])
        damaged = {**damaged, "sums": {**damaged["sums"], name: bad}}
    else:
        damaged |= damage
    with pytest.raises(ValueError, match="load_state_dict: sums and weight must be numbers from 0 on"):
        fisher.load_state_dict(damaged)
    assert_same_scores(fisher.scores(), before)


@pytest.mark.parametrize(("names", "error"), [(["weight"], TypeError), (5, TypeError), ("(", ValueError)])
def test_names_must_be_a_selector(names, error):
    with pytest.raises(error, match="names must be a"):
        FisherAccumulator(make_model(), names=names)


@pytest.mark.parametrize("wrong", [0, "1", -1.0])
def test_grad_clip_may_be_changed_to_what_the_constructor_takes(wrong):
    fisher = FisherAccumulator(make_model(), grad_clip=1.0)
    fisher.grad_clip = 0.5
    with pytest.raises(ValueError, match="grad_clip must be a number above 0"):
        fisher.grad_clip = wrong
    assert fisher.grad_clip == 0.5


def test_all_reduce_needs_a_process_group():
    fisher = FisherAccumulator(make_model())
    with pytest.raises(
        RuntimeError, match=r"must be in a process group \(there is none\); call torch.distributed.init_"
    ):
        fisher.all_reduce()
