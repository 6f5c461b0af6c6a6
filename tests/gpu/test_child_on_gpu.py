"""On a GPU: a child network's step, squared gradients, selection and files have the bits that they have on the CPU."""

import copy

import pytest
import torch
from child_models import every_option
from gpu_runs import (
    DEVICE,
    assert_replays_as_steps,
    assert_same_bits,
    model_on,
    no_waiting,
    optimizer_of,
    set_cpu_grads,
    train,
)
from helpers import both_backends, every_dtype, same_bits
from models import Tiny, random_scores
from scores import KINDS, tensors

from childtune_fast import ChildNetwork, FisherAccumulator, estimate_fisher
from childtune_fast.ops.select import top_k

pytestmark = pytest.mark.cuda


def run_on(device, dtype=torch.float32, **options):
    """A model and its optimizer. The child network is the same on every device: its masks are drawn on the CPU."""
    model = model_on(device, dtype)
    child = ChildNetwork.from_masks(model, {name: mask.to(device) for name, mask in model.masks.items()})
    return model, optimizer_of(model, child=child, **options)


@pytest.fixture
def asked_for(monkeypatch):
    """Functions without a backend= take the kernels too."""
    monkeypatch.setenv("CHILDTUNE_BACKEND", "native")


@both_backends
@every_option
@every_dtype
def test_a_step_has_the_same_bits(dtype, options, backend):
    runs = [run_on(DEVICE, dtype, backend=backend, **options), run_on("cpu", dtype, **options)]
    for run in runs:
        train(*run, range(10))
    assert_same_bits(*runs)


def test_large_tensors_have_the_same_bits():
    runs = []
    for device in (DEVICE, "cpu"):
        model = model_on(device, shapes=((3000, 1000), *[(70, 70)] * 400, (5,)))
        child = ChildNetwork.from_masks(model, {name: mask.to(device) for name, mask in model.masks.items()})
        runs.append((model, optimizer_of(model, child=child, backend="native")))
        train(*runs[-1], range(3))
    assert_same_bits(*runs)


@pytest.mark.parametrize("norm_of", ["all", "child"])
@every_dtype
def test_a_captured_step_replays_as_steps(dtype, norm_of):
    options = {"max_grad_norm": 1e-2, "norm_of": norm_of}
    captured = run_on(DEVICE, dtype, capturable=True, backend="native", **options)
    assert_replays_as_steps(captured, run_on("cpu", dtype, **options))


def test_scaling_skipping_and_clipping_do_not_wait_for_the_gpu():
    runs = []
    for device in (DEVICE, "cpu"):
        model, optimizer = run_on(device, max_grad_norm=1e-2, norm_of="child", backend="native")
        for step, found_inf in enumerate((0.0, 1.0, 0.0)):
            optimizer.grad_scale = torch.tensor(3.0, device=device)
            optimizer.found_inf = torch.tensor(found_inf, device=device)
            set_cpu_grads(model, step)
            if step == 0 or device == "cpu":  # the first one moves the counts
                optimizer.step()
                continue
            with no_waiting():
                optimizer.step()
        runs.append((model, optimizer))
    assert_same_bits(*runs)


# ---- From device to device -----------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("saved_on", [DEVICE, "cpu"])
def test_a_checkpoint_continues_on_the_other_device(saved_on, masked, backend):
    def fresh(device):
        if masked:
            return run_on(device, backend=backend)
        model = model_on(device)
        return model, optimizer_of(model, backend=backend)

    stopped, resumed, whole = fresh(saved_on), fresh("cpu" if saved_on == DEVICE else DEVICE), fresh("cpu")
    train(*stopped, range(3))
    resumed[0].load_state_dict(stopped[0].state_dict())
    resumed[1].load_state_dict(copy.deepcopy(stopped[1].state_dict()))
    train(*resumed, range(3, 6))
    train(*whole, range(6))
    assert_same_bits(resumed, whole)


@both_backends
@pytest.mark.parametrize("load", [False, True])
def test_a_model_may_move_after_its_optimizer_was_made(load, backend):
    moved, whole = run_on("cpu", backend=backend), run_on("cpu")
    train(*whole, range(2))
    moved[0].to(DEVICE)
    if load:
        moved[0].load_state_dict(whole[0].state_dict())
        moved[1].load_state_dict(copy.deepcopy(whole[1].state_dict()))
    else:
        train(*moved, range(2))
    train(*moved, range(2, 4))
    train(*whole, range(2, 4))
    assert all(mask.bits.is_cuda for mask in moved[1].child_masks.values())
    assert_same_bits(moved, whole)


def test_a_file_is_loaded_onto_the_gpu(tmp_path):
    model = Tiny()
    child = ChildNetwork.from_scores(model, random_scores(model), reserve_p=0.3)
    child.save(tmp_path / "child")
    loaded = ChildNetwork.load(tmp_path / "child", Tiny().to(DEVICE))
    assert loaded.fingerprint == child.fingerprint
    assert all(mask.bits.is_cuda and mask.offsets.is_cuda for mask in loaded.packed.values())
    assert all(torch.equal(mask.cpu(), child.masks()[name]) for name, mask in loaded.masks().items())


@both_backends
def test_deltas_are_made_and_applied_on_the_gpu(tmp_path, backend):
    base = Tiny()
    tuned = copy.deepcopy(base).to(DEVICE)
    scores = {name: score.to(DEVICE) for name, score in random_scores(tuned).items()}
    child = ChildNetwork.from_scores(tuned, scores, reserve_p=0.3)
    train(tuned, optimizer_of(tuned, child=child, backend=backend), range(2))
    child.save_delta(tmp_path / "delta", tuned, copy.deepcopy(base).to(DEVICE))
    for device in (DEVICE, "cpu"):
        applied = copy.deepcopy(base).to(device)
        ChildNetwork.apply_delta(tmp_path / "delta", applied)
        for p, q in zip(applied.parameters(), tuned.parameters(), strict=True):
            assert same_bits(p.cpu(), q.cpu())


# ---- Scores --------------------------------------------------------------------------------------------------------


def accumulated(model, grad_clip, **options):
    fisher = FisherAccumulator(model, grad_clip=grad_clip, **options)
    for step in range(3):
        set_cpu_grads(model, step)
        fisher.update(weight=0.3, grad_scale=1.7)
    return fisher.scores()


@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=str)
@pytest.mark.parametrize("grad_clip", [None, 1e-2])
@both_backends
@every_dtype
def test_squared_gradients_have_the_same_bits(dtype, backend, grad_clip, options, monkeypatch):
    shapes = ((300, 1001), (40, 70), (129,), (), (0,))
    monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
    on_gpu = accumulated(model_on(DEVICE, dtype, shapes=shapes), grad_clip, **options)
    on_cpu = accumulated(model_on("cpu", dtype, shapes=shapes), grad_clip)
    for name, score in on_gpu.items():
        assert score.is_cuda == (not options)
        assert same_bits(score.cpu(), on_cpu[name])


def test_a_gradient_that_is_not_finite_is_named(asked_for):
    model = model_on(DEVICE)
    set_cpu_grads(model, 0)
    model.p5.grad[1, 1000] = float("inf")
    with pytest.raises(ValueError, match="gradient of 'p5' must be finite"):
        FisherAccumulator(model).update()


def test_squaring_does_not_wait_for_the_gpu(asked_for):
    """But once for a batch, to know whether all was finite."""
    model = model_on(DEVICE)
    set_cpu_grads(model, 0)
    fisher = FisherAccumulator(model, grad_clip=1e-2)
    fisher.update()
    with no_waiting():
        for name, param in model.named_parameters():
            fisher._add(name, param.grad, 1.0, 1.0)


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("per_example", [False, True])
def test_estimation_on_a_side_stream(offload, per_example, asked_for):
    """The hooks square on the stream of the gradient, whatever it is: there is no other order to rely on."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Tanh(), torch.nn.Linear(512, 4)).to(DEVICE)
    batches = [torch.randn(8, 512, device=DEVICE) for _ in range(3)]
    options = {"loss_fn": lambda model, batch: model(batch).square().mean(), "progress": False}
    options |= {"per_example": per_example, "offload": offload}
    expected = estimate_fisher(model, batches, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        found = estimate_fisher(model, batches, **options)
    stream.synchronize()
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@both_backends
def test_the_same_weights_are_selected(kind, largest, backend, monkeypatch):
    scores = tensors(kind)
    total = sum(tensor.numel() for tensor in scores.values())
    for k in (0, 1, round(0.3 * total), total):
        expected = top_k(scores, k, largest=largest)
        monkeypatch.setenv("CHILDTUNE_BACKEND", backend)
        found = top_k({name: tensor.to(DEVICE) for name, tensor in scores.items()}, k, largest=largest)
        monkeypatch.delenv("CHILDTUNE_BACKEND")
        assert all(torch.equal(mask.bits.cpu(), expected[name].bits) for name, mask in found.items())
        assert all(mask.bits.is_cuda for mask in found.values())


def test_many_tensors_are_selected_from(asked_for):
    """More than a table holds, and tensors of many chunks."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*range(300), 1 << 22, 70_000]
    scores = {str(n): torch.randn(n, generator=generator).square() for n in sizes}
    k = sum(sizes) // 3
    on_gpu = top_k({name: tensor.to(DEVICE) for name, tensor in scores.items()}, k)
    assert all(torch.equal(on_gpu[name].bits.cpu(), mask.bits) for name, mask in top_k(scores, k).items())


def test_a_score_that_is_nan_is_named(asked_for):
    scores = {"good": torch.zeros(70_000, device=DEVICE), "bad": torch.zeros(70_000, device=DEVICE)}
    scores["bad"][-1] = float("nan")
    with pytest.raises(ValueError, match="one or more for 'bad'"):
        top_k(scores, 1)
