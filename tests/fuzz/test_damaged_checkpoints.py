"""Checkpoints damaged at random places: loaded or refused by a sentence, whole or not at all, as is the next step."""

import copy
import re

import hypothesis.strategies as st
import pytest
import torch
from helpers import child_adamw, set_grads, train
from hypothesis import HealthCheck, given, settings

from childtune_fast import ChildAdamW, ChildNetwork

NONSENSE = [
    *(
        None,
        True,
        -1,
        0,
        1,
        1 << 80,
        0.5,
        float("nan"),
        float("inf"),
        1j,
        "",
        "x",
        "0",
        b"x",
        [],
        (),
        {},
        [1, 2],
        {1: 2},
    ),
    *(object(), print, int, iter([1]), (i for i in [1]), range(3), {0}),
    *(torch.ones(()), torch.ones(2), torch.ones(4, 3), torch.zeros(0), torch.full((), float("nan"))),
    *(torch.ones((), dtype=torch.int64), torch.ones((), dtype=torch.complex64), torch.ones((), dtype=torch.bool)),
    *(torch.ones(4, 3, device="meta"), torch.ones(4, 3).to_sparse(), torch.ones(3, requires_grad=True) * 2),
    *(torch.zeros(128, dtype=torch.uint8), torch.full((128,), 255, dtype=torch.uint8)),
]
DTYPES = [torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
KEYS = ["0", "1", 0, 1, 99, -1, None, "lr", "step", "exp_avg", (1, 2), 0.0]
# Python's own words for an error that nobody has foreseen; ours may quote them.
BARE = re.compile("object has no attribute|object is not|not supported between|unhashable|unpack|argument|out of range")
OURS = re.compile("ChildAdamW|load_state_dict")


def places(node, path=()):
    """Yields the path of everything in a checkpoint."""
    yield path
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


def damaged(checkpoint, draw):
    """Returns the checkpoint, its dicts and lists copied, with a damage at one place."""
    path = draw(st.sampled_from(list(places(checkpoint))))
    if not path:
        return draw(st.sampled_from(NONSENSE))
    *way, last = path
    holder = checkpoint
    for key in way:
        holder = holder[key]
    value = holder[last]
    if draw(st.booleans()) and isinstance(value, torch.Tensor) and value.layout == torch.strided:
        holder[last] = spoilt(value, draw)
    elif draw(st.booleans()):
        holder[last] = draw(st.sampled_from(NONSENSE))
    elif isinstance(holder, dict) and draw(st.booleans()):
        holder[draw(st.sampled_from(KEYS))] = draw(st.sampled_from([value, *NONSENSE]))
    else:
        del holder[last]
    return checkpoint


def spoilt(tensor, draw):
    flat = tensor.reshape(-1)
    of_dtype = tensor.to(draw(st.sampled_from(DTYPES)))
    return draw(st.sampled_from([flat[: draw(st.integers(0, len(flat)))], torch.cat([flat, flat[:1]]), of_dtype]))


def model_of():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def optimizer_of(kind):
    model = model_of()
    groups = [{"params": list(layer.parameters()), "lr": 0.1} for layer in model]
    child = None if kind != "child" else ChildNetwork.random(model, reserve_p=0.5, seed=0, maskable="weight")
    cls = torch.optim.AdamW if kind == "torch" else child_adamw
    return cls(groups, **({} if child is None else {"child": child}))


def containers_copied(node):
    if isinstance(node, dict):
        return {key: containers_copied(value) for key, value in node.items()}
    return [containers_copied(value) for value in node] if isinstance(node, list) else node


def everything(optimizer):
    """All that may change, as a text: every bit, and which object is where."""
    torch.set_printoptions(precision=17, threshold=10_000)
    groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    masks = {id(p): mask.digest for p, mask in optimizer._book.masks.items()}
    states = {id(p) if isinstance(p, torch.Tensor) else p: state for p, state in optimizer.state.items()}
    return repr((params, groups, states, optimizer.defaults, masks, id(optimizer.state)))


def attempt(call, optimizer):
    """Calls; returns whether that was refused by a sentence, and asserts that nothing has changed then."""
    before = everything(optimizer)
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as raised:
        error = raised
    else:
        return False
    assert OURS.match(str(error)) or not BARE.search(str(error)), error
    assert everything(optimizer) == before
    return True


SAVED = {}
for saving in ("random", "child", "torch"):
    optimizer = optimizer_of(saving)
    train(optimizer, [0, 1])
    SAVED[saving] = copy.deepcopy(optimizer.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("loading", ["random", "child"])
@pytest.mark.parametrize("saving", SAVED)
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_loads_or_refuses(saving, loading, data):
    checkpoint = containers_copied(SAVED[saving])
    for _ in range(data.draw(st.integers(1, 3))):
        if isinstance(checkpoint, dict):
            checkpoint = damaged(checkpoint, data.draw)
    optimizer = optimizer_of(loading)
    train(optimizer, [0])
    whole = copy.deepcopy(optimizer.state_dict())
    refused = attempt(lambda: optimizer.load_state_dict(checkpoint), optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_grads(params, 1)
    refused_step = attempt(optimizer.step, optimizer)
    assert not (refused and refused_step)  # all is as it was, and that was good
    optimizer.load_state_dict(whole)
    optimizer.step()
    assert isinstance(optimizer, ChildAdamW)
