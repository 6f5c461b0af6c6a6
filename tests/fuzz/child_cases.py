"""Child networks, their files and deltas, Fisher scores and random masks, with nonsense for arguments."""

import copy
import functools
import math
import os
import pickle
import tempfile

import torch
from odd_tensors import DTYPES, LAYOUTS, Buffers, odd_tensor, odd_thing, shape
from oracle import Mine

from childtune_fast import ChildNetwork, FisherAccumulator, bernoulli_mask


def model_of(rng, buffers, odd=0.0):
    """A small model, whose parameters lie in the buffers."""
    model = torch.nn.Module()
    dtype = rng.choice(DTYPES)
    for i in range(rng.choice((1, 2, 3))):
        layout = rng.choice(LAYOUTS) if rng.random() < 0.05 + odd else "plain"
        param = buffers.parameter(dtype, shape(rng), layout)
        model.register_parameter(rng.choice(("w", "layers_0_w")) + str(i), param)
    if rng.random() < 0.3:
        model.register_buffer("count", torch.tensor(3))
    return model


def tensors_of(model):
    return [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]


def odd_selector(rng):
    def fail(name):
        raise Mine

    return rng.choice((None, ".", "w", "(", "nothing", fail, lambda name: name, lambda name: None, odd_thing(rng)))


def odd_share(rng):
    return rng.choice((0.5, 0.5, 0.3, 1.0, 0.01, 0.0, -1.0, 2, math.nan, odd_thing(rng)))


def scores_of(rng, model, dtype=torch.float32, odd=0.3):
    """Scores of a model's parameters, of which one may be odd."""
    scores = {name: torch.rand(tuple(p.shape)).to(dtype) for name, p in model.named_parameters()}
    if scores and rng.random() < odd:
        name = rng.choice(list(scores))
        kind = rng.random()
        if kind < 0.15:
            del scores[name]
        elif kind < 0.3:
            scores["other"] = scores[name]
        else:
            scores[name] = odd_tensor(rng, scores[name]) if kind < 0.85 else odd_thing(rng)
    return scores


def make_child(rng, oracle, model):
    """Calls one of the constructors; returns the child network, or None."""
    maskable = "." if rng.random() < 0.8 else odd_selector(rng)
    share = 0.5 if rng.random() < 0.7 else odd_share(rng)
    scope = rng.choice(("global", "tensor")) if rng.random() < 0.9 else odd_thing(rng)
    options = {"reserve_p": share, "scope": scope, "maskable": maskable}
    scores, masks = scores_of(rng, model), scores_of(rng, model, torch.bool)
    seed = rng.choice((0, -1, 1 << 70, odd_thing(rng))) if rng.random() < 0.3 else 3
    passed = model if rng.random() < 0.97 else odd_thing(rng)
    makers = {
        "from_scores": lambda: ChildNetwork.from_scores(passed, scores, **options),
        "lowest": lambda: ChildNetwork.lowest(passed, scores, **options),
        "random": lambda: ChildNetwork.random(passed, seed=seed, **options),
        "from_masks": lambda: ChildNetwork.from_masks(passed, masks),
        "head_only": lambda: ChildNetwork.head_only(passed, odd_selector(rng)),
        "from_scores(things)": lambda: ChildNetwork.from_scores(passed, odd_thing(rng), **options),
        "from_masks(things)": lambda: ChildNetwork.from_masks(passed, odd_thing(rng)),
    }
    name = rng.choice((*makers, "random", "from_scores", "from_masks"))
    scored = [t for t in (*scores.values(), *masks.values()) if isinstance(t, torch.Tensor)]
    ok, child = oracle.call(name, makers[name], watch=[*tensors_of(model), *scored])
    return child if ok else None


def use_child(rng, oracle, child, model):
    param = rng.choice(list(model.parameters()))
    calls = {
        "summary": lambda: str(child.summary()),
        "masks": child.masks,
        "mask_of": lambda: child.mask_of(rng.choice((param, odd_thing(rng)))),
        "mask_of(name)": lambda: child.mask_of(param, rng.choice(("w0", "x", odd_thing(rng)))),
        "repr": lambda: repr(child),
        "fingerprint": lambda: child.fingerprint,
        "deepcopy": lambda: copy.deepcopy(child).mask_of(param, "w0"),
        "pickle": lambda: pickle.loads(pickle.dumps(child)).masks(),
    }
    name = rng.choice(tuple(calls))
    oracle.call(f"child.{name}", calls[name], watch=tensors_of(model))


@functools.cache
def folder():
    """A folder of this process, in memory where there is such a place, within that of the driver, which removes it."""
    return tempfile.mkdtemp(dir=os.environ.get("FUZZ_FOLDER"))


def damaged(rng, data):
    """Bytes with some that differ, are missing or too many."""
    data = bytearray(data)
    kind = rng.random()
    if kind < 0.5 and data:
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
    elif kind < 0.7:
        del data[rng.randrange(len(data) + 1) :]
    elif kind < 0.8:
        data += b"x" * rng.choice((1, 1000))
    return bytes(data)


def files(rng, oracle, child, model):
    """Writes a file of a child network, or a delta, perhaps damages it, and reads it."""
    path = os.path.join(folder(), "file")
    delta = rng.random() < 0.5
    base = copy.deepcopy(model)
    with torch.no_grad():
        for p in base.parameters():
            if p.numel() and p.is_contiguous() and rng.random() < 0.3:
                p.view(-1)[0] = 7
    save = (lambda: child.save_delta(path, model, base)) if delta else (lambda: child.save(path))
    ok, _ = oracle.call("save_delta" if delta else "save", save, watch=tensors_of(model))
    if not ok:
        return
    if rng.random() < 0.7:
        with open(path, "rb") as file:
            data = file.read()
        with open(path, "wb") as file:
            file.write(damaged(rng, data))
    if rng.random() < 0.1:
        path = rng.choice((path + "x", folder(), "\0", odd_thing(rng)))
    target = base if rng.random() < 0.8 else model_of(rng, Buffers(rng))
    read = (lambda: ChildNetwork.apply_delta(path, target)) if delta else (lambda: ChildNetwork.load(path, target))
    own = tensors_of(target) if delta else ()
    oracle.call("apply_delta" if delta else "load", read, watch=tensors_of(target), own=own)


def fisher(rng, oracle, model):
    """An accumulator, with odd gradients, weights and checkpoints."""
    options = {"grad_clip": rng.choice((None, None, 1.0)), "names": None, "offload": None}
    if rng.random() < 0.2:
        options[rng.choice(tuple(options))] = odd_thing(rng)
    ok, made = oracle.call("FisherAccumulator", lambda: FisherAccumulator(model, **options), watch=tensors_of(model))
    if not ok:
        return
    for _ in range(3):
        for p in model.parameters():
            p.grad = None
            grad = torch.randn(tuple(p.shape)).to(p.dtype)
            if rng.random() < 0.2:
                grad = odd_tensor(rng, grad)
            try:
                p.grad = grad
            except (RuntimeError, TypeError):
                p.grad = None
        weight = 1.0 if rng.random() < 0.8 else odd_thing(rng)
        scale = 1.0 if rng.random() < 0.8 else odd_thing(rng)
        update = functools.partial(made.update, weight=weight, grad_scale=scale)
        oracle.call("update", update, watch=tensors_of(model))
        _use_scores(rng, oracle, made, model)


def _use_scores(rng, oracle, made, model):
    ok, saved = oracle.call("FisherAccumulator.state_dict", made.state_dict, watch=tensors_of(model))
    if ok:
        saved = {**saved, "sums": dict(saved["sums"])}
        if rng.random() < 0.7:
            holder = rng.choice((saved, saved["sums"]))
            key = rng.choice(list(holder))
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = odd_tensor(rng, holder[key]) if rng.random() < 0.5 else odd_thing(rng)
        sums = list(made._sums.sums.values())
        load = functools.partial(made.load_state_dict, saved)
        oracle.call("FisherAccumulator.load_state_dict", load, watch=[*tensors_of(model), *sums], own=sums)
    other = FisherAccumulator(model) if rng.random() < 0.8 else odd_thing(rng)
    ending = rng.choice((made.scores, made.reset, functools.partial(made.merge, other)))
    oracle.call("FisherAccumulator's other methods", ending, watch=tensors_of(model))


def random_mask(rng, oracle):
    arguments = {"shape": shape(rng), "reserve_p": 0.5, "seed": 1, "step": 1, "param_index": 0, "offset": 0}
    for _ in range(rng.choice((0, 1, 1, 2))):
        arguments[rng.choice((*arguments, "device"))] = odd_thing(rng)
    sizes = arguments["shape"]
    if isinstance(sizes, int) and not isinstance(sizes, bool) and 1 << 26 < sizes < 1 << 50:
        return  # torch would take gigabytes
    ok, mask = oracle.call("bernoulli_mask", lambda: bernoulli_mask(**arguments))
    if ok and mask.dtype != torch.bool:
        oracle.problem("writes outside", "bernoulli_mask is no mask")


def child_case(rng, oracle):
    """One model, and what can be done with it."""
    if rng.random() < 0.15:
        for _ in range(5):
            random_mask(rng, oracle)
        return
    model = model_of(rng, Buffers(rng, shared=rng.random() < 0.5), odd=0.1)
    if rng.random() < 0.3:
        fisher(rng, oracle, model)
        return
    child = None
    for _ in range(3):
        child = make_child(rng, oracle, model) or child
    if child is not None:
        for _ in range(3):
            use_child(rng, oracle, child, model)
        if rng.random() < 0.3 and not any(0 in p.stride() for p in model.parameters()):
            files(rng, oracle, child, model)
