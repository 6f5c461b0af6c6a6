"""torch's own tests of AdamW, demanded of ChildAdamW: checkpoints, copies, and what it shows of itself."""

import copy
import io
import itertools

import torch
from helpers import _same, assert_same_run, both_backends
from torch_suite import INFO, Regression, every_input, every_kind, every_loop, make, options_of

WHICH_ARE_NAMED = list(itertools.product([False, True], repeat=2))  # of the one that saves, of the one that loads


def params_of(model, named):
    return list(model.named_parameters() if named else model.parameters())


class Convolution(torch.nn.Sequential):
    """Parameters of more dimensions, beside those of a normalisation."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            super().__init__(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
            self.x = torch.rand(1, 4, 16, 16)

    def train_with(self, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            self(self.x).square().sum().backward()
            optimizer.step()


@every_input
@every_kind
def test_optimizer_can_be_printed(name, kind):
    """With the lines that AdamW shows."""
    model, options = Regression(), options_of(name)
    shown = repr(make(kind, model, "auto", **options)).splitlines()
    theirs = repr(torch.optim.AdamW(model.parameters(), **options)).splitlines()
    assert shown[0] == "ChildAdamW ("
    assert set(theirs[1:]) <= set(shown)


@every_input
@every_kind
@both_backends
def test_state_dict_deterministic(name, kind, backend):
    for named in WHICH_ARE_NAMED:
        assert_deterministic(kind, backend, options_of(name), *named)


def assert_deterministic(kind, backend, options, named0, named1):
    first = Regression()
    one = make(kind, first, backend, params_of(first, named0), **options)
    first.train_with(one, 2)
    second = copy.deepcopy(first)
    other = make(kind, second, backend, params_of(second, named1), **options)
    saved = one.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert _same(saved, kept)
    first.train_with(one, 2)
    second.train_with(other, 2)
    assert_same_run(one, other)
    states = [optimizer.state_dict() for optimizer in (one, other)]
    for group in [group for state in states for group in state["param_groups"]]:
        group.pop("param_names", None)
    assert _same(*states)
    other.param_groups.extend(other.param_groups)
    repeated = other.state_dict()["param_groups"][-1]
    repeated.pop("param_names", None)
    assert _same(states[0]["param_groups"][-1], repeated)


@every_input
@every_kind
@both_backends
def test_can_load_older_state_dict(name, kind, backend):
    """Without the options that AdamW did not have from the start, which then stay as they are."""
    whole, resumed = Convolution(), Convolution()
    runs = [make(kind, model, backend, **options_of(name)) for model in (whole, resumed)]
    whole.train_with(runs[0], 3)
    resumed.train_with(runs[1], 3)
    old = copy.deepcopy(runs[1].state_dict())
    for group in old["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            del group[flag]
    runs[1].load_state_dict(old)
    whole.train_with(runs[0], 1)
    resumed.train_with(runs[1], 1)
    assert_same_run(*runs)


@every_loop
@every_kind
@both_backends
def test_can_load_from_to_named_state_dict(name, kind, backend):
    for named in WHICH_ARE_NAMED:
        assert_loads(kind, backend, options_of(name), *named)


def assert_loads(kind, backend, options, named0, named1):
    first = Convolution()
    one = make(kind, first, backend, params_of(first, named0), **options)
    first.train_with(one, 2)
    second = copy.deepcopy(first)
    other = make(kind, second, backend, params_of(second, named1), **options)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    first.train_with(one, 1)
    second.train_with(other, 1)
    assert_same_run(one, other)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"] if named0 or named1 else None
    assert other.state_dict()["param_groups"][0].get("param_names") == names


@every_input
@every_kind
@both_backends
def test_save_load_equality_with_weights_only(name, kind, backend):
    for named in (False, True):
        model = Regression()
        optimizer = make(kind, model, backend, params_of(model, named), **options_of(name))
        model.train_with(optimizer, 2)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        for weights_only in (True, False):
            file.seek(0)
            assert _same(torch.load(file, weights_only=weights_only), optimizer.state_dict())


@every_input
@every_kind
@both_backends
def test_load_nontensor_step(name, kind, backend):
    """Step counts that are numbers, as those of old checkpoints."""
    whole, resumed = Regression(), Regression()
    runs = [make(kind, model, backend, **options_of(name)) for model in (whole, resumed)]
    whole.train_with(runs[0], 3)
    resumed.train_with(runs[1], 3)
    saved = copy.deepcopy(runs[1].state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    runs[1].load_state_dict(saved)
    whole.train_with(runs[0], 1)
    resumed.train_with(runs[1], 1)
    assert_same_run(*runs)


@every_kind
def test_adamw_serialization(kind):
    """Adam, whose subclass AdamW is, takes the decoupled decay from a checkpoint; ChildAdamW has no other one."""
    model = Regression()
    adam = torch.optim.Adam(model.parameters())
    saved = make(kind, model, "auto").state_dict()
    adam.load_state_dict(saved)
    assert adam.param_groups[0]["decoupled_weight_decay"] is True
    coupled = torch.optim.Adam(model.parameters()).state_dict()
    assert coupled["param_groups"][0]["decoupled_weight_decay"] is False
    del saved["param_groups"][0]["decoupled_weight_decay"]
    for checkpoint in (coupled, saved):
        optimizer = make(kind, model, "auto")
        optimizer.load_state_dict(checkpoint)
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@every_input
@every_kind
@both_backends
def test_deepcopy_copies_all_public_attrs(name, kind, backend):
    model = Regression()
    optimizer = make(kind, model, backend, **options_of(name))
    model.train_with(optimizer, 3)
    attributes = {key for key in vars(optimizer) if not key.startswith("_")}
    copied = {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")}
    assert attributes == copied
    assert attributes >= {"state", "param_groups", "defaults", "backend"}


@every_input
@every_kind
@both_backends
def test_non_empty_state(name, kind, backend):
    model = Regression()
    optimizer = make(kind, model, backend, **options_of(name))
    model.train_with(optimizer, 1)
    assert optimizer.state.keys() == set(model.parameters())
    assert all(state.keys() >= {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
