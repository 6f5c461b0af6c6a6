"""Arguments of a wrong kind: one sentence that says what is required and what was given, before anything is done."""

import pytest
import torch
from models import Tiny, child_of, random_scores

from childtune_fast import ChildAdamW, ChildNetwork, FisherAccumulator, bernoulli_mask, estimate_fisher


def loss_fn(model, batch):
    return sum(p.sum() for p in model.parameters())


def bits(**options):
    return bernoulli_mask((3,), 0.3, **{"seed": 0, "step": 1, "param_index": 0, **options})


# What is wrong, and the call. Each gets a model, its child network and a path.
CALLS = {
    "model": [
        lambda m, c, path: ChildNetwork.from_scores(None, random_scores(m), reserve_p=0.3),
        lambda m, c, path: ChildNetwork.random(3, reserve_p=0.3, seed=0),
        lambda m, c, path: ChildNetwork.from_masks("model", {}),
        lambda m, c, path: ChildNetwork.head_only(None),
        lambda m, c, path: ChildNetwork.load(path, None),
        lambda m, c, path: c.save_delta(path, m.state_dict(), m),
        lambda m, c, path: estimate_fisher(None, [1], loss_fn=loss_fn),
        lambda m, c, path: FisherAccumulator(None),
    ],
    "base": [lambda m, c, path: c.save_delta(path, m, None)],
    "base_model": [lambda m, c, path: ChildNetwork.apply_delta(path, m.state_dict())],
    "scores": [
        lambda m, c, path: ChildNetwork.from_scores(m, None, reserve_p=0.3),
        lambda m, c, path: ChildNetwork.lowest(m, list(random_scores(m).values()), reserve_p=0.3),
    ],
    "from_masks: masks": [lambda m, c, path: ChildNetwork.from_masks(m, None)],
    "other": [
        lambda m, c, path: c.overlap(3),
        lambda m, c, path: c.union(None),
        lambda m, c, path: c.intersection(c.masks()),
    ],
    "dataloader": [lambda m, c, path: estimate_fisher(m, None, loss_fn=loss_fn)],
    "loss_fn": [lambda m, c, path: estimate_fisher(m, [1], loss_fn=3)],
    "FisherAccumulator.merge: other": [lambda m, c, path: FisherAccumulator(m).merge({})],
    "FisherAccumulator.load_state_dict: state_dict": [lambda m, c, path: FisherAccumulator(m).load_state_dict(None)],
    "FisherAccumulator.load_state_dict: sums": [
        lambda m, c, path: FisherAccumulator(m).load_state_dict({"sums": [], "weight": 1.0, "grad_clip": None})
    ],
    "bernoulli_mask: step": [lambda m, c, path: bits(step="1"), lambda m, c, path: bits(step=1.0)],
    "bernoulli_mask: param_index": [lambda m, c, path: bits(param_index=None)],
    "bernoulli_mask: offset": [lambda m, c, path: bits(offset=[0])],
}


@pytest.mark.parametrize(("what", "call"), [(what, call) for what, calls in CALLS.items() for call in calls])
def test_one_sentence(what, call, tmp_path):
    model = Tiny()
    with pytest.raises(TypeError, match=rf"^{what} must be an? .* \(got \w+\)$"):
        call(model, child_of(model), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def damaged(checkpoint, part):
    if part == "all":
        return None
    if part in ("state", "param_groups"):
        return {**checkpoint, part: None}
    if part == "missing":
        return {}
    first = None if part == "first state" else {**checkpoint["state"][0], part: None}
    return {**checkpoint, "state": {**checkpoint["state"], 0: first}}


@pytest.mark.parametrize("part", ["all", "missing", "state", "param_groups", "first state", "step", "exp_avg"])
@pytest.mark.parametrize("with_child", [True, False])
def test_a_checkpoint_that_is_none(part, with_child):
    model = Tiny()
    optimizer = ChildAdamW(model.parameters(), **({"child": child_of(model)} if with_child else {}))
    loss_fn(model, None).backward()
    optimizer.step()
    before = {p: dict(state) for p, state in optimizer.state.items()}
    with pytest.raises(TypeError, match=r"^load_state_dict: .* must be .* \(got \w+\)$"):
        optimizer.load_state_dict(damaged(optimizer.state_dict(), part))
    assert all(optimizer.state[p][key] is value for p, state in before.items() for key, value in state.items())


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    assert torch.equal(bits(step=numpy.int64(1), offset=numpy.int32(5)), bits(offset=5))
