"""torch's own tests of AdamW, demanded of ChildAdamW: which cases there are, those that are not run, and errors."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import both_backends, make_params
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_suite import (
    GPUS,
    INFO,
    INPUTS,
    NO_COUNTERPART,
    OTHER_ERRORS,
    REFUSED,
    RUN,
    Regression,
    assert_close,
    make,
    refusal,
    suite,
)

from childtune_fast import ChildAdamW

# ---- Which cases there are -----------------------------------------------------------------------------------------


def test_every_reason_for_not_running_an_input_is_needed():
    found = {refusal(options) for options in INPUTS.values()}
    assert found == {None, *REFUSED}
    assert {name for name, options in INPUTS.items() if not refusal(options)} <= RUN.keys()


@both_backends
@pytest.mark.parametrize("name", [name for name, options in INPUTS.items() if refusal(options)])
def test_inputs_that_are_not_run_are_refused_for_the_reason_given(name, backend):
    options = copy.deepcopy(INPUTS[name])
    model = Regression()
    model().backward()
    with pytest.raises(ValueError, match=REFUSED[refusal(options)][1]):
        make("plain", model, backend, **options).step()


def test_every_test_of_torch_has_its_counterpart_or_a_reason():
    """Those that torch's list names; it has the names of some, where they need another tolerance or are skipped."""
    decorators = [d for info in suite.optim_db for d in info.decorators if isinstance(d, suite.DecorateInfo)]
    theirs = {d.test_name for d in decorators if d.cls_name == "TestOptimRenewed" and d.test_name}
    files = Path(__file__).parent.glob("test_torch_suite*.py")
    ours = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert len(theirs) > 10
    assert theirs <= ours | NO_COUNTERPART.keys()
    assert not ours & NO_COUNTERPART.keys()


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name, options in INPUTS.items() if refusal(options) == "capturable"])
def test_capturable_inputs_on_a_gpu(name):
    ours, theirs = Regression().cuda(), Regression().cuda()
    assert ours.train_with(make("plain", ours, "native", **copy.deepcopy(INPUTS[name])), 20)
    theirs.train_with(torch.optim.AdamW(theirs.parameters(), **copy.deepcopy(INPUTS[name])), 20)
    assert_close(ours.parameters(), theirs.parameters(), 20)


# ---- Errors --------------------------------------------------------------------------------------------------------


def error_inputs():
    """What torch lists for the CPU and for GPUs, of which the parameters are made on the CPU."""
    yield from INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    for gpu in GPUS:
        with FakeTensorMode():
            cases = INFO.optim_error_inputs_func(device=gpu, dtype=torch.float32)
        for case in cases:
            case.optimizer_error_input.params = None
        yield from cases


ERRORS = {f"{case.optimizer_error_input.desc}, {case.optimizer_error_input.kwargs}": case for case in error_inputs()}


def test_every_other_error_is_needed():
    assert OTHER_ERRORS.keys() <= {case.optimizer_error_input.desc for case in ERRORS.values()}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors(case):
    """The same exception with the same text as AdamW's, when it is made or at its first step."""
    given = case.optimizer_error_input
    params = make_params() if given.params is None else given.params
    if given.desc in OTHER_ERRORS:
        error, text, _ = OTHER_ERRORS[given.desc]
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=case.error_regex), pytest.raises(error, match=text):
                ChildAdamW(params, **given.kwargs)
        else:
            with pytest.raises(error, match=text):
                ChildAdamW(params, **given.kwargs)
        return
    with pytest.raises(case.error_type, match=case.error_regex) as theirs:
        torch.optim.AdamW(copy.deepcopy(params), **given.kwargs).step()
    with pytest.raises(case.error_type, match="^" + re.escape(str(theirs.value)) + "$"):
        ChildAdamW(params, **given.kwargs).step()


@both_backends
def test_parameters_on_meta_are_stepped_as_adamw_s_loop_steps_them(backend):
    """Where torch has test_fused_error_on_params_on_meta."""
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    runs = [make("plain", model, backend, fused=True), torch.optim.AdamW(model.parameters(), foreach=False)]
    for run in runs:
        run.step()
    ours, theirs = (
        [(p.shape, state["step"], state["exp_avg"].device) for p, state in run.state.items()] for run in runs
    )
    assert ours == theirs
