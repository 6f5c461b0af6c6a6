"""ChildAdamW is a torch optimizer: torch's own checks, options, groups, schedulers, hooks, copies."""

import copy
import pickle
from decimal import Decimal

import numpy as np
import pytest
import torch
from decimal_adamw import decimals, exact_adamw
from helpers import (
    assert_same_run,
    both_backends,
    child_adamw,
    every_dtype,
    make_params,
    same_bits,
    same_snapshot,
    set_grads,
    snapshot,
    train,
)
from torch.optim import lr_scheduler
from torch_suite import INFO

from childtune_fast import ChildAdamW

EXTRA_INPUTS = {
    "tensor lr": {"lr": torch.tensor(0.01)},
    "tensor betas": {"betas": (torch.tensor([[0.8]]), torch.tensor(0.99))},
    "everything": {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": True, "maximize": True},
    "no momentum": {"betas": (0.0, 0.0), "lr": 0.01},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ALL_INPUTS = {**{i.desc: i.kwargs for i in INFO.optim_inputs_func(device="cpu")}, **EXTRA_INPUTS}


@both_backends
@pytest.mark.parametrize("kwargs", ALL_INPUTS.values(), ids=ALL_INPUTS.keys())
@every_dtype
def test_equals_adamw_at_reserve_p_1(kwargs, dtype, backend):
    ours, theirs, before = (make_params(dtype=dtype) for _ in range(3))
    train(child_adamw(ours, reserve_p=1.0, backend=backend, **kwargs), range(5))
    grads = []
    optimizer = torch.optim.AdamW(theirs, **{**kwargs, "foreach": False, "fused": False})
    for step in range(5):
        set_grads(theirs, step)
        grads.append([p.grad for p in theirs])
        optimizer.step()
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.numel() > 0:
            exact = exact_adamw(before[i], [step[i] for step in grads], **kwargs)
            error, torchs = (max(np.ravel(abs(decimals(x) - exact))) for x in (a, b))
            # The contract's budget: no further from the truth than torch is, plus one ulp of the largest element.
            assert error <= torchs + Decimal(torch.finfo(dtype).eps) * max(np.ravel(abs(exact)))


def test_is_an_adamw_with_its_defaults():
    optimizer, theirs = ChildAdamW(make_params()), torch.optim.AdamW(make_params())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults.items() >= theirs.defaults.items()  # as transformers and accelerate read them
    assert optimizer.param_groups[0].keys() - {"params"} == optimizer.defaults.keys()
    added = {"reserve_p", "decay", "variant", "max_grad_norm", "norm_of", "state", "rounding"}
    added |= {"seed", "mask_version", "rounding_version", "child_fingerprint"}
    assert optimizer.defaults.keys() - theirs.defaults.keys() == added
    assert repr(optimizer).startswith("ChildAdamW (\nParameter Group 0\n")
    assert "reserve_p: 0.3" in repr(optimizer)


GROUP_OPTIONS = {
    "reserve_p": 0.7,
    "lr": 0.1,
    "betas": (0.5, 0.6),
    "eps": 0.1,
    "weight_decay": 0.5,
    "amsgrad": True,
    "maximize": True,
    "variant": "hf",
    "max_grad_norm": 0.25,
}


@both_backends
@pytest.mark.parametrize("name", GROUP_OPTIONS)
def test_options_per_group(name, backend):
    """Two groups with different options step as two optimizers would, the second one's masks at the first's indices."""
    option = {name: GROUP_OPTIONS[name]}
    params = make_params(((40,), (3, 50)))
    groups = [{"params": params[:1]}, {"params": params[1:], **option}]
    train(child_adamw(groups, backend=backend), range(3))
    for i, options in enumerate(({}, option)):
        alone = make_params(((40,), (3, 50)))
        train(child_adamw(alone, backend=backend, **options), range(3))
        # the norm is of all groups' gradients, so the second group is clipped alike in both runs
        assert same_bits(params[i], alone[i])
        other = make_params(((40,), (3, 50)))
        train(child_adamw(other, backend=backend, **(option if i == 0 else {})), range(3))
        assert not same_bits(params[i], other[i])


@both_backends
def test_ways_to_pass_parameters(backend):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    copies = [copy.deepcopy(model) for _ in range(3)]
    runs = [
        child_adamw(copies[0].parameters(), backend=backend),
        child_adamw(copies[1].named_parameters(), backend=backend),
        child_adamw([{"params": m.parameters()} for m in copies[2]], backend=backend),
    ]
    for optimizer in runs:
        train(optimizer, range(3))
    assert runs[1].param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


@both_backends
def test_closure_runs_once_with_gradients(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = child_adamw([p], reserve_p=1.0, backend=backend)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    assert calls == [True]
    assert (p < 1).all()
    assert optimizer.step() is None


@both_backends
def test_tensor_options_equal_numbers(backend):
    lr, beta1, beta2 = (torch.tensor(x, dtype=torch.float64) for x in (0.02, 0.8, 0.95))
    numbers = child_adamw(make_params(), lr=0.02, betas=(0.8, 0.95), backend=backend)
    tensors = child_adamw(make_params(), lr=lr, betas=(beta1, beta2), backend=backend)
    train(numbers, range(2))
    train(tensors, range(2))
    lr.fill_(0.5)  # as a scheduler does
    numbers.param_groups[0]["lr"] = 0.5
    train(numbers, [2])
    train(tensors, [2])
    assert_same_run(numbers, tensors)


@both_backends
def test_amsgrad_switched_on_in_between(backend):
    run = child_adamw(make_params(), backend=backend)
    train(run, range(2))
    before = [run.state[p]["exp_avg_sq"].clone() for p in run.param_groups[0]["params"]]
    run.param_groups[0]["amsgrad"] = True
    train(run, [2])
    for p, old in zip(run.param_groups[0]["params"], before, strict=True):
        state = run.state[p]
        assert same_bits(state["max_exp_avg_sq"], state["exp_avg_sq"])
        assert state["step"] == 3
        assert old.numel() == 0 or not same_bits(old, state["exp_avg_sq"])


SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 4)], milestones=[3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
}


@both_backends
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor_lr, backend):
    """Under a scheduler, each step equals one with the options that it gives torch.optim.AdamW, set by hand."""
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    run, by_hand = child_adamw(make_params(), lr=lr, backend=backend), child_adamw(make_params(), backend=backend)
    theirs = torch.optim.AdamW(make_params(), lr=0.01)
    schedulers = [SCHEDULERS[name](run), SCHEDULERS[name](theirs)]
    rates = set()
    for step in range(7):
        options = {k: theirs.param_groups[0][k] for k in ("lr", "betas")}
        by_hand.param_groups[0].update(options)
        rates.add(options["lr"])
        assert float(run.param_groups[0]["lr"]) == options["lr"]
        train(run, [step])
        train(by_hand, [step])
        theirs.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert len(rates) > 3
    assert_same_run(run, by_hand)


def test_hooks():
    run = child_adamw(make_params())
    seen = []
    run.register_step_pre_hook(lambda *_: seen.append("before step"))
    run.register_step_post_hook(lambda *_: seen.append("after step"))
    run.register_state_dict_pre_hook(lambda *_: seen.append("before state_dict"))
    run.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    run.register_load_state_dict_pre_hook(lambda _, state: seen.append(f"before load {state['mine']}"))
    run.register_load_state_dict_post_hook(lambda o: seen.append(f"after load {o.seed}"))
    train(run, [0])
    saved = run.state_dict()
    run.load_state_dict(saved)
    expected = ["before step", "after step", "before state_dict", "before load 1", "after load 7"]
    assert seen == expected
    run.load_state_dict(saved)  # the hooks that load_state_dict adds for itself are gone again
    assert seen == [*expected, "before load 1", "after load 7"]


@both_backends
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate, backend):
    """A copy of the optimizer, which takes its parameters along, goes on as the original does, apart from it."""
    run = child_adamw(make_params(), backend=backend, reserve_p=0.5)
    train(run, range(2))
    double = duplicate(run)
    assert double.backend == backend
    before = snapshot(run)
    train(double, range(2, 4))
    assert same_snapshot(before, snapshot(run))
    train(run, range(2, 4))
    assert_same_run(run, double)
    double.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert double.param_groups[1]["reserve_p"] == 0.5
    assert double.param_groups[1]["seed"] == 7


@both_backends
def test_add_param_group_mid_training(backend):
    """Equals an optimizer that had the group from the start, its gradients None until then."""
    options = {"lr": 0.1, "reserve_p": 0.8}
    early, late = [{"params": make_params()[:2]}, {"params": make_params()[2:]}], make_params()[2:]
    whole = child_adamw([early[0], {**early[1], **options}], backend=backend)
    run = child_adamw(make_params()[:2], backend=backend)
    for step in range(4):
        if step == 2:
            run.add_param_group({"params": late, **options})
        for optimizer in (run, whole):
            set_grads([p for group in optimizer.param_groups for p in group["params"]], step)
        for p in early[1]["params"] if step < 2 else []:
            p.grad = None
        run.step()
        whole.step()
    assert_same_run(run, whole)
    assert [run.state[p]["step"].item() for g in run.param_groups for p in g["params"]] == [4, 4, 2, 2, 2]
