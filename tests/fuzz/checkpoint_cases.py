"""Checkpoints that were changed, groups that are added, child networks that are replaced."""

import copy
import math

import torch
from odd_tensors import DTYPES, memory_is_whole, odd_tensor, odd_thing, shape


def changed(rng, checkpoint, times):
    """Changes a checkpoint in place: entries are replaced, deleted, added or renamed, at any depth."""
    for _ in range(times):
        path = [checkpoint]
        while isinstance(path[-1], (dict, list)) and path[-1] and (len(path) < 2 or rng.random() < 0.8):
            keys = list(path[-1]) if isinstance(path[-1], dict) else range(len(path[-1]))
            path.append(path[-1][rng.choice(keys)])
        holder = path[-2] if len(path) > 1 else checkpoint
        if not holder:
            continue
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        kind = rng.random()
        if kind < 0.2:
            del holder[key]
        elif kind < 0.3 and isinstance(holder, dict):
            holder[
                rng.choice(("step", "exp_avg", "exp_avg_codes", "exp_avg_sq_scales", "child_mask", 0, 7, "x", None))
            ] = holder[key]
        elif kind < 0.6 and isinstance(holder[key], torch.Tensor):
            holder[key] = _odd_saved(rng, holder[key])
        elif kind < 0.7 and isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[key] = odd_thing(rng)
    return checkpoint


def _odd_saved(rng, tensor):
    if rng.random() < 0.3 and tensor.numel() and tensor.dtype in (*DTYPES, torch.uint8) and memory_is_whole(tensor):
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        tensor.reshape(-1)[rng.randrange(tensor.numel())] = math.nan if tensor.dtype.is_floating_point else 255
        return tensor
    return odd_tensor(rng, tensor)


def load(session):
    """Loads a checkpoint, mostly a changed one, that this optimizer or a plain one made."""
    rng, optimizer = session.rng, session.optimizer
    save = optimizer.state_dict if rng.random() < 0.7 else optimizer.dense_state_dict
    ok, saved = session.call("state_dict", save)
    if not ok:
        return
    try:
        saved = {
            "state": {k: dict(v) for k, v in saved["state"].items()},
            "param_groups": copy.copy(saved["param_groups"]),
        }
        saved["param_groups"] = [dict(group, params=list(group["params"])) for group in saved["param_groups"]]
    except (TypeError, ValueError):
        pass  # something odd is in the state: it is loaded as it is
    if rng.random() < 0.85 and isinstance(saved, dict):
        changed(rng, saved, rng.choice((1, 1, 2, 3)))
    if rng.random() < 0.02:
        saved = odd_thing(rng)
    session.call("load_state_dict", lambda: optimizer.load_state_dict(saved))


def add_group(session):
    """Adds a group of new, known or odd parameters."""
    rng = session.rng
    param = session.buffers.parameter(rng.choice(DTYPES), shape(rng, 0))
    kind = rng.random()
    if kind < 0.2:
        param = rng.choice(session.params)
    elif kind < 0.4:
        param = odd_tensor(rng, param)
    group = {"params": rng.choice(([param], param, [("name", param)], (param,)))}
    if rng.random() < 0.4:
        group[rng.choice(("lr", "betas", "reserve_p", "seed", "decay", "max_grad_norm", "variant", "state", "x"))] = (
            odd_thing(rng)
        )
    if rng.random() < 0.03:
        group = odd_thing(rng)
    before = list(session.optimizer.param_groups)
    ok, _ = session.call("add_param_group", lambda: session.optimizer.add_param_group(group))
    if ok:
        session.params += [p for p in session.grouped() if all(p is not known for known in session.params)]
    elif len(before) != len(session.optimizer.param_groups):
        session.oracle.problem("raised but wrote", "add_param_group added a group")


def replace_child(session):
    child = session.child() if session.rng.random() < 0.8 else odd_thing(session.rng)
    session.call("replace_child", lambda: session.optimizer.replace_child(child))


CHANGES = (load, load, add_group, replace_child)
