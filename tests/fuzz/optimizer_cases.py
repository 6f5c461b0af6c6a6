"""Sessions with a ChildAdamW: it is made, options, state, gradients and memory are changed, and steps are taken."""

import contextlib
import copy
import pickle

import checkpoint_cases
import torch
from odd_tensors import DTYPES, LAYOUTS, Buffers, freed, memory_is_whole, odd_tensor, odd_thing, shape
from oracle import Mine, finite, number

from childtune_fast import ChildAdamW, ChildNetwork
from childtune_fast.optimizer import kinds

kinds.LEAST_NUMEL = 2  # so that nearly all parameters, which are small here, have the state that they are told
STEPS = (
    0.0,
    1.0,
    2.0**24 - 2,
    2.0**24 - 1,
    2.0**24,
    2.0**32 - 2,
    2.0**32 - 1,
    2.0**32,
    -1.0,
    0.5,
    float("nan"),
    float("inf"),
)
OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "differentiable", "foreach")
OPTIONS += ("fused", "decay", "variant", "max_grad_norm", "norm_of", "seed", "reserve_p", "state", "rounding")
OPTIONS += ("mask_version", "rounding_version", "params")
GOOD = {
    "lr": (0.0, 1e-3, 0.1, torch.tensor(1e-3), torch.tensor([0.1], dtype=torch.float64)),
    "betas": ((0.9, 0.999), (0.0, 0.0), (torch.tensor(0.9), torch.tensor(0.99))),
    "eps": (1e-8, 0.0),
    "weight_decay": (0.0, 0.01, 1),
    "amsgrad": (False, False, True),
    "maximize": (False, True),
    "max_grad_norm": (None, None, 0.5, 1),
    "norm_of": ("all", "child"),
    "variant": ("torch", "hf"),
    "decay": ("auto", "all"),
    "state": ("float32", "bfloat16", "8bit", "8bit"),
    "rounding": ("nearest", "stochastic"),
}


class Session:
    """An optimizer, its parameters, and the buffers in which they lie."""

    def __init__(self, rng, oracle):
        self.rng, self.oracle = rng, oracle
        self.buffers = Buffers(rng, shared=rng.random() < 0.6)
        dtypes = [rng.choice(DTYPES)] if rng.random() < 0.7 else DTYPES
        self.model = torch.nn.Module()
        for i in range(rng.choice((1, 1, 2, 2, 3, 5))):
            odd = rng.random() < 0.1
            layout = rng.choice(LAYOUTS if odd else LAYOUTS[:16])
            param = self.buffers.parameter(rng.choice(dtypes), shape(rng), layout)
            self.model.register_parameter(f"w{i}", param)
        self.params = list(self.model.parameters())
        self.optimizer = None

    def make(self):
        """Makes the optimizer; it may be refused."""
        rng = self.rng
        options = {name: rng.choice(values) for name, values in GOOD.items() if rng.random() < 0.2}
        options["backend"] = rng.choice(("native", "native", "native", "torch"))
        if rng.random() < 0.25 and (child := self.child()) is not None:
            options["child"] = child
        else:
            options.update(reserve_p=rng.choice((1.0, 0.3, 0.5, 1)), seed=rng.choice((None, 0, -1, 2**64 - 1)))
        if rng.random() < 0.08:
            options[rng.choice((*OPTIONS[:18], "child", "backend", "nonsense"))] = odd_thing(rng)
        params = self._groups()
        ok, made = self.oracle.call("ChildAdamW()", lambda: ChildAdamW(params, **options), watch=self.params)
        self.optimizer = made if ok else None
        return ok

    def child(self):
        """A child network of the model; None if there cannot be one."""
        with contextlib.suppress(ValueError, RuntimeError):
            return ChildNetwork.random(self.model, reserve_p=0.5, seed=self.rng.randrange(99), maskable="w[02]")
        return None

    def _groups(self):
        rng = self.rng
        kind = rng.random()
        if kind < 0.5:
            return list(self.params)
        if kind < 0.7:
            return list(self.model.named_parameters())
        cut = rng.randrange(len(self.params) + 1)
        groups = [{"params": part} for part in (self.params[:cut], self.params[cut:]) if part]
        for group in groups:
            name = rng.choice(tuple(GOOD))
            group[name] = rng.choice(GOOD[name])
        if rng.random() < 0.1:
            rng.choice(groups)[rng.choice(OPTIONS)] = odd_thing(rng)
        return groups

    # ---- What is seen ----------------------------------------------------------------------------------------------

    def grouped(self):
        """The parameters in the groups, as far as there are any."""
        found = []
        for group in self.optimizer.param_groups:
            params = group.get("params") if isinstance(group, dict) else None
            found += [p for p in params if isinstance(p, torch.Tensor)] if isinstance(params, (list, tuple)) else []
        return found

    def states(self):
        return [s for s in self.optimizer.state.values() if isinstance(s, dict)]

    def state_tensors(self):
        return [v for state in self.states() for v in state.values() if isinstance(v, torch.Tensor)]

    def watched(self):
        grads = [p.grad for p in self.params if p.grad is not None]
        return [*self.params, *grads, *self.state_tensors()]

    def call(self, name, function, **arguments):
        """Calls a method of the optimizer that may write nothing, and keep all that it has if it raises."""
        keeps = (self.optimizer.state, *(g for g in self.optimizer.param_groups if isinstance(g, dict)))
        return self.oracle.call(name, function, watch=self.watched(), keeps=keeps, **arguments)

    # ---- A step ----------------------------------------------------------------------------------------------------

    def step(self):
        """Takes a step, and checks that it counted exactly what has a gradient, or raised."""
        optimizer, rng = self.optimizer, self.rng
        closure = self._closure() if rng.random() < 0.05 else None
        if closure is not None:
            return self.oracle.call("step(closure)", lambda: optimizer.step(closure), watch=(), sentences=True)
        with_grad = {p for p in self.grouped() if p.grad is not None}
        before = {p: self._count(p) for p in with_grad}
        skipped = getattr(optimizer, "found_inf", None) is not None
        own = [*self.params, *self.state_tensors()]
        # A step may note the fingerprint of its masks in the groups, whatever happens afterwards.
        name = f"step [{optimizer.backend}]"
        ok, _ = self.oracle.call(name, optimizer.step, watch=self.watched(), own=own, keeps=[optimizer.state])
        if ok and not skipped:
            wrong = [(before[p], self._count(p)) for p in with_grad]
            wrong = [f"{old} became {new}" for old, new in wrong if new is None or not finite(old) or new - old != 1]
            if wrong:
                self.oracle.problem("miscounted", f"{name}: {wrong[0]}")
        return ok

    def _count(self, param):
        state = self.optimizer.state.get(param)
        if not isinstance(state, dict) or not ("exp_avg" in state or "exp_avg_codes" in state):
            return 0.0
        return number(state["step"]) if isinstance(state.get("step"), torch.Tensor) else None

    def _closure(self):
        kind = self.rng.randrange(5)
        thing = odd_thing(self.rng)

        def closure():
            if kind == 0:
                raise Mine
            with contextlib.suppress(Exception):
                (self.optimizer.state.clear, self.optimizer.zero_grad, self.give_grads, self.optimizer.step)[kind - 1]()
            return thing

        return closure

    # ---- What a user may do between steps --------------------------------------------------------------------------

    def give_grads(self):
        for p in self.params:
            if self.rng.random() < 0.9 and p.dtype in DTYPES and p.numel() < 1 << 20:
                with contextlib.suppress(RuntimeError, TypeError):
                    layout = self.rng.choice(LAYOUTS) if self.rng.random() < 0.2 else "plain"
                    p.grad = self.buffers.tensor(p.dtype, tuple(p.shape), layout)

    def odd_grad(self):
        p = self.rng.choice(self.params)
        grad = odd_tensor(self.rng, p)
        with contextlib.suppress(RuntimeError, TypeError):
            if self.rng.random() < 0.5:
                p.grad = grad
            elif p.grad is not None and grad is not None:
                p.grad.data = grad

    def odd_option(self):
        group = self.rng.choice(self.optimizer.param_groups)
        name = self.rng.choice(OPTIONS)
        kind = self.rng.random()
        if kind < 0.1:
            group.pop(name, None)
        elif kind < 0.4 and name in GOOD:
            group[name] = self.rng.choice(GOOD[name])
        elif kind < 0.5:
            group["lr"] = self.rng.choice((freed(torch.ones(())), torch.ones((), device="meta"), torch.ones(2)))
        elif kind < 0.6 and isinstance(group.get("params"), list):
            group["params"].append(self.rng.choice((self.params[0], None, odd_tensor(self.rng, self.params[0]))))
        else:
            group[name] = odd_thing(self.rng)

    def odd_state(self):
        states = self.states()
        if not states:
            return
        state = self.rng.choice(states)
        keys = [*state, "max_exp_avg_sq", "exp_avg_codes", "step"]
        key = self.rng.choice(keys)
        kind = self.rng.random()
        if kind < 0.1:
            state.pop(key, None)
        elif kind < 0.3:
            dtype = self.rng.choice((torch.float32, torch.float64))
            state["step"] = torch.full(self.rng.choice(((), (1,), (1, 1))), self.rng.choice(STEPS), dtype=dtype)
        elif kind < 0.6 and isinstance(state.get(key), torch.Tensor):
            state[key] = odd_tensor(self.rng, state[key])
        elif kind < 0.75:
            state[key] = self.rng.choice([*self.watched(), *(v for s in states for v in s.values())])
        elif kind < 0.8:
            self.optimizer.state[self.rng.choice(self.params)] = odd_thing(self.rng)
        else:
            state[key] = odd_thing(self.rng)

    def odd_memory(self):
        tensors = self.watched()
        tensor = self.rng.choice(tensors)
        kind = self.rng.random()
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
            if kind < 0.5 and not tensor._is_zerotensor():  # whose storage torch cannot give memory, and crashes
                size = tensor.untyped_storage().nbytes()
                tensor.untyped_storage().resize_(self.rng.choice((0, 1, size // 2, max(size - 1, 0), 2 * size)))
            elif kind < 0.8 and (odd := odd_tensor(self.rng, tensor)) is not None:
                tensor.data = odd
            else:
                tensor.requires_grad_(self.rng.random() < 0.5)

    def scaler(self):
        for name in ("grad_scale", "found_inf"):
            values = (None, 1.0, 0.0, torch.tensor(0.0), torch.tensor(1.0), torch.tensor([2.0]), float("nan"))
            value = self.rng.choice(values) if self.rng.random() < 0.8 else odd_thing(self.rng)
            setattr(self.optimizer, name, value)

    def clear(self):
        kind = self.rng.randrange(4)
        if kind == 0:
            self.call("zero_grad", lambda: self.optimizer.zero_grad(set_to_none=True))
        elif kind == 1:
            self.optimizer.state.pop(self.rng.choice(self.params), None)
        elif kind == 2:
            self.optimizer.state.clear()
        else:
            for name in ("grad_scale", "found_inf"):
                setattr(self.optimizer, name, None)


def copied(session):
    """A copy of the optimizer, by deepcopy or pickle, which torch does alone; then it may be stepped."""
    if not all(map(memory_is_whole, session.watched())):
        return
    how = session.rng.choice((copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))))
    with contextlib.suppress(Exception):
        session.model, session.optimizer = how((session.model, session.optimizer))
        session.params = list(session.model.parameters())


def look(session):
    optimizer = session.optimizer
    looks = (optimizer.state_dict, optimizer.dense_state_dict, lambda: optimizer.child_masks, lambda: optimizer.seed)
    session.call("look", session.rng.choice(looks))


CHANGES = (Session.give_grads,) * 6 + (Session.odd_grad,) * 2 + (Session.odd_option,) * 2 + (Session.odd_state,) * 3
CHANGES += (Session.odd_memory, Session.scaler, Session.clear, copied, look, *checkpoint_cases.CHANGES)


def optimizer_case(rng, oracle):
    """A session: mostly one thing is wrong before a step, so that much of what follows is reached."""
    session = Session(rng, oracle)
    if not session.make():
        return
    session.give_grads()
    for _ in range(rng.randrange(3, 14)):
        if not session.step():
            session.give_grads()
        rng.choice(CHANGES)(session)
        if not session.optimizer.param_groups:
            break
