"""Scores of 0: a choice among them is refused or warned of, with counts, wherever one would be by position alone."""

import re
import warnings

import pytest
import torch
from dispatches import Dispatches
from models import Tiny, random_scores
from torch import nn

from childtune_fast import ChildNetwork, FisherAccumulator, estimate_fisher
from childtune_fast.child import zero_scores

WEIGHTS = 2 * (16 * 17 + 16 * 32 + 32 + 32 * 16 + 16)  # in the blocks of Tiny
FIRST = "blocks.0.mlp.0.weight"  # of 512 weights


def zeroed(share, dtype=torch.float32, zero=0.0):
    """Scores of which a share, at the end of each tensor, is 0."""
    scores = {name: tensor.to(dtype) + 1 for name, tensor in random_scores(Tiny()).items()}
    for tensor in scores.values():
        tensor.view(-1)[round((1 - share) * tensor.numel()) :] = zero
    return scores


def warnings_of(scores, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ChildNetwork.from_scores(Tiny(), scores, **{"reserve_p": 0.3, **options})
    assert all(warning.category is UserWarning and warning.filename == __file__ for warning in found)
    return [str(warning.message) for warning in found]


def numbers_in(message):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d|\d", message.partition(";")[0])]


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_kept_than_have_a_score_above_0(dtype, zero):
    above = sum(int((t > 0).sum()) for n, t in zeroed(0.8).items() if n.startswith("blocks."))
    (message,) = warnings_of(zeroed(0.8, dtype, zero))
    kept = round(0.3 * WEIGHTS)
    assert numbers_in(message) == [0, kept, above, WEIGHTS, 0, kept - above, 0]
    assert "no tensor scores 0 as a whole; look for units that are never active" in message
    share = float(re.search(r"lower reserve_p to (\S+)$", message)[1])
    assert warnings_of(zeroed(0.8, dtype, zero), reserve_p=share) == []
    assert warnings_of(zeroed(0.8, dtype, zero), reserve_p=1.01 * share)


def test_one_weight_more_than_have_a_score_above_0_is_enough():
    scores = zeroed(0.8)
    above = sum(int((t > 0).sum()) for n, t in scores.items() if n.startswith("blocks."))
    assert warnings_of(scores, reserve_p=above / WEIGHTS) == []
    (message,) = warnings_of(scores, reserve_p=(above + 1) / WEIGHTS)
    assert "so that 1 that score 0 are chosen" in message


def test_tensors_that_score_0_as_a_whole_are_named():
    scores = random_scores(Tiny())
    for name in scores:
        if "mlp" in name:
            scores[name].zero_()
    (message,) = warnings_of(scores)
    assert f"; 8 tensors score 0 as a whole: '{FIRST}', 'blocks.0.mlp.0.bias', 'blocks.0.mlp.2.weight', ...;" in message
    assert "look for weights outside of the loss or under no_grad" in message
    assert "expert" not in message
    assert warnings_of(scores, reserve_p=0.1) == []  # none of them is kept


class Experts(nn.Module):
    """Blocks of two experts, of which tokens reach the first; the weights of a second matrix may be called lora_B."""

    def __init__(self, names=("experts_0", "experts_1")):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in names}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(next(iter(block.values()))(x))
        return x


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (("experts_0", "experts_1"), "look for experts that no token reached"),
        (("lora_B", "lora_A"), "look for lora_A of a LoRA model that is not trained yet"),
        (("used", "left"), "look for weights outside of the loss"),
    ],
)
def test_the_likely_cause_is_named(names, cause):
    model = Experts(names)
    batches = [torch.randn(3, 8)]
    scores = estimate_fisher(model, batches, loss_fn=lambda m, x: m(x).square().sum(), progress=False)
    with pytest.warns(UserWarning, match=rf"4 tensors score 0 as a whole: 'blocks.0.{names[1]}.weight'.*{cause}"):
        ChildNetwork.from_scores(model, scores, reserve_p=0.7, maskable="blocks")


def test_by_tensor_each_tensor_counts():
    scores = random_scores(Tiny())
    scores[FIRST].zero_()
    scores["blocks.1.mlp.2.weight"].view(-1)[100:] = 0
    assert warnings_of(scores) == []
    (message,) = warnings_of(scores, scope="tensor")
    assert numbers_in(message) == [0, 2 * 154, 2, 12, 100, 1024, 0, 154 + 54, 0]
    assert f"1 tensors score 0 as a whole: '{FIRST}';" in message
    assert "lower reserve_p" not in message  # no share helps a tensor of zeros


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("choose", [ChildNetwork.from_scores, ChildNetwork.lowest])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_scores_that_are_all_0_are_refused(choose, scope, zero):
    """The lowest are refused, too: which of them are taken is decided by position alone."""
    scores = random_scores(Tiny())
    for name in scores:
        if name.startswith("blocks."):
            scores[name].fill_(zero)
    for reserve_p in (0.3, 1):
        with pytest.raises(ValueError, match=r"only zeros in 12 tensors, the first 'blocks.0.attention.weight'"):
            choose(Tiny(), scores, reserve_p=reserve_p, scope=scope)
    scores[FIRST].view(-1)[-1] = 1e-45
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choose(Tiny(), scores, reserve_p=0.3, scope=scope)


def test_nothing_is_said_where_zeros_are_rightly_chosen():
    """They belong to the lowest scores; of all weights none is chosen; and signed scores may be kept below 0."""
    scores = zeroed(0.5)
    for scope in ("global", "tensor"):
        ChildNetwork.lowest(Tiny(), scores, reserve_p=0.3, scope=scope)
        assert warnings_of(scores, reserve_p=1.0, scope=scope) == []
    signed = {name: -tensor for name, tensor in scores.items()}
    assert warnings_of(signed, reserve_p=0.6) == []
    assert len(warnings_of(signed, reserve_p=0.4)) == 1


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_layouts_and_sizes_make_no_difference(scope, monkeypatch):
    """The look at a few scores compares the same weights of scores and mask, whatever lies where in memory."""
    monkeypatch.setattr(zero_scores, "_SAMPLE", 100)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = ((3, 700), (), (0, 4), (1, 5000), (40, 3, 2), (2500,))
            self.params = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    model = Odd()
    for kept in (0.2, 0.5):
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            scores = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
            scores = {n: t * (torch.rand(t.shape, generator=generator) < 0.35) for n, t in scores.items()}
            strided = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in scores.items()}
            groups = [[tensor] for tensor in scores.values()] if scope == "tensor" else [list(scores.values())]
            short = [sum(int((t > 0).sum()) for t in g) < round(kept * sum(t.numel() for t in g)) for g in groups]
            for given in (scores, strided):
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    ChildNetwork.from_scores(model, given, reserve_p=kept, scope=scope, maskable="params")
                assert len(found) == any(short)


@pytest.mark.parametrize("reserve_p", [0.3, 1.0])
def test_a_usual_choice_counts_nothing(monkeypatch, reserve_p):
    """One look at a few scores tells that there is nothing to warn of, and no copy is made of them."""
    monkeypatch.setattr(zero_scores, "_counts", None)
    scores = {"a": (torch.rand(1 << 10, 1 << 10) + 1).t(), "b": torch.zeros(1 << 20)}
    model = nn.ParameterDict({name: torch.zeros(tensor.shape) for name, tensor in scores.items()})
    child = ChildNetwork.from_scores(model, scores, reserve_p=reserve_p, maskable="")
    with Dispatches(known=list(scores.values())) as dispatches:
        zero_scores.check_zero_scores(scores, child.packed, False, largest=True)
    assert dispatches.peak < 1 << 18  # bytes; a copy of the scores, as bools, has 1 << 20


def test_scores_of_an_accumulator_are_checked_where_they_are_used():
    model = Tiny()
    fisher = FisherAccumulator(model)
    (0 * model.blocks[0].attention.weight.sum()).backward()
    fisher.update()
    with pytest.raises(ValueError, match="or, under per_example=True, for a loss that compares"):
        ChildNetwork.from_scores(model, fisher.scores(), reserve_p=0.3)
