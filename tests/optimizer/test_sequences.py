"""Random sequences of what people do to an optimizer, on D and on a model of it: dense AdamW, masked afterwards."""

import copy
import io

import pytest
import torch
from helpers import same_bits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from childtune_fast import ChildAdamW, ChildNetwork

WIDTHS = ((3, 4), (4, 5), (5, 4), (4, 3))  # the layers; the last one is not masked
NAMES = [f"{i}.{key}" for i in range(len(WIDTHS)) for key in ("weight", "bias")]
LR = 1e-2
some_name = st.sampled_from(NAMES)
some_layer = st.sampled_from(range(1, len(WIDTHS)))


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(*widths) for widths in WIDTHS)


def make_child(model):
    return ChildNetwork.random(model, reserve_p=0.4, seed=0, maskable=r"^[012]\.weight")


def place_of(model, name):
    layer, key = name.split(".")
    return model[int(layer)], key


class Expected:
    """What a parameter should be: stepped by a dense AdamW, after which the weights outside its mask are put back."""

    def __init__(self, param, mask):
        self.param = nn.Parameter(param.detach().clone())
        self.mask = mask
        self.frozen = False
        self.forget()

    def forget(self):
        self.optimizer = ChildAdamW([self.param], lr=LR, reserve_p=1.0, backend="torch")

    def step(self, grad):
        before = self.param.detach().clone()
        self.param.grad = grad
        self.optimizer.step()
        if self.mask is not None:
            with torch.no_grad():
                self.param[~self.mask] = before[~self.mask]


class Runs(RuleBasedStateMachine):
    backend: str

    @initialize()
    def begin(self):
        self.model = make_model()
        child = make_child(self.model)
        self.base = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.masks = child.masks()
        self.optimizer = ChildAdamW(self.model[0].parameters(), lr=LR, child=child, backend=self.backend)
        self.has_child = True
        self.expected = {n: Expected(p, self.masks.get(n)) for n, p in self.model.named_parameters()}
        self.steps = 0
        self.saved = None

    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def names(self):
        """The names of the parameters in each group."""
        name_of = {p: name for name, p in self.model.named_parameters()}
        return [[name_of[p] for p in group["params"]] for group in self.optimizer.param_groups]

    # ---- What people do ----

    @rule()
    def step(self):
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        inside = {name for names in self.names() for name in names}
        for name, param in self.model.named_parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad if param.requires_grad else None
            if name in inside and not self.expected[name].frozen:
                self.expected[name].step(grad.clone())
        self.optimizer.step()

    @rule(name=some_name, frozen=st.booleans())
    def freeze_or_unfreeze(self, name, frozen):
        self.model.get_parameter(name).requires_grad_(not frozen)
        self.expected[name].frozen = frozen

    @rule(layer=some_layer, by_method=st.booleans())
    def add_group(self, layer, by_method):
        params = list(self.model[layer].parameters())
        if not self.has_child or params[0] in set(self.params()):
            return
        if by_method:
            self.optimizer.add_param_group({"params": params})
        else:
            self.optimizer.param_groups[-1]["params"] += params

    @rule(name=some_name)
    def drop_state(self, name):
        self.optimizer.state.pop(self.model.get_parameter(name), None)
        self.expected[name].forget()

    @rule()
    def clear_state(self):
        self.optimizer.state.clear()
        for expected in self.expected.values():
            expected.forget()

    @rule(name=some_name, first_in_group=st.booleans())
    def replace_parameter(self, name, first_in_group):
        old = self.model.get_parameter(name)
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        if first_in_group:  # and saved in between
            self.replace_in_group(old, new)
            self.optimizer.state_dict()
        setattr(*place_of(self.model, name), new)
        self.replace_in_group(old, new)
        self.expected[name].forget()

    def replace_in_group(self, old, new):
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]

    @rule()
    def deepcopy(self):
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))

    @rule()
    def save(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        states = {name: copy.deepcopy(e.optimizer.state_dict()) for name, e in self.expected.items()}
        self.saved = file.getvalue(), self.names(), states

    @precondition(lambda self: self.saved is not None)
    @rule(anew=st.booleans(), with_child=st.booleans())
    def load(self, anew, with_child):
        """Into this optimizer, or into a new one; which does not know the masks of what comes later without child=."""
        contents, names, states = self.saved
        if names != self.names():
            return
        if anew:
            groups = [{"params": [self.model.get_parameter(n) for n in of_group]} for of_group in names]
            all_there = sum(map(len, names)) == len(NAMES)
            options = {} if all_there and not with_child else {"child": self.child_of_present_model()}
            self.optimizer = ChildAdamW(groups, lr=1.0, backend=self.backend, **options)
            self.has_child = "child" in options
        self.optimizer.load_state_dict(torch.load(io.BytesIO(contents), weights_only=True))
        for name in (name for of_group in names for name in of_group):
            self.expected[name].optimizer.load_state_dict(states[name])

    def child_of_present_model(self):
        return ChildNetwork.from_masks(self.model, self.masks)

    # ---- What must hold ----

    @invariant()
    def weights_are_as_expected(self):
        if not hasattr(self, "model"):
            return
        for name, param in self.model.named_parameters():
            assert same_bits(param, self.expected[name].param), name
            if name in self.masks:
                outside = ~self.masks[name]
                assert same_bits(param[outside], self.base[name][outside]), name

    @invariant()
    def the_checkpoint_loads(self):
        if not hasattr(self, "model"):
            return
        state_dict = copy.deepcopy(self.optimizer.state_dict())
        groups = [{"params": [copy.deepcopy(p) for p in group["params"]]} for group in self.optimizer.param_groups]
        fresh = ChildAdamW(groups)
        fresh.load_state_dict(state_dict)
        found = [fresh.child_masks.get(p) for group in groups for p in group["params"]]
        for name, mask in zip((n for of_group in self.names() for n in of_group), found, strict=True):
            expected = self.masks.get(name)
            assert (mask is None) == (expected is None), name
            assert mask is None or torch.equal(mask.unpack(), expected), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_random_sequences(backend):
    machine = type("Runs", (Runs,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
