"""torch's own tests of AdamW, demanded of ChildAdamW: hooks of steps and checkpoints, and their order."""

import copy

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_suite import Regression, every_input, every_kind, make, options_of

# ---- Steps ---------------------------------------------------------------------------------------------------------


def called(register, optimizer):
    """How often a hook has been called after two steps, and after one more without it."""
    calls = []
    handle = register(lambda hooked, args, kwargs: calls.append(hooked))
    optimizer.step()
    optimizer.step()
    assert calls == [optimizer] * 2
    handle.remove()
    optimizer.step()
    return len(calls)


@every_input
@every_kind
def test_step_pre_hook(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    assert called(optimizer.register_step_pre_hook, optimizer) == 2


@every_input
@every_kind
def test_step_post_hook(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    assert called(optimizer.register_step_post_hook, optimizer) == 2


@every_input
@every_kind
def test_step_all_hooks(name, kind):
    """Those of all optimizers come first and last, those of one optimizer in between; another class of them too."""
    model, seen = Regression(), []
    optimizers = [make(kind, model, "auto", **options_of(name)), torch.optim.SGD(model.parameters())]
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(lambda *_: seen.append("pre")))
        handles.append(optimizer.register_step_post_hook(lambda *_: seen.append("post")))
    one_step = ["global pre", "pre", "post", "global post"]
    try:
        for i, optimizer in enumerate([*optimizers, optimizers[0]], 1):
            optimizer.step()
            assert seen == one_step * i
    finally:
        for handle in handles:
            handle.remove()
    for optimizer in optimizers:
        optimizer.step()
    assert seen == one_step * 3


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def note_in_state(optimizer):
    optimizer.state["note"] = 1


def take_note_out(optimizer, state_dict):
    state_dict["noted"] = state_dict["state"].pop("note", None)
    return state_dict


@every_input
@every_kind
def test_state_dict_pre_hook(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    optimizer.register_state_dict_pre_hook(note_in_state)
    assert optimizer.state_dict()["state"]["note"] == 1


@every_input
@every_kind
def test_state_dict_post_hook(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    optimizer.register_state_dict_post_hook(take_note_out)
    assert optimizer.state_dict()["noted"] is None


@every_input
@every_kind
def test_state_dict_pre_post_hook(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    optimizer.register_state_dict_pre_hook(note_in_state)
    optimizer.register_state_dict_post_hook(take_note_out)
    saved = optimizer.state_dict()
    assert saved["noted"] == 1
    assert "note" not in saved["state"]


def set_lr(optimizer, state_dict):
    state_dict["param_groups"][0]["lr"] = 0.002


def replace_by_other_lr(optimizer, state_dict):
    replaced = copy.deepcopy(state_dict)
    replaced["param_groups"][0]["lr"] = 0.003
    return replaced


@every_input
@every_kind
def test_load_state_dict_pre_hook_and_prepend(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_lr)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(replace_by_other_lr, prepend=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.002  # the one that was prepended came first
    optimizer.register_load_state_dict_pre_hook(replace_by_other_lr)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.003


def note_loaded_lr(optimizer):
    optimizer.state["loaded lr"] = optimizer.param_groups[0]["lr"]


@every_input
@every_kind
def test_load_state_dict_post_hook(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    optimizer.register_load_state_dict_post_hook(note_loaded_lr)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["loaded lr"] == options_of(name).get("lr", 1e-3)


@every_input
@every_kind
def test_load_state_dict_pre_post_hook(name, kind):
    optimizer = make(kind, Regression(), "auto", **options_of(name))
    optimizer.register_load_state_dict_pre_hook(replace_by_other_lr)
    optimizer.register_load_state_dict_post_hook(note_loaded_lr)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["loaded lr"] == 0.003
