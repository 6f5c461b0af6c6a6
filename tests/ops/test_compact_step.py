"""The compact step of a child network: equal to the fallback and to a dense run under the mask, and nothing outside."""

import copy
import itertools

import pytest
import torch
from child_models import OPTIONS, SHAPES, Model, child_adamw, every_option, params_of
from helpers import assert_same_run, both_backends, every_dtype, same_bits, set_grads, train

from childtune_fast import ChildAdamW


@every_option
@every_dtype
def test_native_equals_the_fallback(native, dtype, options):
    expected = child_adamw(Model(dtype), backend="torch", **options)
    train(expected, range(4))
    for instruction_set in native.supported_instruction_sets():
        native.set_instruction_set(instruction_set)
        run = child_adamw(Model(dtype), backend="native", **options)
        train(run, range(4))
        assert_same_run(run, expected)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_native_equals_the_fallback_at_every_density_on_many_slices(density, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    runs = []
    shapes = ((700, 1000), (33,), (43,), (129, 5), (3,))
    for backend in ("native", "torch"):
        runs.append(child_adamw(Model(shapes=shapes, density=density), backend=backend))
        train(runs[-1], range(2))
    torch.set_num_threads(before)
    assert_same_run(*runs)


@both_backends
@pytest.mark.parametrize("options", [o for name, o in OPTIONS.items() if name != "clipped"], ids=str)
@every_dtype
def test_equals_a_dense_run_with_masked_gradients(dtype, options, backend):
    """Of plain AdamW over all weights, whose gradients are zero outside the child network, and so is their norm."""
    model, dense_model = Model(dtype), Model(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    compact = child_adamw(model, backend=backend, **options)
    dense_options = {k: v for k, v in options.items() if k not in ("decay", "norm_of")}
    dense = ChildAdamW(dense_model.parameters(), lr=1e-2, reserve_p=1.0, backend=backend, **dense_options)
    for step in range(4):
        set_grads(params_of(compact), step)
        set_grads(params_of(dense), step)
        for name, mask in dense_model.masks.items():
            getattr(dense_model, name).grad.mul_(mask)
        compact.step()
        dense.step()
    decay_all = options.get("decay") == "all"
    masks = [*model.masks.values(), torch.tensor(True)]
    for got, expected, start, mask in zip(model.parameters(), dense_model.parameters(), before, masks, strict=True):
        assert same_bits(got.detach(), expected.detach() if decay_all else torch.where(mask, expected, start).detach())
    for p, q in zip(model.parameters(), dense_model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            mask = compact.child_masks.get(p)
            kept = dense.state[q][key] if mask is None else mask.gather(dense.state[q][key])
            assert same_bits(compact.state[p][key], kept)


def strided(tensor, layout):
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.empty(tuple(2 * n for n in tensor.shape), dtype=tensor.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@both_backends
@pytest.mark.parametrize("layouts", list(itertools.product(["transposed", "every second"], repeat=2)), ids="-".join)
def test_strides_change_nothing(layouts, backend):
    plain, odd = Model(shapes=((40, 70), (33, 129), (5,))), Model(shapes=((40, 70), (33, 129), (5,)))
    for p in odd.parameters():
        p.data = strided(p.data, layouts[0])
    a, b = child_adamw(plain, decay="all"), child_adamw(odd, decay="all", backend=backend)
    for step in range(3):
        set_grads(params_of(a), step)
        set_grads(params_of(b), step)
        for p in params_of(b):
            p.grad = strided(p.grad, layouts[1])
        a.step()
        b.step()
    assert_same_run(a, b)


@both_backends
def test_weights_outside_are_the_pretrained_bits_after_200_steps(backend):
    """With weight decay, clipping and a GradScaler's unscaling; NaN, infinities and -0.0 outside survive too."""
    shapes = ((40, 70), (129,), (5,))
    model = Model(shapes=shapes)
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    outside = (~model.masks["p0"]).view(-1).nonzero().view(-1)[:4]
    model.p0.data.view(-1)[outside] = special
    before = {n: getattr(model, n).detach().clone() for n in model.masks}
    opt = child_adamw(model, weight_decay=0.1, max_grad_norm=1.0, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # begins its state
    for step in range(200):
        set_grads(params_of(opt), step, scale=1024.0)
        scaler.step(opt)
        scaler.update()
    for name, mask in model.masks.items():
        now = getattr(model, name).detach()
        assert same_bits(now[~mask], before[name][~mask])
        assert (now[mask] != before[name][mask]).all()
    assert (model.p2.detach() != Model(shapes=shapes).p2).all()


def test_state_holds_the_child_network_alone():
    model = Model()
    opt = child_adamw(model, amsgrad=True)
    train(opt, range(1))
    for name, mask in model.masks.items():
        state = opt.state[getattr(model, name)]
        assert {state[k].shape for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {(int(mask.sum()),)}


def test_state_of_a_child_network_of_30_percent_takes_2_6_bytes_a_weight():
    model = Model(shapes=((512, 1024), (1,)))
    opt = child_adamw(model)
    train(opt, range(1))
    state = opt.state[model.p0]
    size = sum(v.numel() * v.element_size() for k, v in state.items() if k != "step")
    mask = opt.child_masks[model.p0]
    assert size + mask.offsets.numel() * 8 < 2.6 * model.p0.numel()
    assert mask.bits.numel() + mask.offsets.numel() * 8 < 0.15 * model.p0.numel()


@both_backends
def test_a_parameter_without_gradient_is_left_alone(backend):
    model = Model()
    opt = child_adamw(model, backend=backend)
    set_grads(params_of(opt), 0)
    model.p0.grad = None
    before = model.p0.detach().clone()
    opt.step()
    assert same_bits(model.p0.detach(), before)
    assert model.p0 not in opt.state


def test_groups_with_options_of_their_own_and_named_parameters():
    model, same = Model(), Model()
    named = list(model.named_parameters())
    child = model.child()
    opt = ChildAdamW(
        [{"params": named[:2], "lr": 1e-1, "decay": "all"}, {"params": named[2:], "weight_decay": 0.5}], child=child
    )
    alone = ChildAdamW(list(same.parameters())[2:], weight_decay=0.5, child=same.child())
    for step in range(2):
        for optimizer, params in ((opt, model.parameters()), (alone, same.parameters())):
            set_grads(list(params), step)
            optimizer.step()
    for i in range(2, len(SHAPES)):
        assert same_bits(getattr(model, f"p{i}").detach(), getattr(same, f"p{i}").detach())


def test_copies_and_pickles_go_on_alike(tmp_path):
    model = Model()
    opt = child_adamw(model)
    train(opt, range(2))
    copied = copy.deepcopy(opt)
    torch.save(opt, tmp_path / "opt.pt")
    loaded = torch.load(tmp_path / "opt.pt", weights_only=False)
    for one in (opt, copied, loaded):
        train(one, range(2, 4))
    assert_same_run(opt, copied)
    assert_same_run(opt, loaded)


@both_backends
def test_a_step_that_raises_has_written_nothing(backend):
    model = Model()
    opt = child_adamw(model, backend=backend)
    set_grads(params_of(opt), 0)
    before = [p.detach().clone() for p in model.parameters()]
    train(opt, [])
    opt.state[model.p0].update(step=torch.tensor(0.0), exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 .* must have the shape"):
        opt.step()
    assert all(same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))
    assert model.p1 not in opt.state


def test_wrong_arguments():
    model = Model()
    child = model.child()
    for p in (0.3, 1.0):
        with pytest.raises(ValueError, match="reserve_p is not used with child="):
            ChildAdamW(model.parameters(), child=child, reserve_p=p)
    with pytest.raises(ValueError, match="reserve_p is not used with child="):
        ChildAdamW([{"params": model.parameters(), "reserve_p": 0.5}], child=child)
    with pytest.raises(ValueError, match="decay='child' needs a child network"):
        ChildAdamW(model.parameters(), decay="child")
    with pytest.raises(TypeError, match="child must be a ChildNetwork"):
        ChildAdamW(model.parameters(), child={"p0": torch.ones(3)})
    with pytest.raises(ValueError, match="child must mask a parameter of those passed"):
        ChildAdamW([torch.nn.Parameter(model.p0.detach().reshape(-1))], child=child)  # as FSDP1 flattens them
    with pytest.raises(ValueError, match="norm_of must be 'all' or 'child'"):
        ChildAdamW(model.parameters(), norm_of="some")


@both_backends
def test_zeroing_all_state_leaves_the_masks(backend):
    """Some code resets an optimizer by zeroing its state, or what its state_dict returns."""
    model = Model()
    opt = child_adamw(model, backend=backend)
    train(opt, range(1))
    masks = {name: mask.clone() for name, mask in model.masks.items()}
    for state in (*opt.state.values(), *opt.state_dict()["state"].values()):
        for value in state.values():
            value.zero_()
    before = [p.detach().clone() for p in model.parameters()]
    train(opt, range(1, 3))
    for p, b, (name, mask) in zip(model.parameters(), before, masks.items(), strict=False):
        assert same_bits(opt.child_masks[p].unpack(), mask)
        assert same_bits(p[~mask], b[~mask])
        assert mask.sum() == 0 or not same_bits(p[mask], b[mask]), name


@both_backends
def test_a_mask_that_somebody_writes_to_is_noticed(backend):
    model = Model()
    child = model.child()
    opt = ChildAdamW(model.parameters(), child=child, backend=backend)
    train(opt, range(1))
    before = [p.detach().clone() for p in model.parameters()]
    for mask in opt.child_masks.values():
        mask.bits.zero_()
    set_grads(params_of(opt), 1)
    for use in (opt.step, child.masks, opt.state_dict):
        with pytest.raises(RuntimeError, match="the mask of a child network must not be changed"):
            use()
    assert all(same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True))


@both_backends
def test_a_masked_parameter_that_has_got_another_shape_is_refused(backend):
    model = Model()
    opt = child_adamw(model, backend=backend)
    model.p0.data = model.p0.data.t().contiguous()
    set_grads(params_of(opt), 0)
    before = model.p1.detach().clone()
    with pytest.raises(ValueError, match=r"must keep its shape \(40, 70\) \(got \(70, 40\)\)"):
        opt.step()
    assert same_bits(model.p1.detach(), before)


@both_backends
def test_reserve_p_of_a_group_masks_nothing_beside_a_child_network(backend):
    model = Model()
    opt = child_adamw(model, backend=backend)
    opt.param_groups[0]["reserve_p"] = 0.3
    train(opt, range(1))
    assert (opt.state[getattr(model, f"p{len(SHAPES) - 1}")]["exp_avg"] != 0).all()


def test_the_norm_is_summed_in_one_order_whatever_is_masked():
    """Masked and full parameters in turn, in float64, where another order of summation shows."""
    runs = []
    for backend in ("native", "torch"):
        model = Model(torch.float64, ((40, 40), (40,)) * 6)
        model.masks = {name: mask for name, mask in model.masks.items() if mask.ndim == 2}
        runs.append(child_adamw(model, backend=backend, max_grad_norm=0.1, lr=0.1))
        train(runs[-1], range(20))
    assert_same_run(*runs)


def test_a_copied_child_network_asks_for_names():
    model = Model()
    copied = copy.deepcopy(model.child())
    with pytest.raises(ValueError, match=r"pass model\.named_parameters\(\)"):
        ChildAdamW(model.parameters(), child=copied)
    assert len(ChildAdamW(model.named_parameters(), child=copied).child_masks) == len(model.masks)
