"""What an optimizer's groups and state must be, in sentences.

A step checks its options, which are few. The kinds of all else are looked at where a step has failed, and before
anything that is not a step begins.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from torch import Tensor

from ..arguments import as_float, both_betas, brief, check_flags, check_type, lost_memory, number, two_betas

_NUMBERS = ("lr", "eps", "weight_decay")
OF_PYTHON = (AttributeError, LookupError, AssertionError, TypeError, ValueError, OverflowError)


def explain(error: Exception, param_groups: Any, states: Any) -> None:
    """Raises a sentence in place of an error of a step, if groups or state are not what they must be."""
    try:
        check_groups(param_groups)
        check_once(param_groups)
        check_states(states, param_groups, to_begin=True)
    except (TypeError, ValueError) as sentence:
        raise sentence from error


# ---- Options -------------------------------------------------------------------------------------------------------


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raises as `number` and `both_betas` do unless a step can take all numbers in a group's options, and its flags."""
    number(options, "lr")
    number(options, "eps", least=0.0)
    number(options, "weight_decay", least=0.0)
    both_betas(options)
    check_flags(options)


def check_kinds(options: Mapping[str, Any]) -> None:
    """Raises TypeError if an argument of AdamW is of a kind that torch's constructor has no sentence for."""
    for name in _NUMBERS:
        if not isinstance(options[name], Tensor) or lost_memory(options[name]):
            as_float(name, options[name])
    for i, beta in enumerate(two_betas(options["betas"])):
        if not isinstance(beta, Tensor) or lost_memory(beta):
            as_float(f"betas[{i}]", beta)


# ---- Groups and state ----------------------------------------------------------------------------------------------


def check_groups(param_groups: Any) -> None:
    """Raises unless these are groups of parameters.

    Raises:
        TypeError: something is of another kind.
        ValueError: a group has no "params".
    """
    check_type("ChildAdamW: param_groups", param_groups, (list, tuple), "a list of dicts")
    for i, group in enumerate(param_groups):
        where = f"param_groups[{i}]"
        check_type(f"ChildAdamW: {where}", group, dict, "a dict")
        if "params" not in group:
            raise ValueError(f"ChildAdamW: {where} must have 'params', the list of its parameters (got none)")
        check_list(group["params"], where)
        for place, param in enumerate(group["params"]):
            check_type(f"ChildAdamW: {where}['params'][{place}]", param, Tensor, "a tensor")
        check_names(group, f"ChildAdamW: {where}")


def check_list(params: Any, where: str = "a group") -> None:
    """Raises TypeError unless a group's parameters are a list, or what can be gone through as one, again and again."""
    if isinstance(params, (str, bytes, Tensor)) or not (isinstance(params, Sized) and isinstance(params, Iterable)):
        raise TypeError(f"ChildAdamW: 'params' of {where} must be a list of parameters (got {brief(params)})")


def check_names(group: Mapping[str, Any], where: str) -> None:
    """Raises TypeError unless the parameters' names in a group, if it has any, are strings in a list."""
    names = group.get("param_names", ())
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{where}: 'param_names' must be a list of strings (got {brief(names)})")


def check_once(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError if a parameter is in the groups twice.

    torch updates it twice or, by its foreach step, with another result; kernels would write it from two threads.
    """
    params = [param for group in param_groups for param in group["params"]]
    counts = Counter(map(id, params))
    for param in params:
        if counts[id(param)] > 1:
            raise ValueError(
                f"ChildAdamW: every parameter must be in the groups once (got one of shape {tuple(param.shape)} "
                f"{counts[id(param)]} times); leave out the others"
            )


def check_new_group(group: Any) -> None:
    """Raises if a group, which torch has refused with an error of Python's own, has no parameters or others than these.

    Raises:
        ValueError: it has no "params".
        TypeError: these are neither tensors nor pairs of a name and a tensor.
    """
    check_type("ChildAdamW: a parameter group", group, dict, "a dict")
    if "params" not in group:
        raise ValueError(
            f"ChildAdamW: a parameter group must have 'params' (got {', '.join(map(repr, group)) or 'an empty dict'})"
        )
    if not isinstance(group["params"], Iterable):
        raise TypeError(
            f"ChildAdamW: 'params' of a parameter group must be tensors, or pairs of a name and a tensor (got "
            f"{brief(group['params'])})"
        )
    for entry in group["params"]:
        if isinstance(entry, tuple) and len(entry) != 2:
            raise TypeError(f"ChildAdamW: a named parameter must be a pair of name and tensor (got {brief(entry)})")


def check_states(states: Any, param_groups: Iterable[Mapping[str, Any]], to_begin: bool = False) -> None:
    """Raises TypeError unless every parameter's state is a dict or, `to_begin`, can become one."""
    check_type("ChildAdamW: state", states, Mapping, "a mapping of parameters to dicts")
    for i, param in enumerate(param for group in param_groups for param in group["params"]):
        if param in states:
            check_type(f"ChildAdamW: the state of parameter {i}", states[param], dict, "a dict")
        elif to_begin and param.grad is not None and not hasattr(states, "__missing__"):
            raise TypeError(
                f"ChildAdamW: state must be a collections.defaultdict(dict), in which the state of parameter {i} can "
                f"begin (got {type(states).__name__})"
            )
