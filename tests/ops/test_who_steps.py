"""Who steps what, and who counts: parameters go to the kernels of their device, or to the fallback. Without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from child_models import Model, child_adamw, params_of
from helpers import assert_same_run, make_params, set_grads, train

from childtune_fast import ChildAdamW
from childtune_fast.native import BackendError
from childtune_fast.native import gpu as gpu_kernels
from childtune_fast.ops import reference, trust
from childtune_fast.ops import step as op
from childtune_fast.ops.clip import clip, unscale
from childtune_fast.ops.packed_mask import PackedMask


class OnGpu(torch.nn.Parameter):
    """A parameter that says it is on a GPU."""

    is_cpu = False
    is_cuda = True
    device = torch.device("cuda", 1)

    def permute(self, order):
        return on_gpu(self.detach().permute(order))


def on_gpu(param):
    return OnGpu(param.detach())


@pytest.fixture
def gpu(monkeypatch):
    """Kernels for every GPU, which note how they are called and step in torch; what is "there" is on the CPU."""
    calls = []

    def step(groups, stream, checked, undo):
        calls.append(("step", groups, stream))
        reference.step(groups)
        return taken(undo)

    def counted_step(groups, stream, memory_of, grad_scale, found_inf, checked, undo):
        for group in groups:
            if group.lr_on_device is not None:
                group.lr = group.lr_on_device.item()
        assert (memory_of(100) is memory_of(50)) != gpu_kernels.is_capturing(1)
        calls.append(("counted_step", groups, stream))
        if found_inf is None or not found_inf.item():
            unscale(groups, 1.0 if grad_scale is None else grad_scale)
            if any(group.max_grad_norm is not None for group in groups):
                clip(None, [], groups)
            reference.step(groups)
        return taken(undo)

    def taken(undo):
        if undo is not None:  # None: other kernels write too
            undo.clear()
        return 1

    kernels = SimpleNamespace(step=step, counted_step=counted_step)
    monkeypatch.setenv("CHILDTUNE_GPU", "off")  # nothing is proved here; test_proof.py has that
    monkeypatch.setattr(trust, "_settled", {})
    monkeypatch.setattr(gpu_kernels, "find", lambda device: gpu_kernels.Gpu(kernels, "", []))
    monkeypatch.setattr(
        gpu_kernels,
        "is_capturing",
        lambda device: torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing(),
    )
    monkeypatch.setattr(gpu_kernels, "place", lambda device: torch.device("cpu"))
    monkeypatch.setattr(op, "check_group", lambda group: None)  # it would find that state is on the CPU
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1000 + device))
    return calls


def test_each_parameter_goes_to_the_kernels_of_its_device(gpu):
    cpu, gpus = make_params(), [on_gpu(p) for p in make_params(seed=1)]
    expected = ChildAdamW(make_params() + make_params(seed=1), seed=7, backend="torch")
    mixed = ChildAdamW(cpu + gpus, seed=7, backend="native")
    for step in range(2):
        for run in (expected, mixed):
            set_grads(run.param_groups[0]["params"], step)
            run.step()
    assert_same_run(mixed, expected)
    assert [(name, len(groups), stream) for name, groups, stream in gpu] == [("step", 1, 1001)] * 2
    assert [id(p) for p in gpu[0][1][0].params] == [id(p) for p in gpus]
    assert gpus[0]._version == expected.param_groups[0]["params"][-1]._version  # kernels count their writes


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_unless_asked_for_they_take_nothing(gpu, backend, monkeypatch):
    params = [on_gpu(p) for p in make_params()]
    run = ChildAdamW(params, backend=backend)
    set_grads(params, 0)
    run.step()
    assert gpu == []
    monkeypatch.setenv("CHILDTUNE_BACKEND", "native")
    run.step()
    assert len(gpu) == (backend == "auto")


def test_a_step_asks_once_whether_a_gpu_has_kernels(gpu, monkeypatch):
    """Else a verdict that comes in the middle would split a step, and a proof that runs would slow it."""
    asked, kernels_of = [], trust.kernels_of
    monkeypatch.setattr(trust, "kernels_of", lambda *arguments: asked.append(arguments) or kernels_of(*arguments))
    params = [on_gpu(p) for p in make_params()]
    run = ChildAdamW(params, backend="native")
    asked.clear()
    for step in range(2):
        set_grads(params, step)
        run.step()
    assert asked == [(1, "native", False)] * 2


def test_what_they_cannot_do_is_left_to_the_fallback(gpu):
    strided, plain = on_gpu(torch.ones(4, 6).T), on_gpu(torch.ones(4, 6))
    run = ChildAdamW([strided, plain], backend="native")
    set_grads([strided, plain], 0)
    run.step()
    assert [p is plain for _, groups, _ in gpu for group in groups for p in group.params] == [True]
    assert run.state[strided]["step"] == 1


@pytest.mark.parametrize(
    ("options", "taken"),
    [({"reserve_p": 1.0, "amsgrad": True}, True), ({}, False), ({"reserve_p": 1.0, "max_grad_norm": 1.0}, False)],
)
def test_channels_last_is_theirs_where_the_order_does_not_matter(options, taken, gpu):
    """A mask and the gradients' norm know elements by their logical place; the update alone does not."""
    shapes = ((2, 3, 4, 5), (3, 2, 1, 4), (5, 2))
    like = [p.detach() for p in make_params(shapes)]
    like = [p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in like]
    params, plain = list(map(on_gpu, like)), [torch.nn.Parameter(p.clone()) for p in like]
    run, expected = (ChildAdamW(p, seed=7, backend=b, **options) for p, b in ((params, "native"), (plain, "torch")))
    for step in range(2):
        for of_run in (params, plain):
            set_grads(of_run, step)
            for p in of_run[:2]:
                p.grad = p.grad.contiguous(memory_format=torch.channels_last)
        run.step()
        expected.step()
    assert sum(len(group.params) for _, groups, _ in gpu for group in groups) == 2 * (3 if taken else 1)
    assert all(p.is_contiguous() for _, groups, _ in gpu for group in groups for p in group.params)
    assert_same_run(run, expected)
    assert params[0]._version >= plain[0]._version > 0
    scattered = on_gpu(torch.ones(2, 3, 8, 5)[:, :, ::2])  # not dense
    set_grads([scattered], 0)
    ChildAdamW([scattered], backend="native", **options).step()


def child_on_gpu(monkeypatch, **options):
    """An optimizer of D whose parameters say that they are on a GPU, and one whose parameters do not."""
    monkeypatch.setattr(PackedMask, "to", lambda mask, device: mask)  # there is no GPU to move it to
    runs = []
    for make in (on_gpu, torch.nn.Parameter):
        model = Model()
        for name, param in list(model.named_parameters()):
            setattr(model, name, make(param))
        backend = "native" if make is on_gpu else "torch"
        runs.append(child_adamw(model, backend=backend, **options))
    return runs


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e-2, "norm_of": "child"}, {"capturable": True}], ids=str)
def test_a_child_network_goes_to_them_too(gpu, options, monkeypatch):
    run, expected = child_on_gpu(monkeypatch, **options)
    expected.param_groups[0]["capturable"] = False
    for step in range(2):
        for each in (run, expected):
            set_grads(params_of(each), step)
            each.step()
    assert [name for name, _, _ in gpu] == ["counted_step" if options else "step"] * 2
    masked = [bool(group.child_bits) for group in gpu[0][1]]
    assert sorted(masked) == [False, True]
    assert_same_run(run, expected)


def test_masks_follow_a_model_that_moved(monkeypatch):
    """When the state begins, and when a checkpoint is loaded; without a GPU, a copy stands for the other device."""
    run, saved = child_adamw(Model()), child_adamw(Model())
    made = dict(run.child_masks)
    monkeypatch.setattr(PackedMask, "to", lambda mask, device: PackedMask(mask.shape, mask.bits.clone()))
    train(run, [0])
    begun = dict(run.child_masks)
    assert begun
    assert not any(begun[p] is mask for p, mask in made.items())
    train(run, [1])
    assert all(run.child_masks[p] is mask for p, mask in begun.items())
    run.load_state_dict(saved.state_dict())
    assert not any(run.child_masks[p] is mask for p, mask in begun.items())


def test_native_says_why_there_are_no_kernels(monkeypatch):
    none = gpu_kernels.Gpu(None, "", ["prebuilt: none is prebuilt", "compiled: no"])
    monkeypatch.setattr(gpu_kernels, "find", lambda device: none)
    here, there = torch.nn.Parameter(torch.ones(3)), on_gpu(torch.ones(3))
    refusal = r"no kernels for GPU 1: prebuilt: none is prebuilt; compiled: no; repair"
    with pytest.raises(BackendError, match=refusal):
        ChildAdamW([here, there], backend="native")
    run = ChildAdamW([here], backend="native")
    with pytest.raises(BackendError, match=refusal):
        run.add_param_group({"params": [there]})
    assert len(run.param_groups) == 1
    run.param_groups[0]["params"] = [there]  # as a model that has moved since
    set_grads([there], 0)
    with pytest.raises(BackendError, match=refusal):
        run.step()
    assert len(run.state) == 0


# ---- Who counts the steps ------------------------------------------------------------------------------------------


def scaled(run, scale, found_inf=0.0):
    """What a GradScaler gives to an optimizer."""
    run.grad_scale, run.found_inf = torch.tensor(scale), torch.tensor(found_inf)


@pytest.mark.parametrize("reason", ["max_grad_norm", "scaler", "capturable", "lr"])
def test_a_gpu_counts_where_a_step_needs_what_only_it_knows(gpu, reason, monkeypatch):
    options = {"max_grad_norm": {"max_grad_norm": 1e-2}, "capturable": {"capturable": True}}.get(reason, {})
    params, plain = [on_gpu(p) for p in make_params()], make_params()
    run = ChildAdamW(params, seed=7, backend="native", **options)
    expected = ChildAdamW(plain, seed=7, backend="torch", **{**options, "capturable": False})
    if reason == "lr":
        run.param_groups[0]["lr"], expected.param_groups[0]["lr"] = LrOnGpu(2.0**-9), 2.0**-9
    for step in range(2):
        set_grads(params, step)
        set_grads(plain, step)
        for each in (run, expected) if reason == "scaler" else ():
            scaled(each, 3.0)
        run.step()
        expected.step()
    assert [(name, stream) for name, _, stream in gpu] == [("counted_step", 1001)] * 2
    assert_same_run(run, expected)


class LrOnGpu(torch.Tensor):
    """A learning rate that says it is on GPU 1, where the host would have to wait for it."""

    is_cuda = True

    def __new__(cls, value):
        return torch.tensor(value).as_subclass(cls)

    def get_device(self):
        return 1


def test_a_skipped_step_is_the_gpus_business_if_it_is_alone(gpu):
    params = [on_gpu(p) for p in make_params()]
    run = ChildAdamW(params, backend="native")
    before = [p.clone() for p in params]
    set_grads(params, 0)
    scaled(run, 3.0, found_inf=1.0)
    run.step()
    assert [name for name, _, _ in gpu] == ["counted_step"]
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(run.state[p]["step"] == 0 for p in params)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_beside_others_the_host_scales_skips_and_clips(gpu, found_inf):
    params, plain = [on_gpu(p) for p in make_params()], make_params(seed=1)
    expected = ChildAdamW(make_params() + make_params(seed=1), seed=7, max_grad_norm=1e-2, backend="torch")
    run = ChildAdamW(params + plain, seed=7, max_grad_norm=1e-2, backend="native")
    for each in (run, expected):
        set_grads(each.param_groups[0]["params"], 0)
        scaled(each, 3.0, found_inf)
        each.step()
    assert [name for name, _, _ in gpu] == ([] if found_inf else ["step"])
    assert len(run.state) == (0 if found_inf else len(params + plain))
    assert_same_run(run, expected)


def test_capturable_needs_the_kernels_of_a_gpu(gpu):
    cpu, strided = torch.nn.Parameter(torch.ones(4, 6)), on_gpu(torch.ones(4, 6).T)
    for param, backend in ((cpu, "native"), (cpu, "torch"), (strided, "native"), (on_gpu(torch.ones(3)), "torch")):
        set_grads([param], 0)
        run = ChildAdamW([param], capturable=True, backend=backend)
        with pytest.raises(ValueError, match=r"capturable=True needs parameters that .*; use capturable=False$"):
            run.step()
        assert len(run.state) == 0


def test_a_graph_captures_only_what_it_can_replay(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for capturable, backend in ((False, "native"), (False, "torch"), (True, "native")):
        params = [on_gpu(p) for p in make_params()]
        set_grads(params, 0)
        run = ChildAdamW(params, capturable=capturable, backend=backend)
        with pytest.raises(RuntimeError, match=r"captures needs capturable=True and one step taken before"):
            run.step()
        assert len(run.state) == 0
    monkeypatch.setattr("childtune_fast.ops.on_gpu._is_on_cpu", lambda step: False)  # as after a first step
    run.step()
    assert all(run.state[p]["step"] == 1 for p in params)
